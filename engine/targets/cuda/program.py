"""The launches of a plan, captured as CUDA graphs, its steps on the host, and the figures of both: the part of an
executable that does not depend on where inputs and outputs lie. Used by `executable.py` and `resident.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import cupy
import numpy as np

from engine.errors import ShapeError, UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Opaque
from engine.plan.plan import Plan, Step
from engine.plan.residency import cached_bytes
from engine.plan.tensor import Buffer, BufferKind
from engine.specs import StepStat
from engine.targets.cuda.device import Packed
from engine.targets.cuda.families import family_of
from engine.targets.cuda.host_step import HostStep
from engine.targets.cuda.kernel import ALIGNMENT, Kernel, Launch, Pointer, ceildiv, workspace_bytes
from engine.targets.cuda.sampled_times import Nanoseconds, SampledTimes, Sampling

if TYPE_CHECKING:
    from engine.targets.cuda.target import CudaTarget

SAMPLE_EVERY = 16
SAMPLE_SECONDS = 0.015
"""A run writes time stamps, and its step times stand for the others, where at least so many runs and about as many
seconds have gone since the last that did. See `CudaTarget.sample_every`."""
STAMP_BYTES = 16
STATUS_BYTES = 4
_STAMP_EMPTY = 0xFF
_GRAPH_BYTES_PER_LAUNCH = 2048  # of device memory


@dataclass(frozen=True)
class Place:
    """Where a run finds what is its own: `io` gives the address of an input's or output's buffer; the status words of
    the steps that look up tables and the stamps of all steps lie in rows."""

    io: Callable[[Buffer], int]
    status: int
    stamps: int


@dataclass(frozen=True)
class Graphs:
    """A plan's launches on one place, a graph for each segment; in `stamped`, every step writes its stamp."""

    plain: tuple[cupy.cuda.Graph, ...]
    stamped: tuple[cupy.cuda.Graph, ...]

    def of(self, sampled: bool) -> tuple[cupy.cuda.Graph, ...]:
        return self.stamped if sampled else self.plain


