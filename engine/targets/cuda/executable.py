"""A plan that runs on the memory a target's plans share: what `Model.run` uses on a GPU.

A run takes a staging slot (memory.py) and goes through it: feeds → pinned memory → device → graph → device → pinned
memory → results. The three parts on the device are queued on three streams that wait for each other by events, so that
the copies of one run go on while another computes. The target's lock is held while the graph is queued, for
microseconds; the host's copies and the waiting are outside it, and the waiting thread sleeps. A plan with steps on the
host is queued as it runs: it holds the lock, and with it the arena, until its last graph is queued.

A slot holds, in pinned and in device memory alike: inputs, status words, outputs, stamps. The status words lie between
so that the transfer in, inputs and words, also clears the words, and the transfer out, words and outputs (and stamps,
where they were written), brings them back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cupy
import numpy as np

from engine.errors import ShapeError
from engine.plan.plan import Plan, Step
from engine.plan.tensor import Buffer, Tensor
from engine.specs import StepStat
from engine.targets.cuda.kernel import ALIGNMENT, Kernel, Launch, Pointer, ceildiv
from engine.targets.cuda.memory import SLOTS, Slot
from engine.targets.cuda.program import Graphs, Place, Program
from engine.targets.cuda.sampled_times import Nanoseconds

if TYPE_CHECKING:
    from engine.targets.cuda.target import CudaTarget


@dataclass(frozen=True)
class Layout:
    """Where things lie in a slot, in bytes from its start. `tensors`: inputs and outputs, by the id of their buffer."""

    tensors: Mapping[int, int]
    status: int
    outputs: int
    stamps: int
    nbytes: int


def lay_out(plan: Plan, status_bytes: int, stamp_bytes: int) -> Layout:
    """Inputs, status words, outputs, stamps, one after the other."""
    tensors: dict[int, int] = {}
    status = _place(plan.inputs, 0, tensors)
    outputs = status + _aligned(status_bytes)
    stamps = _place(plan.outputs, outputs, tensors)
    return Layout(tensors, status, outputs, stamps, stamps + _aligned(stamp_bytes))


def _place(tensors: Mapping[str, Tensor], start: int, places: dict[int, int]) -> int:
    """Give each tensor's buffer an offset from `start` on; returns the end."""
    for tensor in tensors.values():
        places[id(tensor.buffer)] = start
        start += _aligned(max(tensor.nbytes, 1))
    return start


