"""A loaded model: the public `Model` with run, bind, profile and its figures. Made by `engine.load`.

One lock per model covers its plans and its runs; the target may serialise further (one CPU pool serves all models).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from engine.errors import EngineError, OutOfMemory, ShapeError
from engine.feeds import (
    check_feeds,
    free_symbols,
    index_out_of_range,
    sample_feeds,
    size_out_of_range,
    sizes_of,
)
from engine.ir.graph import Graph
from engine.ir.ops import Opaque
from engine.plan.build import Constants, build
from engine.plan.cache import LeastRecentlyUsed
from engine.plan.plan import Plan
from engine.specs import DeviceInfo, KernelStat, ProfileRow, StepStat, TensorSpec, roofline
from engine.targets.base import Executable, Resident, Target

PLAN_CACHE_BYTES = 64 << 20
PROFILE_RUNS = 20


class _Bound:
    """An executable with the plan's facts that outlive it in the cache."""

    def __init__(self, plan: Plan, executable: Executable) -> None:
        self.executable = executable
        self.outputs = {name: (tensor.shape, tensor.dtype.numpy) for name, tensor in plan.outputs.items()}

    @property
    def nbytes(self) -> int:
        return self.executable.nbytes


class Model:
    """A model on a device. Thread-safe. Use `engine.load` to make one, and `close` (or ``with``) to free it."""

    def __init__(self, graph: Graph, target: Target, plan_cache_bytes: int = PLAN_CACHE_BYTES) -> None:
        self._graph = graph
        self._target = target
        self._lock = threading.RLock()
        self._constants = Constants()
        self._retired: dict[tuple[str, str], KernelStat] = {}
        self._plans: LeastRecentlyUsed[tuple[int, ...], _Bound] = LeastRecentlyUsed(plan_cache_bytes, self._retire)
        self._pinned: list[Resident] = []
        self._closed = False
        self._symbols = free_symbols(graph.inputs)
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

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run the model. `feeds` maps every input name to an array of the input's dtype and shape (NumPy or CuPy).

        Returns NumPy arrays with the ONNX dtypes and shapes, by output name. Raises ShapeError for feeds that do not
        fit the model, OutOfMemory for sizes the device cannot hold, DeviceError where the device fails.
        """
        arrays = check_feeds(self._graph.inputs, feeds)
        sizes = sizes_of(self._graph.inputs, arrays)
        with self._lock, self._explained(sizes, arrays):
            bound = self._bound(sizes)
            outputs = {name: np.empty(shape, dtype) for name, (shape, dtype) in bound.outputs.items()}
            bound.executable.run(arrays, outputs)
        return outputs

    @contextmanager
    def _explained(self, sizes: Mapping[str, int], arrays: Mapping[str, np.ndarray]) -> Iterator[None]:
        """Errors in the caller's terms: the sizes at fault, the input that holds a wild index, the memory asked for."""
        try:
            yield
        except ShapeError as error:
            told = index_out_of_range(self._graph, arrays) or size_out_of_range(self._graph, sizes)
            raise (ShapeError(told) if told else error) from error
        except MemoryError as error:
            asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
            detail = f": {error}" if str(error) else ""
            raise OutOfMemory(f"no memory for {asked or 'this model'}{detail}; use smaller sizes") from error

    def bind(self, sizes: Mapping[str, int]) -> BoundModel:
        """A plan for fixed sizes with its own input and output arrays in the device's memory, for repeated runs without
        allocation and without transfers.

        `sizes` gives every symbol of the input shapes. Raises ShapeError where one is missing, unknown or not positive.
        """
        self._check_sizes(sizes)
        with self._lock, self._explained(sizes, {}):
            resident = self._target.resident(self._build(sizes))
            self._pinned.append(resident)
        return BoundModel(self, resident)

    def plan(self, sizes: Mapping[str, int]) -> Plan:
        """The plan for `sizes`, for inspection: its steps, tensors, memory and costs."""
        self._check_sizes(sizes)
        with self._lock, self._explained(sizes, {}):
            return self._build(sizes)

    def sample_feeds(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
        """Random inputs the model accepts (for warm-up, checks and benchmarks): see `engine.feeds.sample_feeds`."""
        return sample_feeds(self._graph, sizes, seed)

    # Figures

    def profile(self, feeds: Mapping[str, Any], runs: int = PROFILE_RUNS) -> tuple[ProfileRow, ...]:
        """Run `runs` times (after two warm-up runs) and say how long each step took on average, in plan order."""
        with self._lock:
            for _ in range(2):
                self.run(feeds)
            sizes = sizes_of(self._graph.inputs, check_feeds(self._graph.inputs, feeds))
            executable = self._bound(sizes).executable
            before = executable.step_stats()
            for _ in range(runs):
                self.run(feeds)
            after = executable.step_stats()
        return tuple(
            self._profile_row(now, now.launches - then.launches, now.seconds - then.seconds)
            for then, now in zip(before, after, strict=True)
        )

    def _profile_row(self, stat: StepStat, calls: int, seconds: float) -> ProfileRow:
        each = seconds / max(calls, 1)
        fraction = roofline(stat.flops, stat.bytes, each, self.device_info)
        return ProfileRow(stat.step, stat.kernel, stat.op, calls, each, stat.flops, stat.bytes, fraction)

    def kernel_stats(self) -> tuple[KernelStat, ...]:
        """Launches, seconds, FLOPs and bytes of every kernel family and operator since the model was loaded."""
        with self._lock:
            totals = dict(self._retired)
            for bound in self._plans.values():
                _accumulate(totals, bound.executable.step_stats())
            for resident in self._pinned:
                _accumulate(totals, resident.step_stats())
        return tuple(totals[key] for key in sorted(totals))

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
    def graph(self) -> Graph:
        """The compiled graph (read only)."""
        return self._graph

    # Life cycle

    def close(self) -> None:
        """Give all memory back. The model cannot be used afterwards; closing twice does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._plans.clear()
                for resident in list(self._pinned):
                    self._unpin(resident)
                self._target.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Inside

    def _check_sizes(self, sizes: Mapping[str, int]) -> None:
        unknown = sorted(set(sizes) - set(self._symbols))
        if unknown:
            known = ", ".join(self._symbols) or "none: all its sizes are fixed"
            raise ShapeError(f"the model has no size {unknown[0]!r}; it has {known}")
        for name in self._symbols:
            size = sizes.get(name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ShapeError(f"size {name!r} must be given, an int and at least 1, not {size!r}")

    def _build(self, sizes: Mapping[str, int]) -> Plan:
        if self._closed:
            raise EngineError("the model is closed")
        return build(self._graph, sizes, self._target, self._constants)

    def _bound(self, sizes: Mapping[str, int]) -> _Bound:
        if self._closed:
            raise EngineError("the model is closed")
        key = tuple(sizes[name] for name in self._symbols)
        bound = self._plans.get(key)
        if bound is None:
            plan = self._build(sizes)
            bound = _Bound(plan, self._target.bind(plan))
            self._plans.put(key, bound)
        return bound

    def _retire(self, bound: _Bound) -> None:
        _accumulate(self._retired, bound.executable.step_stats())
        bound.executable.close()

    def _launch(self, resident: Resident, stream: object) -> None:
        with self._lock:
            if resident not in self._pinned:
                raise EngineError("the bound model, or its model, is closed")
            resident.launch(stream)

    def _unpin(self, resident: Resident) -> None:
        with self._lock:
            if resident in self._pinned:
                self._pinned.remove(resident)
                _accumulate(self._retired, resident.step_stats())
                resident.close()


class BoundModel:
    """A model at fixed sizes with its own arrays: fill `inputs`, call `launch`, read `outputs`.

    The arrays are NumPy's on a CPU and CuPy's, in device memory, on a GPU.
    """

    def __init__(self, model: Model, resident: Resident) -> None:
        self._model = model
        self._resident = resident
        self.inputs = resident.inputs
        self.outputs = resident.outputs

    def launch(self, stream: object = None) -> None:
        """Run once on the arrays as they are, and wait for the result.

        With `stream`, a `cupy.cuda.Stream`, the run takes its place among the work of that stream instead, and nothing
        waits. A CPU has no streams. Raises ShapeError for an index out of range among the inputs (on a CPU).
        """
        self._model._launch(self._resident, stream)

    def close(self) -> None:
        """Give the plan back; closing twice does nothing."""
        self._model._unpin(self._resident)


def _spec(name: str, dtype: np.dtype, shape: Sequence[Any]) -> TensorSpec:
    return TensorSpec(name, dtype, tuple(dim if isinstance(dim, int) else str(dim) for dim in shape))


def _accumulate(totals: dict[tuple[str, str], KernelStat], stats: Sequence[StepStat]) -> None:
    for stat in stats:
        if not stat.launches:
            continue
        key = (stat.kernel, stat.op)
        seen = totals.get(key, KernelStat(stat.kernel, stat.op, 0, 0.0, 0.0, 0.0))
        totals[key] = replace(
            seen,
            launches=seen.launches + stat.launches,
            seconds=seen.seconds + stat.seconds,
            flops=seen.flops + stat.flops * stat.launches,
            bytes=seen.bytes + stat.bytes * stat.launches,
        )
