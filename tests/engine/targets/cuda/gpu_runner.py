"""Runs the launches of single steps on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import cupy
import numpy as np

from engine.ir.dtype import DType
from engine.plan.plan import Plan, Step
from engine.plan.tensor import BufferKind, Tensor
from engine.targets.cuda.compiler import CompileError
from engine.targets.cuda.kernel import Context, Kernel, Launch, Pointer
from engine.targets.cuda.target import CudaTarget, Executable
from tests.engine.targets.cuda.harness import POISON, RunError
from tests.engine.targets.cuda.tally import Tally


class GpuRunner:
    """A `Runner` on the first GPU."""

    def __init__(self) -> None:
        self.target = CudaTarget(0)
        self.tally = Tally()

    @property
    def context(self) -> Context:
        return self.target.context

    def prepare(self, kernel: Kernel) -> str | None:
        """Bring a kernel into the compiler's cache; what is wrong with it, if anything."""
        try:
            self.target.device.compiler.cubin(kernel.source)
        except CompileError as error:
            return str(error)
        return None

    def run(self, step: Step, launches: Sequence[Launch], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The results of a step. Raises RunError where it meets a wild index, or writes beyond its results."""
        return run_step(self.target, step, list(launches), arrays)

    def close(self) -> None:
        self.target.close()


def run_step(target: CudaTarget, step: Step, launches: list[Launch], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The results of one step on the GPU."""
    executable = bind_step(target, step, launches)
    with target.device.current(), target.device.stream:
        executable.prepare()
        slot = target.slots.all[0]
        whole = _bytes(target, slot.device, slot.device_bytes)
        whole[...] = POISON
        words = _bytes(target, slot.device + executable._layout.status, executable._program.status_bytes)
        words[...] = 0
        for tensor, array in zip(step.inputs, arrays, strict=True):
            if tensor.buffer.kind is BufferKind.INPUT:
                view(target, executable, tensor)[...] = cupy.asarray(_as_stored(array))
        executable.launch()
        target.device.stream.synchronize()
        if executable._program.status_bytes and bool(words.any()):
            executable.close()
            raise RunError("an index is out of range")
        results = [view(target, executable, tensor).get() for tensor in step.outputs]
        for tensor in step.outputs:
            used = executable.address(Pointer(tensor.buffer)) + tensor.buffer.nbytes
            if -used % 256:
                beyond = _bytes(target, used, -used % 256)
                if not bool((beyond == POISON).all()):
                    raise RunError("wrote beyond its result")
    executable.close()
    return [result.view(tensor.dtype.numpy) for result, tensor in zip(results, step.outputs, strict=True)]


def bind_step(target: CudaTarget, step: Step, launches: list[Launch]) -> Executable:
    """An executable of one step whose operands and results are a plan's."""
    fed = {tensor.buffer: tensor for tensor in step.inputs if tensor.buffer.kind is BufferKind.INPUT}
    inputs = {f"operand{i}": _whole(tensor) for i, tensor in enumerate(fed.values())}
    outputs = {f"result{i}": _whole(tensor) for i, tensor in enumerate(step.outputs)}
    buffers = tuple(tensor.buffer for tensor in (*step.inputs, *step.outputs))
    with target.device.errors(), target.device.current():
        return Executable(target, Plan({}, (step,), inputs, outputs, buffers, 0, 0), [launches])


def _whole(tensor: Tensor) -> Tensor:
    """The buffer of a tensor as bytes."""
    return Tensor(tensor.buffer, DType.U8, (tensor.buffer.nbytes,), (1,))


def view(target: CudaTarget, executable: Executable, tensor: Tensor) -> cupy.ndarray:
    """A tensor in device memory, as an array (bfloat16 and 8-bit floats as bits)."""
    start = executable.address(Pointer(tensor.buffer, tensor.offset * tensor.dtype.itemsize))
    memory = cupy.cuda.UnownedMemory(start, max(1, tensor.buffer.nbytes), target, target.device.index)
    dtype = tensor.dtype.plain
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    return cupy.ndarray(tensor.shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


def _bytes(target: CudaTarget, start: int, count: int) -> cupy.ndarray:
    memory = cupy.cuda.UnownedMemory(start, max(1, count), target, target.device.index)
    return cupy.ndarray((count,), np.uint8, cupy.cuda.MemoryPointer(memory, 0))


def _as_stored(array: np.ndarray) -> np.ndarray:
    return array.view(DType.of(array.dtype).plain)