def _aligned(nbytes: int) -> int:
    return ceildiv(nbytes, ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class _Captured:
    """Graphs on one slot, and the generations of the memory that they were captured for."""

    graphs: Graphs
    arena: int
    slot: int


class Executable:
    """A plan with its kernels, ready to run. Safe to use from many threads: as many runs at once as there are slots.

    `lowered` gives the launches of each step where the caller has chosen them (a tuner, a test of one tile).
    """

    def __init__(self, target: CudaTarget, plan: Plan, lowered: Sequence[list[Launch]] | None = None) -> None:
        self.plan = plan
        self._target = target
        self._program = Program(target, plan, lowered)
        self._layout = lay_out(plan, self._program.status_bytes, self._program.stamp_bytes)
        self._captured: dict[int, _Captured] = {}
        target.reserve_arena(self._program.arena_bytes)

    # Running

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], side_by_side: bool = False
    ) -> None:
        """Compute the plan's outputs into the arrays of `outputs`. All arrays are C-contiguous, of the plan's shapes
        and dtypes. Runs side by side need no word. Raises ShapeError for other arrays and for an index out of range,
        OutOfMemory, DeviceError where the device fails."""
        _check_arrays(self.plan.inputs, inputs)
        _check_arrays(self.plan.outputs, outputs)
        target, layout, program = self._target, self._layout, self._program
        with target.device.errors(), target.device.current(), target.staged(layout.nbytes) as slot:
            host = slot.host
            for name, tensor in self.plan.inputs.items():
                start = layout.tensors[id(tensor.buffer)]
                host[start : start + tensor.nbytes] = inputs[name].reshape(-1).view(np.uint8)
            host[layout.status : layout.outputs] = 0
            _copy(slot.device, slot.host_address, layout.outputs, cupy.cuda.runtime.memcpyHostToDevice, target.copy_in)
            slot.copied_in.record(target.copy_in)
            graphs, stands_for = self._queue(slot)
            slot.copied_out.synchronize()
            del graphs  # held until here: the plan may be closed meanwhile
            status = host[layout.status : layout.status + program.status_bytes].copy()
            if stands_for:
                sample = program.nanoseconds(host[layout.stamps : layout.stamps + program.stamp_bytes])
                with target.lock:
                    program.add_sample(sample, stands_for)
            for name, tensor in self.plan.outputs.items():
                start = layout.tensors[id(tensor.buffer)]
                outputs[name].reshape(-1).view(np.uint8)[:] = host[start : start + tensor.nbytes]
        program.check(status)

    def _queue(self, slot: Slot) -> tuple[Graphs, int]:
        """Queue the plan and the transfer out behind the transfer in; the graphs, and how many runs the stamps stand
        for, 0 where none are written."""
        target, layout = self._target, self._layout
        stream, copy_out = target.device.stream, target.copy_out
        with target.lock:
            stands_for = self._program.next_stands_for()
            sampled = stands_for > 0
            graphs = self._graphs(slot)
            stream.wait_event(slot.copied_in)
            self._program.launch(graphs, sampled, self._place(slot), stream)
            slot.computed.record(stream)
            copy_out.wait_event(slot.computed)
            end, start = layout.nbytes if sampled else layout.stamps, layout.status
            to, source = slot.host_address + start, slot.device + start
            _copy(to, source, end - start, cupy.cuda.runtime.memcpyDeviceToHost, copy_out)
            slot.copied_out.record(copy_out)
            self._program.count(sampled)
        return graphs, stands_for

    def _graphs(self, slot: Slot) -> Graphs:
        """The graphs for a slot, captured anew where the arena or the slot has moved since. Under the target's lock."""
        target = self._target
        target.reserve_arena(self._program.arena_bytes)
        found = self._captured.get(slot.index)
        if found is None or (found.arena, found.slot) != (target.arena_generation, slot.generation):
            self._captured.pop(slot.index, None)
            graphs = self._program.capture(self._place(slot))
            found = self._captured[slot.index] = _Captured(graphs, target.arena_generation, slot.generation)
        return found.graphs

    def _place(self, slot: Slot) -> Place:
        base, layout = slot.device, self._layout

        def io(buffer: Buffer) -> int:
            return base + layout.tensors[id(buffer)]

        return Place(io, base + layout.status, base + layout.stamps)

    # For measurements and tests, which have the target to themselves

    def prepare(self) -> None:
        """Reserve the first slot and capture on it."""
        target = self._target
        with target.lock, target.device.errors(), target.device.current():
            slot = target.slots.all[0]
            slot.reserve(self._layout.nbytes)
            self._graphs(slot)

    def launch(self, stream: cupy.cuda.Stream | None = None, stamped: bool = False) -> None:
        """Queue one run on what lies in the first slot's device memory, uncounted; with `stamped` it writes stamps,
        which nobody reads. `stream`: default, the device's own."""
        target = self._target
        with target.lock:
            slot = target.slots.all[0]
            if slot.nbytes < self._layout.nbytes:
                self.prepare()
            self._program.launch(self._graphs(slot), stamped, self._place(slot), stream or target.device.stream)

    def launch_each(self, stamped: bool = False) -> None:
        """The same kernel by kernel, on the device's own stream: what a profiler sees as it is. With `stamped` every
        step writes its stamp. After `prepare`, or `empty_stamps`."""
        target = self._target
        with target.lock, target.device.errors(), target.device.current():
            self._program.launch_each(self._place(target.slots.all[0]), target.device.stream, stamped)

    def empty_stamps(self) -> None:
        """Make the first slot's stamps ready for a `launch_each` that writes them; waits until they are."""
        target = self._target
        with target.lock, target.device.errors(), target.device.current():
            self.prepare()
            every = range(len(self.plan.steps))
            self._program.empty_stamps(self._place(target.slots.all[0]), every, target.device.stream)
            target.device.stream.synchronize()

    def stamps_ns(self) -> Nanoseconds:
        """What the first slot's stamps say of each step, after whatever is queued; 0 where a step has no kernel."""
        target, nbytes = self._target, self._program.stamp_bytes
        with target.lock, target.device.errors(), target.device.current():
            slot, stream, start = target.slots.all[0], target.device.stream, self._layout.stamps
            to = slot.host_address + start
            _copy(to, slot.device + start, nbytes, cupy.cuda.runtime.memcpyDeviceToHost, stream)
            stream.synchronize()
            return self._program.nanoseconds(slot.host[start : start + nbytes])

    @property
    def launches(self) -> Sequence[tuple[Step, list[Launch]]]:
        """Every step with what it launches."""
        return self._program.launches

    def address(self, pointer: Pointer) -> int:
        """Where a pointer points to on the device, in the first slot. After `prepare`."""
        return self._program.address(pointer, self._place(self._target.slots.all[0]))

    # Figures

    def step_stats(self) -> Sequence[StepStat]:
        """Runs and time of every step since it was bound. Times are those of the sampled runs, scaled to all."""
        return self._program.step_stats()

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """All kernels launched, in order."""
        return self._program.kernels

    @property
    def nbytes(self) -> int:
        """Memory of this executable beside weights, arena and slots: graphs and tensors of sizes."""
        return self._program.nbytes(SLOTS)

    def close(self) -> None:
        """Forget the graphs; a run that is under way keeps its own."""
        with self._target.lock:
            self._captured.clear()


def _copy(to: int, source: int, nbytes: int, kind: int, stream: cupy.cuda.Stream) -> None:
    if nbytes:
        cupy.cuda.runtime.memcpyAsync(to, source, nbytes, kind, stream.ptr)


def _check_arrays(tensors: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray]) -> None:
    for name, tensor in tensors.items():
        array = arrays[name]
        if array.shape != tensor.shape or array.dtype != tensor.dtype.numpy or not array.flags.c_contiguous:
            raise ShapeError(
                f"{name!r}: expected a C-contiguous {tensor.dtype.value} array of shape {list(tensor.shape)}, "
                f"got {array.dtype} of shape {list(array.shape)}"
            )