class Program:
    """A plan with its kernels loaded. `lowered` gives the launches of each step where the caller has chosen them.

    A plan is one segment, a graph, unless it has steps that the host computes (host_step.py): then those stand between
    segments. Whoever calls `capture`, `launch`, `count` or `add_sample` holds the target's lock.
    """

    def __init__(self, target: CudaTarget, plan: Plan, lowered: Sequence[list[Launch]] | None = None) -> None:
        self._target = target
        self.plan = plan
        _refuse_strings(plan)
        if lowered is None:
            lowered = [
                [] if isinstance(step.op, Opaque) else family_of(step.op).lower(step, target.context)
                for step in plan.steps
            ]
        self._parts: list[range | HostStep] = []
        for on_host, group in groupby(enumerate(plan.steps), lambda item: isinstance(item[1].op, Opaque)):
            numbered = list(group)
            if on_host:
                self._parts += [HostStep(i, step) for i, step in numbered]
            else:
                self._parts.append(range(numbered[0][0], numbered[-1][0] + 1))
        self.launches: list[tuple[Step, list[Launch]]] = list(zip(plan.steps, lowered, strict=True))
        target.device.load(launch.kernel for _, launches in self.launches for launch in launches)
        looking_up = [i for i, (_, row) in enumerate(self.launches) if any(launch.looks_up for launch in row)]
        self._status_of = {step: word for word, step in enumerate(looking_up)}
        self.status_bytes = STATUS_BYTES * len(looking_up)
        self.stamp_bytes = STAMP_BYTES * len(plan.steps)
        self._workspace = ceildiv(plan.arena_bytes, ALIGNMENT) * ALIGNMENT  # behind the plan's own part of the arena
        self.arena_bytes = self._workspace + workspace_bytes(launch for _, row in self.launches for launch in row)
        self._cached_bytes = cached_bytes(plan, target.cache_bytes)
        self._own: dict[int, cupy.ndarray] = {}
        # Steps on the host write no stamps.
        self._on_device = np.array([not isinstance(step.op, Opaque) for step in plan.steps])
        self._runs = 0
        self._sampling = Sampling()
        self._times = SampledTimes(len(plan.steps))

    # Launching

    def capture(self, place: Place) -> Graphs:
        """The graphs for a place, and for the arena where it is now."""
        self._target.reserve_arena(self.arena_bytes)
        try:
            segments = [part for part in self._parts if isinstance(part, range)]
            plain, stamped = (tuple(self._capture(place, steps, s) for steps in segments) for s in (False, True))
            return Graphs(plain, stamped)
        finally:
            cupy.cuda.get_current_stream().synchronize()  # on which constants were uploaded

    def launch(self, graphs: Graphs, sampled: bool, place: Place, stream: cupy.cuda.Stream) -> None:
        """Queue one run on a place. Where the host computes steps this waits for it, and the arena is this run's until
        it returns. Raises EngineError where an operator on the host fails."""
        segments = iter(graphs.of(sampled))
        for part in self._parts:
            if isinstance(part, HostStep):
                part.run(lambda pointer: self.address(pointer, place), stream)
            else:
                next(segments).launch(stream)

    def launch_each(self, place: Place, stream: cupy.cuda.Stream, stamped: bool = False) -> None:
        """Queue one run kernel by kernel and not as graphs: what a profiler sees as it is. With `stamped` every step
        writes its stamp over what `empty_stamps` has left there. As `launch` otherwise."""
        for part in self._parts:
            if isinstance(part, HostStep):
                part.run(lambda pointer: self.address(pointer, place), stream)
            else:
                self._target.device.launch_all(self._packed(place, part, stamped), stream, self._target.overlap)

    def empty_stamps(self, place: Place, steps: range, stream: cupy.cuda.Stream) -> None:
        """Queue what fills stamps with ones, as a run that writes them must find them."""
        first, nbytes = place.stamps + steps.start * STAMP_BYTES, len(steps) * STAMP_BYTES
        if nbytes:
            cupy.cuda.runtime.memsetAsync(first, _STAMP_EMPTY, nbytes, stream.ptr)

    def _packed(self, place: Place, steps: range, stamped: bool) -> list[Packed]:
        packed: list[Packed] = []
        for i in steps:
            stamp = place.stamps + i * STAMP_BYTES if stamped else 0
            status = place.status + self._status_of.get(i, 0) * STATUS_BYTES
            row = self.launches[i][1]
            packed += self._target.device.pack(row, lambda pointer: self.address(pointer, place), stamp, status)
        return packed

    def _capture(self, place: Place, steps: range, stamped: bool) -> cupy.cuda.Graph:
        target, packed = self._target, self._packed(place, steps, stamped)
        stream = cupy.cuda.Stream(non_blocking=True)

        def before() -> None:
            if stamped:
                self.empty_stamps(place, steps, stream)

        return target.device.capture(packed, stream, target.overlap, before)

    def address(self, pointer: Pointer, place: Place) -> int:
        """Where a pointer points to on the device."""
        buffer = pointer.buffer
        match buffer.kind:
            case BufferKind.ARENA:
                base = self._target.arena_address + buffer.offset
            case BufferKind.WORKSPACE:  # one place for all steps
                base = self._target.arena_address + self._workspace
            case BufferKind.INPUT | BufferKind.OUTPUT:
                base = place.io(buffer)
            case BufferKind.CONSTANT:
                base = self._target.constant(buffer)
            case BufferKind.PLAN:
                if id(buffer) not in self._own:
                    assert buffer.data is not None
                    self._own[id(buffer)] = cupy.asarray(np.ascontiguousarray(buffer.data).reshape(-1).view(np.uint8))
                base = int(self._own[id(buffer)].data.ptr)
        return base + pointer.offset

    def next_stands_for(self) -> int:
        """How many runs the one that is about to be queued stands for, if it writes stamps; 0 where it shall not."""
        return self._sampling.stands_for(self._runs, self._target.sample_every)

    def count(self, sampled: bool) -> None:
        """A run has been queued, which does write stamps or does not."""
        if sampled:
            target = self._target
            self._sampling.taken(self._runs, target.sample_every, target.sample_seconds, time.monotonic())
        self._runs += 1

    # What a run leaves behind

    def check(self, status: np.ndarray) -> None:
        """Raise ShapeError where a step has met an index outside its table. `status`: the bytes of the status words."""
        words = status.view(np.uint32)
        if words.any():
            step = list(self._status_of)[int(words.argmax())]
            name = self.plan.steps[step].name
            raise ShapeError(f"step {name!r}: an index is out of range for the table that it looks up")

    def nanoseconds(self, stamps: np.ndarray) -> Nanoseconds:
        """What a run that wrote stamps took for each step: 0 for those on the host, and those that launch nothing.
        `stamps`: their bytes. Needs no lock."""
        words = stamps.view(np.uint64).reshape(-1, 2)
        begin, end = words[:, 0], ~words[:, 1]
        return np.where(self._on_device & (end > begin), end - begin, np.uint64(0)).astype(np.float64)

    def add_sample(self, sample: Nanoseconds, runs: int) -> None:
        """Add the step times of a run that wrote stamps, and stands for so many."""
        self._times.add(sample, runs)

    @property
    def samples(self) -> int:
        """How many runs have been added."""
        return self._times.samples

    def step_stats(self) -> Sequence[StepStat]:
        """Runs and time of every step since it was bound. Times on the device are those of the sampled runs, scaled to
        all; the host's are of all. Never less than before."""
        with self._target.lock:
            runs, nanoseconds = self._runs, self._times.total(self._runs)
            on_host = {part.index: part.nanoseconds for part in self._parts if isinstance(part, HostStep)}
        return [
            StepStat(
                step.name, "host" if i in on_host else launches[0].kernel.family if launches else "none", step.op.name,
                runs, on_host[i] * 1e-9 if i in on_host else float(nanoseconds[i]) * 1e-9, step.cost.flops,
                step.cost.bytes, self._cached_bytes[i],
            )
            for i, (step, launches) in enumerate(self.launches)
        ]  # fmt: skip

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """All kernels launched, in order."""
        return tuple(launch.kernel for _, launches in self.launches for launch in launches)

    def nbytes(self, places: int) -> int:
        """Memory beside weights, arena and slots, with graphs on so many places: those, the tensors of sizes, and what
        the host's steps are computed in."""
        own = sum(buffer.nbytes for buffer in self.plan.buffers if buffer.kind is BufferKind.PLAN)
        own += sum(part.nbytes for part in self._parts if isinstance(part, HostStep))
        return own + 2 * places * _GRAPH_BYTES_PER_LAUNCH * sum(len(launches) for _, launches in self.launches)


def _refuse_strings(plan: Plan) -> None:
    tensors = (*plan.inputs.values(), *plan.outputs.values())
    for what, tensor in (
        *(("the model", tensor) for tensor in tensors),
        *((f"step {step.name!r}", tensor) for step in plan.steps for tensor in (*step.inputs, *step.outputs)),
    ):
        if tensor.dtype is DType.STRING:
            raise UnsupportedOp(f"{what} has tensors of strings, which a GPU cannot hold; use device='cpu'")
