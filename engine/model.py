"""A loaded model: the public `Model` with run, bind, profile and its figures. Made by `engine.load`.

One lock per model covers its books: which plans are ready, and how many calls are in each. Nobody computes under it:
how many runs go on at once is the target's affair (one CPU pool serves all models; a GPU overlaps two). A plan that is
dropped, or a model that is closed, while calls are in it ends when the last of them has left.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np

from engine.errors import EngineError, OutOfMemory, ShapeError
from engine.feeds import (
    check_feeds,
    free_symbols,
    index_out_of_range,
    sample_feeds,
    size_limits,
    size_out_of_range,
    sizes_of,
)
from engine.ir.dtype import DType
from engine.ir.graph import Graph
from engine.ir.ops import Opaque
from engine.packing import Batch, Packer
from engine.passes.unpad import Unpadded
from engine.plan.build import Constants, build
from engine.plan.cache import LeastRecentlyUsed
from engine.plan.plan import Plan
from engine.plan.tensor import Tensor
from engine.specs import DeviceInfo, KernelStat, PlanProfile, ProfileRow, StepStat, TensorSpec, TileTrial, roofline
from engine.targets.base import Executable, Resident, Target

PLAN_CACHE_BYTES = 64 << 20
PROFILE_RUNS = 20
KNOWN_SHAPES = 1024


R = TypeVar("R", bound=Executable | Resident)


class _Held(Generic[R]):
    """Something bound to the device, with the number of calls that are in it."""

    def __init__(self, bound: R) -> None:
        self.bound = bound
        self.calls = 0


class _Ready(_Held[Executable]):
    """An executable with what is needed of its plan for every run."""

    def __init__(self, plan: Plan, executable: Executable) -> None:
        super().__init__(executable)
        self.outputs = {name: (tensor.shape, tensor.dtype.numpy) for name, tensor in plan.outputs.items()}
        self.sizes = dict(plan.sizes)
        self.results = tuple(", ".join(map(_described, step.outputs)) for step in plan.steps)

    @property
    def nbytes(self) -> int:
        return self.bound.nbytes


class Model:
    """A model on a device. Thread-safe. Use `engine.load` to make one, and `close` (or ``with``) to free it.

    Beside its graph it may have one for packed tokens (`engine.passes.unpad`). Which of the two runs is decided for
    every batch; what distinguishes their plans is a size more, the number of tokens.
    """

    def __init__(
        self,
        graph: Graph,
        target: Target,
        plan_cache_bytes: int = PLAN_CACHE_BYTES,
        unpadded: Unpadded | str = "switched off",
    ) -> None:
        """`unpadded`: the graph on packed tokens, or why there is none."""
        self._graph = graph
        self._target = target
        self._unpadded = unpadded
        packed = target.traits.packed
        self._packer = Packer(unpadded, packed) if isinstance(unpadded, Unpadded) and packed is not None else None
        self._lock = threading.RLock()
        self._left = threading.Condition(self._lock)
        """Notified when a call has left."""
        self._calls = 0
        self._constants = Constants()
        self._retired: dict[tuple[str, str], KernelStat] = {}
        self._plans: LeastRecentlyUsed[tuple[int, ...], _Ready] = LeastRecentlyUsed(plan_cache_bytes, self._end)
        self._pinned: list[_Held[Resident]] = []
        self._ending: list[_Held[Any]] = []
        """Dropped, with calls in them."""
        self._closed = False
        self._symbols = free_symbols(graph.inputs)
        self._known: dict[tuple[tuple[int, ...], ...], dict[str, int]] = {}
        """Sizes by the shapes of feeds that passed the checks."""
        # Strings are looked at one by one, every time.
        strings = any(value.dtype is DType.STRING for value in graph.inputs)
        self._plain = () if strings else tuple((value.name, value.dtype.numpy) for value in graph.inputs)
        self.inputs = tuple(_spec(value.name, value.dtype.numpy, value.shape) for value in graph.inputs)
        self.outputs = tuple(
            _spec(name, value.dtype.numpy, value.shape)
            for name, value in zip(graph.output_names, graph.outputs, strict=True)
        )
        self.load_seconds = 0.0
        """Seconds that `engine.load` took."""
        self.precision = "fp32"
        """The precision that `engine.load` chose."""

    # Running

    def run(
        self, feeds: Mapping[str, Any], on_start: Callable[[], None] = lambda: None, side_by_side: bool = False
    ) -> dict[str, np.ndarray]:
        """Run the model. `feeds` maps every input name to an array of the input's dtype and shape (NumPy or CuPy).

        `on_start` is called once all is ready and the device is about to compute; not where something raises before.
        What it sets off in other threads then has the interpreter for itself, and does not hold up the run.
        `side_by_side`: another run goes on, or begins, meanwhile; see `divides_threads`.

        Returns NumPy arrays with the ONNX dtypes and shapes, by output name. Where the model runs on packed tokens (see
        `packed_mask`) outputs that show positions are 0 at those of padding, if the mask is ones and then zeros. Raises
        ShapeError for feeds that do not fit the model, OutOfMemory for sizes the device cannot hold, DeviceError where
        the device fails.
        """
        arrays, sizes = self._checked(feeds)
        batch = self._batch(arrays, sizes)
        try:
            with self._lock:
                ready = self._ready(batch.sizes)
                self._enter(ready)
            try:
                outputs = {name: np.empty(shape, dtype) for name, (shape, dtype) in ready.outputs.items()}
                on_start()
                ready.bound.run(batch.arrays, outputs, side_by_side)
            finally:
                self._leave(ready)
        except (ShapeError, MemoryError) as error:
            raise self._explain(error, sizes, arrays) from error
        if self._packer is not None:
            self._packer.clear(outputs, batch)
        return outputs

    def _checked(self, feeds: Mapping[str, Any]) -> tuple[Mapping[str, np.ndarray], dict[str, int]]:
        """The feeds as arrays, and the sizes that their shapes give. Plain arrays of shapes that were right before are
        looked at no further."""
        shapes: list[tuple[int, ...]] = []
        if len(feeds) == len(self._plain):
            for name, dtype in self._plain:
                array = feeds.get(name)
                if type(array) is not np.ndarray or array.dtype != dtype or not array.flags.c_contiguous:
                    break
                shapes.append(array.shape)
            else:
                known = self._known.get(tuple(shapes))
                if known is not None:
                    return feeds, known
        arrays = check_feeds(self._graph.inputs, feeds)
        sizes = sizes_of(self._graph.inputs, arrays)
        if len(shapes) == len(arrays):
            if len(self._known) >= KNOWN_SHAPES:
                self._known.clear()
            self._known[tuple(shapes)] = sizes
        return arrays, sizes

    def _batch(self, arrays: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> Batch:
        """What to run on these feeds: the padded graph, or that on packed tokens."""
        return self._packer.batch(arrays, sizes) if self._packer is not None else Batch(arrays, sizes, False)

    @contextmanager
    def _explained(self, sizes: Mapping[str, int]) -> Iterator[None]:
        """Errors of making a plan in the caller's terms."""
        try:
            yield
        except (ShapeError, MemoryError) as error:
            raise self._explain(error, sizes, {}) from error

    def _explain(
        self, error: ShapeError | MemoryError, sizes: Mapping[str, int], arrays: Mapping[str, np.ndarray]
    ) -> EngineError:
        """An error in the caller's terms: the sizes at fault, the input with a wild index, the memory asked for."""
        if isinstance(error, ShapeError):
            told = index_out_of_range(self._graph, arrays) or size_out_of_range(self._graph, sizes)
            return ShapeError(told) if told else error
        asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
        detail = f": {error}" if str(error) else ""
        return OutOfMemory(f"no memory for {asked or 'this model'}{detail}; use smaller sizes")

    def bind(self, sizes: Mapping[str, int]) -> BoundModel:
        """A plan for fixed sizes with its own input and output arrays in the device's memory, for repeated runs without
        allocation and without transfers.

        `sizes` gives every symbol of the input shapes; with the size of `Model.packed_size` beside them the plan is
        that on packed tokens, whose inputs and sizes `pack` makes. Raises ShapeError where one is missing, unknown or
        not positive.
        """
        self._check_sizes(sizes)
        with self._lock, self._explained(sizes):
            held = _Held(self._target.resident(self._build(sizes)))
            self._pinned.append(held)
        return BoundModel(self, held)

    def plan(self, sizes: Mapping[str, int]) -> Plan:
        """The plan for `sizes`, for inspection: its steps, tensors, memory and costs."""
        self._check_sizes(sizes)
        with self._lock, self._explained(sizes):
            return self._build(sizes)

    @property
    def packed_size(self) -> str | None:
        """The name of the size that plans on packed tokens have beside the model's own: the number of tokens. None
        where the model does not run on packed tokens; `why_padded` says why."""
        return self._unpadded.tokens if self._packer is not None and isinstance(self._unpadded, Unpadded) else None

    @property
    def packed_mask(self) -> str | None:
        """The input that says which tokens are real, of a model that runs on packed tokens."""
        return self._unpadded.mask if self._packer is not None and isinstance(self._unpadded, Unpadded) else None

    def computed_tokens(self, rows: int, width: int, tokens: int) -> int:
        """How many tokens `run` computes of inputs [rows, width] whose mask has so many ones: in every row at least
        one, and then zeros."""
        return rows * width if self._packer is None else self._packer.computed_tokens(rows, width, tokens)

    @property
    def why_padded(self) -> str | None:
        """In a few words why the model does not run on packed tokens; None where it does."""
        return self._unpadded if isinstance(self._unpadded, str) else None

    def pack(self, feeds: Mapping[str, Any]) -> Batch | None:
        """What `run` would run on packed tokens for these feeds, however little that saves: inputs and sizes for
        `bind`. None where the model does not, or the mask does not allow it (rows of ones followed by zeros, nothing
        else).

        Raises ShapeError for feeds that do not fit the model.
        """
        arrays, sizes = self._checked(feeds)
        batch = self._packer.batch(arrays, sizes, least_saving=-np.inf) if self._packer is not None else None
        return batch if batch is not None and batch.packed else None

    def clear_padding(self, outputs: Mapping[str, np.ndarray], feeds: Mapping[str, Any]) -> None:
        """Put 0 at padded positions of `outputs`, wherever they come from, as `run` does for these feeds."""
        if self._packer is not None:
            self._packer.clear(outputs, replace(self._batch(*self._checked(feeds)), packed=False))

    def sample_feeds(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
        """Random inputs the model accepts (for warm-up, checks and benchmarks): see `engine.feeds.sample_feeds`."""
        return sample_feeds(self._graph, sizes, seed)

    # Figures

    def profile(self, feeds: Mapping[str, Any], runs: int = PROFILE_RUNS) -> tuple[ProfileRow, ...]:
        """Run `runs` times (after two warm-up runs) and say how long each step took on average, in plan order."""
        with self._lock:
            for _ in range(2):
                self.run(feeds)
            executable = self._ready(self._batch(*self._checked(feeds)).sizes).bound
            before = executable.step_stats()
            for _ in range(runs):
                self.run(feeds)
            after = executable.step_stats()
        return tuple(
            self._profile_row(now, now.launches - then.launches, now.seconds - then.seconds)
            for then, now in zip(before, after, strict=True)
        )

    def tune(self, sizes: Mapping[str, int], timed: bool = True, seconds: float = math.inf) -> Iterator[TileTrial]:
        """The tiles that the products and convolutions of the plan for `sizes` can run in, beside each other. They are
        timed on the device, and the fastest kept on disk for models loaded later; unless `timed`, or where `seconds`
        have passed before, the cost models' estimates are all there is. Raises ShapeError, DeviceError (a CPU has
        nothing to choose from), OutOfMemory."""
        yield from self._target.trials(self.plan(sizes), timed, time.monotonic() + seconds)

    def _profile_row(self, stat: StepStat, calls: int, seconds: float) -> ProfileRow:
        each = seconds / max(calls, 1)
        fraction = roofline(stat.flops, stat.bytes, stat.cached_bytes, each, self.device_info)
        return ProfileRow(
            stat.step, stat.kernel, stat.op, calls, each, stat.flops, stat.bytes, stat.cached_bytes, fraction
        )

    def kernel_stats(self) -> tuple[KernelStat, ...]:
        """Launches, seconds, FLOPs and bytes of every kernel family and operator since the model was loaded."""
        with self._lock:
            totals = dict(self._retired)
            every: list[_Held[Any]] = [*self._plans.values(), *self._pinned, *self._ending]
            for held in every:
                _accumulate(totals, held.bound.step_stats())
        return tuple(totals[key] for key in sorted(totals))

    def plan_profiles(self) -> tuple[PlanProfile, ...]:
        """Every plan that is ready, the one that ran last at the end: how its runs went since it was made, warm-up
        included. The figures of `profile`, but of what the model really ran."""
        with self._lock:
            return tuple(
                PlanProfile(
                    ready.sizes,
                    tuple(self._profile_row(stat, stat.launches, stat.seconds) for stat in ready.bound.step_stats()),
                    ready.results,
                )
                for ready in self._plans.values()
            )

    @property
    def concurrent_runs(self) -> int:
        """How many threads should call `run` at a time: with 2, the copies of one run overlap with the computing of the
        other, or each has its part of the threads; with 1, runs take turns."""
        return self._target.concurrent_runs

    @property
    def divides_threads(self) -> bool:
        """Whether a run that is told to be `side_by_side` takes half of the threads (a CPU with two or more), and any
        other all of them, which should be alone then. Two halves compute more than one whole: nobody waits at the end
        of each step, and what a core computed is still in its cache."""
        return self._target.divides_threads

    @property
    def device_info(self) -> DeviceInfo:
        return self._target.device_info

    @property
    def fallback_ops(self) -> int:
        """Number of operators that run through onnx.reference on the host, having no kernel."""
        return sum(isinstance(node.op, Opaque) for node in self._graph.nodes)

    def memory(self) -> dict[str, int]:
        """Bytes by kind: ``weights``, ``arena`` and ``plans`` (arguments of the plans that stay ready)."""
        with self._lock:
            return {**self._target.memory(), "plans": self._plans.nbytes}

    @property
    def plans_ready(self) -> int:
        """Number of plans in the cache."""
        return len(self._plans)

    @property
    def size_limits(self) -> dict[str, int]:
        """The most that a size may be, by the names of those that the model limits, as its table of positions does."""
        return size_limits(self._graph)

    @property
    def graph(self) -> Graph:
        """The compiled graph (read only)."""
        return self._graph

    # Life cycle

    def close(self) -> None:
        """Give all memory back, after the runs that are under way. The model cannot be used afterwards; closing twice
        does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._left.wait_for(lambda: not self._calls)
            self._plans.clear()
            while self._pinned:
                self._end(self._pinned.pop())
            self._target.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Inside

    def _check_sizes(self, sizes: Mapping[str, int]) -> None:
        names = self._symbols if self.packed_size not in sizes else (*self._symbols, str(self.packed_size))
        unknown = sorted(set(sizes) - set(names))
        if unknown:
            known = ", ".join(self._symbols) or "none: all its sizes are fixed"
            raise ShapeError(f"the model has no size {unknown[0]!r}; it has {known}")
        for name in names:
            size = sizes.get(name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ShapeError(f"size {name!r} must be given, an int and at least 1, not {size!r}")

    def _build(self, sizes: Mapping[str, int]) -> Plan:
        if self._closed:
            raise EngineError("the model is closed")
        return build(self._graph_of(sizes), sizes, self._target, self._constants)

    def _graph_of(self, sizes: Mapping[str, int]) -> Graph:
        """The graph that a plan of these sizes is one of."""
        if not isinstance(self._unpadded, Unpadded) or self._unpadded.tokens not in sizes:
            return self._graph
        # A limit that the padded graph has (its table of positions) is the model's.
        told = size_out_of_range(self._graph, sizes)
        if told:
            raise ShapeError(told)
        return self._unpadded.graph

    def _ready(self, sizes: Mapping[str, int]) -> _Ready:
        """The plan for `sizes`, from the cache or made now. Under the lock."""
        if self._closed:
            raise EngineError("the model is closed")
        key = (*(sizes[name] for name in self._symbols), sizes.get(self.packed_size or "", 0))
        ready = self._plans.get(key)
        if ready is None:
            plan = self._build(sizes)
            ready = _Ready(plan, self._target.bind(plan))
            self._plans.put(key, ready)
        return ready

    def _enter(self, held: _Held[Any]) -> None:
        """A call goes in. Under the lock."""
        held.calls += 1
        self._calls += 1

    def _leave(self, held: _Held[Any]) -> None:
        with self._lock:
            held.calls -= 1
            self._calls -= 1
            ending = held in self._ending
            if ending:
                self._end(held)
            if ending or self._closed:  # somebody may wait for it
                self._left.notify_all()

    def _end(self, held: _Held[Any]) -> None:
        """Give one back, now or when the last call has left it; what it has counted stays. Under the lock."""
        if held.calls:
            if held not in self._ending:
                self._ending.append(held)
            return
        if held in self._ending:
            self._ending.remove(held)
        _accumulate(self._retired, held.bound.step_stats())
        held.bound.close()

    def _launch(self, held: _Held[Resident], stream: object) -> None:
        with self._lock:
            if held not in self._pinned:
                raise EngineError("the bound model, or its model, is closed")
            self._enter(held)
        try:
            held.bound.launch(stream)
        finally:
            self._leave(held)

    def _unpin(self, held: _Held[Resident]) -> None:
        with self._lock:
            if held in self._pinned:
                self._pinned.remove(held)
                self._end(held)
                self._left.wait_for(lambda: held not in self._ending)


class BoundModel:
    """A model at fixed sizes with its own arrays: fill `inputs`, call `launch`, read `outputs`.

    The arrays are NumPy's on a CPU and CuPy's, in device memory, on a GPU.
    """

    def __init__(self, model: Model, held: _Held[Resident]) -> None:
        self._model = model
        self._held = held
        self.inputs = held.bound.inputs
        self.outputs = held.bound.outputs

    def launch(self, stream: object = None) -> None:
        """Run once on the arrays as they are, and wait for the result.

        With `stream`, a `cupy.cuda.Stream`, the run takes its place among the work of that stream instead, and nothing
        waits. A CPU has no streams. Raises ShapeError for an index out of range among the inputs, of this run or of one
        in a stream since the last that waited.
        """
        self._model._launch(self._held, stream)

    def close(self) -> None:
        """Give the plan back, after the launches that are under way; closing twice does nothing."""
        self._model._unpin(self._held)


def _spec(name: str, dtype: np.dtype, shape: Sequence[Any]) -> TensorSpec:
    return TensorSpec(name, dtype, tuple(dim if isinstance(dim, int) else str(dim) for dim in shape))


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype.value} {list(tensor.shape)}"


def _accumulate(totals: dict[tuple[str, str], KernelStat], stats: Sequence[StepStat]) -> None:
    for stat in stats:
        if not stat.launches:
            continue
        key = (stat.kernel, stat.op)
        seen = totals.get(key, KernelStat(stat.kernel, stat.op, 0, 0.0, 0.0, 0.0, 0.0))
        totals[key] = replace(
            seen,
            launches=seen.launches + stat.launches,
            seconds=seen.seconds + stat.seconds,
            flops=seen.flops + stat.flops * stat.launches,
            bytes=seen.bytes + stat.bytes * stat.launches,
            cached_bytes=seen.cached_bytes + stat.cached_bytes * stat.launches,
        )
