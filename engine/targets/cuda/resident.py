"""A plan with inputs and outputs of its own in device memory: what `Model.bind` gives on a GPU.

An ordinary executable copies its inputs and outputs through a staging slot for every run. This one has CuPy arrays
instead; a launch moves nothing, and waits only where it is told to, or for steps on the host. Its status words stay set
until a launch that waits has read and reported them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import cupy
import numpy as np

from engine.errors import EngineError
from engine.plan.plan import Plan, Step
from engine.plan.tensor import Buffer
from engine.specs import StepStat
from engine.targets.cuda.kernel import Launch, ceildiv
from engine.targets.cuda.memory import pinned_bytes
from engine.targets.cuda.program import STAMP_BYTES, Graphs, Place, Program

if TYPE_CHECKING:
    from engine.targets.cuda.target import CudaTarget


class ResidentExecutable:
    """A plan on arrays of its own. `inputs` and `outputs` are CuPy arrays by name (bfloat16 and 8-bit floats as their
    bits). Safe to use from many threads: one launch at a time."""

    def __init__(self, target: CudaTarget, plan: Plan) -> None:
        self._target = target
        self._mine = threading.Lock()
        """Held over a launch, and the waiting for its result."""
        self._closed = False
        self._arrays: dict[int, cupy.ndarray] = {}
        try:
            for tensor in (*plan.inputs.values(), *plan.outputs.values()):
                dtype = tensor.dtype.plain
                self._arrays[id(tensor.buffer)] = cupy.zeros(tensor.shape, dtype)
            self._program = Program(target, plan)
            self._stamps_at = ceildiv(self._program.status_bytes, STAMP_BYTES) * STAMP_BYTES
            self._device_words = cupy.zeros(self._stamps_at + self._program.stamp_bytes, np.uint8)
            self._host_words = pinned_bytes(max(1, self._device_words.nbytes))
            target.reserve_arena(self._program.arena_bytes)
        except BaseException:
            self._arrays.clear()  # whoever keeps the exception, and with it this frame, shall not keep the memory
            raise
        self.inputs = {name: self._arrays[id(tensor.buffer)] for name, tensor in plan.inputs.items()}
        self.outputs = {name: self._arrays[id(tensor.buffer)] for name, tensor in plan.outputs.items()}
        # Zeros were written on CuPy's current stream, which the device's own does not wait for.
        cupy.cuda.get_current_stream().synchronize()
        self._graphs: Graphs | None = None
        self._generation = -1
        self._before = cupy.cuda.Event(disable_timing=True)
        self._after = cupy.cuda.Event(block=True, disable_timing=True)  # a thread that waits for it sleeps
        self._stamped = cupy.cuda.Event(disable_timing=True)
        self._unread = 0
        """So many runs are those stamps for that a launch has been queued to write (`_stamped` follows it) and that
        have not been read; 0: there are none."""

    def launch(self, stream: object = None) -> None:
        """Run once, after what the caller's stream (without one: CuPy's current one) has been given so far.

        Without `stream` this waits for the result; with one, later work of that stream does. A launch that waits raises
        ShapeError where one since the last that waited has met an index out of range.
        """
        if not isinstance(stream, cupy.cuda.Stream | cupy.cuda.ExternalStream | None):
            raise TypeError(
                f"stream must be a CuPy stream, not {type(stream).__name__}; "
                "wrap another library's as cupy.cuda.ExternalStream(pointer)"
            )
        caller = stream
        device = self._target.device
        with self._mine, device.errors(), device.current():
            if self._closed:
                raise EngineError("the bound model, or its model, is closed")
            with self._target.lock:
                self._queue(caller)
            if caller is None:
                self._after.synchronize()
                self._check()

    def _queue(self, caller: cupy.cuda.Stream | None) -> None:
        stream, program = self._target.device.stream, self._program
        self._read_stamps()
        graphs = self._captured()
        self._before.record(caller or cupy.cuda.get_current_stream())
        stream.wait_event(self._before)
        # While a caller is far ahead of the GPU, the stamps that are on their way are not written over.
        stands_for = 0 if self._unread else program.next_stands_for()
        sampled = stands_for > 0
        program.launch(graphs, sampled, self._place(), stream)
        program.count(sampled)
        if sampled:
            self._fetch(self._stamps_at, program.stamp_bytes)
            self._stamped.record(stream)
            self._unread = stands_for
        if caller is None:
            self._fetch(0, program.status_bytes)
        self._after.record(stream)
        if caller is not None:
            caller.wait_event(self._after)

    def _captured(self) -> Graphs:
        """The graphs, captured anew where the arena has moved since."""
        target = self._target
        target.reserve_arena(self._program.arena_bytes)
        if self._graphs is None or self._generation != target.arena_generation:
            self._graphs = None
            self._graphs = self._program.capture(self._place())
            self._generation = target.arena_generation
        return self._graphs

    def _place(self) -> Place:
        def io(buffer: Buffer) -> int:
            return int(self._arrays[id(buffer)].data.ptr)

        words = int(self._device_words.data.ptr)
        return Place(io, words, words + self._stamps_at)

    def _fetch(self, start: int, nbytes: int) -> None:
        """Queue the transfer of some of the words to pinned memory."""
        if nbytes:
            to, source = int(self._host_words.ctypes.data) + start, int(self._device_words.data.ptr) + start
            kind, stream = cupy.cuda.runtime.memcpyDeviceToHost, self._target.device.stream
            cupy.cuda.runtime.memcpyAsync(to, source, nbytes, kind, stream.ptr)

    def _check(self) -> None:
        """Report a wild index once."""
        nbytes = self._program.status_bytes
        words = self._host_words[:nbytes]
        if words.any():
            cupy.cuda.runtime.memsetAsync(self._device_words.data.ptr, 0, nbytes, self._target.device.stream.ptr)
        self._program.check(words)

    def _read_stamps(self) -> None:
        """Add up the newest stamps, once the launch that wrote them is done."""
        if self._unread and self._stamped.done:
            end = self._stamps_at + self._program.stamp_bytes
            sample = self._program.nanoseconds(self._host_words[self._stamps_at : end])
            self._program.add_sample(sample, self._unread)
            self._unread = 0

    @property
    def launches(self) -> Sequence[tuple[Step, list[Launch]]]:
        """Every step with what it launches."""
        return self._program.launches

    @property
    def samples(self) -> int:
        """How many runs' stamps have been read."""
        return self._program.samples

    def step_stats(self) -> Sequence[StepStat]:
        """Runs and time of every step since it was bound."""
        with self._target.lock, self._target.device.errors(), self._target.device.current():
            self._read_stamps()
            return self._program.step_stats()

    def close(self) -> None:
        """Forget graphs and arrays, after the launches that were queued."""
        with self._mine, self._target.lock:
            self._closed = True
            with suppress(cupy.cuda.runtime.CUDARuntimeError):  # on a lost device nothing runs
                self._after.synchronize()
            self._graphs = None
            self._arrays.clear()
