"""Runs the launches of single steps under the emulator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda.architecture import Architecture
from engine.targets.cuda.kernel import ALIGNMENT, Context, Kernel, Launch, WeightStore, workspace, workspace_bytes
from tests.engine.targets.cuda.emulator import emulator
from tests.engine.targets.cuda.harness import POISON, RunError
from tests.engine.targets.cuda.tally import Tally

_MULTIPROCESSORS = 3  # few, so that persistent kernels take several tiles a block


class EmulatedRunner:
    """A `Runner` of kernels for `architecture` on this machine's processor."""

    def __init__(self, architecture: Architecture) -> None:
        self.tally = Tally()
        self.last_first = False  # the order in which threads take their turns
        self.late = 0  # not 0: some are late, chosen by this number
        self.context = Context(architecture, _MULTIPROCESSORS, WeightStore())
        self._number = 10 * int("".join(filter(str.isdigit, architecture.name)))  # as __CUDA_ARCH__ counts

    @property
    def portable(self) -> Context:
        """The same without the instructions that only one architecture has."""
        return replace(self.context, architecture=replace(self.context.architecture, wgmma=False))

    @contextmanager
    def in_reverse(self) -> Iterator[None]:
        """Threads take their turns from the last to the first."""
        self.last_first = True
        try:
            yield
        finally:
            self.last_first = False

    @contextmanager
    def with_latecomers(self, number: int) -> Iterator[None]:
        """Warps, warpgroups and blocks get no turn, now these and now those, until nobody else can go on."""
        self.late = number
        try:
            yield
        finally:
            self.late = 0

    def prepare(self, kernel: Kernel) -> str | None:
        """Compile a kernel; what is wrong with it, if anything."""
        try:
            emulator.load(kernel.source, self._number)
        except emulator.EmulationError as error:
            return str(error)
        return None

    def run(self, step: Step, launches: Sequence[Launch], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The results of a step. Raises RunError where a launch fails, meets a wild index, or writes
        beyond its results."""
        shared = workspace(workspace_bytes(launches))
        memory: dict[int, _Guarded] = {}

        def place(buffer: Buffer) -> _Guarded:
            buffer = shared if buffer.kind is BufferKind.WORKSPACE else buffer  # a plan has one place for all of them
            if id(buffer) not in memory:
                memory[id(buffer)] = _Guarded(buffer)
            return memory[id(buffer)]

        for tensor, array in zip(step.inputs, arrays, strict=True):
            if tensor.buffer.kind is BufferKind.INPUT:
                place(tensor.buffer).view(tensor)[...] = _as_stored(array)
        stamp, status = np.full(2, -1, np.int64), np.zeros(1, np.uint32)
        try:
            for launch in launches:
                emulator.run(
                    launch,
                    lambda pointer: place(pointer.buffer).start + pointer.offset,
                    stamp.ctypes.data,
                    self._number,
                    status.ctypes.data,
                    self.last_first,
                    self.late,
                )
        except emulator.EmulationError as error:
            raise RunError(str(error)) from None
        if not 0 < int(stamp[0]) <= ~int(stamp[1]):
            raise RunError(f"the stamp slot holds {stamp.tolist()}")
        if status[0]:
            raise RunError("an index is out of range")
        if not all(guarded.is_guard_whole() for guarded in memory.values()):
            raise RunError("wrote beyond its result, or beyond other memory that it was given")
        return [place(tensor.buffer).view(tensor).view(tensor.dtype.numpy) for tensor in step.outputs]


class _Guarded:
    """Memory for a buffer, aligned as on a device, poisoned unless the buffer has content, with poison around it."""

    def __init__(self, buffer: Buffer) -> None:
        self._bytes = np.full(buffer.nbytes + 3 * ALIGNMENT, POISON, np.uint8)
        self._first = ALIGNMENT + -self._bytes.ctypes.data % ALIGNMENT
        self._size = buffer.nbytes
        if buffer.data is not None:
            self._bytes[self._first : self._first + self._size] = (
                np.ascontiguousarray(buffer.data).reshape(-1).view(np.uint8)
            )

    @property
    def start(self) -> int:
        return int(self._bytes.ctypes.data) + self._first

    def view(self, tensor: Tensor) -> np.ndarray:
        """A tensor of the buffer (bfloat16 as bits)."""
        dtype = np.dtype(np.uint16) if tensor.dtype is DType.BF16 else tensor.dtype.numpy
        flat = self._bytes[self._first : self._first + self._size].view(dtype)
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides)

    def is_guard_whole(self) -> bool:
        """Whether nothing around the buffer was written."""
        around = (self._bytes[: self._first], self._bytes[self._first + self._size :])
        return all(bool((part == POISON).all()) for part in around)


def _as_stored(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == DType.BF16.numpy else array
