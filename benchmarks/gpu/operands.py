"""Copies of a step's tensors in device memory: so many sets that together they outgrow every cache. Needs PyTorch.

A graph runs the step once on every set, so that operands come from memory each time, for ours and for the peers, which
read the same ones. What takes less than 160 KB a set would need more sets than a graph has room for: there operands
come from the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType

import cupy
import numpy as np
import torch

from benchmarks.gpu.pace import pace_of
from benchmarks.gpu.timing import Check, GraphContender, relative_error
from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda.kernel import ALIGNMENT, Launch, Pointer, ceildiv
from engine.targets.cuda.target import CudaTarget

ROTATE_BYTES = 160 << 20
MOST_SETS = 1000  # nodes of a graph, a few for each: capturing more takes longer than anything else in a case
_POISON = 0xFF  # every float type reads NaN
_TORCH = {
    DType.F16: torch.float16,
    DType.F32: torch.float32,
    DType.F8E4M3: torch.float8_e4m3fn,
    DType.I32: torch.int32,
}

Reference = Callable[..., torch.Tensor]
Fill = Callable[[torch.Tensor], None]
"""Writes the content of an input of one set."""


class Operands:
    """`count` sets of the step's inputs and outputs, and of the packed weights of `launches`; what these only leave to
    each other or to their next run has one place, as in a plan.

    Inputs are normally distributed, integers 0; constants have their content. `fills` are the inputs that want another
    content.
    """

    def __init__(
        self,
        step: Step,
        reference: Reference,
        launches: Sequence[Launch] = (),
        fills: Mapping[int, Fill] = MappingProxyType({}),
        device: str = "cuda",
    ) -> None:
        self.step = step
        self.pace = pace_of([step])
        self._device = device
        self.count = min(MOST_SETS, max(1, ceildiv(ROTATE_BYTES, max(1, step.cost.bytes))))
        self._memory: dict[int, torch.Tensor] = {}
        for tensor in (*step.inputs, *step.outputs):
            if id(tensor.buffer) not in self._memory:
                self._memory[id(tensor.buffer)] = self._allocated(tensor.buffer, tensor.dtype)
        for launch in launches:
            for _, argument in launch.arguments:
                pointer = getattr(argument, "pointer", argument)
                if isinstance(pointer, Pointer) and id(pointer.buffer) not in self._memory:
                    self._memory[id(pointer.buffer)] = self._allocated(pointer.buffer, None)
        for index, fill in fills.items():
            for i in range(self.count):
                fill(self._view(step.inputs[index], i))
        self.inputs = [[self._view(tensor, i) for tensor in step.inputs] for i in range(self.count)]
        self.reference = cache(lambda i: reference(*map(_wide, self.inputs[i])))

    def output(self, i: int) -> torch.Tensor:
        """Where our launches write the (first) result of set `i`."""
        return self._view(self.step.outputs[0], i)

    def check(self, i: int, result: torch.Tensor) -> float:
        """The relative error of a result of set `i` against the reference in float64 on the same operands."""
        return relative_error(result, self.reference(i))

    def check_against(self, part: Reference) -> Check:
        """The same against something else that is computed from the operands in float64."""
        return lambda i, result: relative_error(result, part(*map(_wide, self.inputs[i])))

    def _allocated(self, buffer: Buffer, dtype: DType | None) -> torch.Tensor:
        """Memory for a buffer in every set, as rows of bytes."""
        padded = ceildiv(max(1, buffer.nbytes), ALIGNMENT) * ALIGNMENT
        count = 1 if buffer.kind in (BufferKind.WORKSPACE, BufferKind.PLAN) else self.count
        memory = torch.full((count, padded), _POISON, dtype=torch.uint8, device=self._device)
        if buffer.data is not None:
            content = np.ascontiguousarray(buffer.data).reshape(-1).view(np.uint8)
            memory[:, : buffer.nbytes] = torch.from_numpy(content.copy()).to(self._device)
        elif buffer.kind is BufferKind.INPUT:
            assert dtype is not None
            if dtype is DType.F8E4M3:  # of which PyTorch draws none
                for row in memory.view(_TORCH[dtype]):
                    row.copy_(torch.randn(row.shape, device=self._device))
            elif dtype is DType.I32:
                memory.zero_()
            else:
                memory.view(_TORCH[dtype]).normal_()
        return memory

    def _view(self, tensor: Tensor, i: int) -> torch.Tensor:
        """A tensor of the step in set `i`, with its own strides."""
        flat = self._memory[id(tensor.buffer)][i].view(_TORCH[tensor.dtype])
        # PyTorch counts the offset from the start of the storage, which all sets share.
        return torch.as_strided(flat, tensor.shape, tensor.strides, flat.storage_offset() + tensor.offset)

    def address(self, i: int, pointer: Pointer) -> int:
        """Where a launch's pointer points to in set `i`."""
        memory = self._memory[id(pointer.buffer)]
        return int(memory[i % len(memory)].data_ptr()) + pointer.offset


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def our_contender(target: CudaTarget, launches: Sequence[Launch], operands: Operands) -> GraphContender:
    """Our launches on every set. Raises CompileError."""
    target.device.load(launch.kernel for launch in launches)

    def work(i: int) -> torch.Tensor:
        def address(pointer: Pointer) -> int:
            return operands.address(i, pointer)

        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
        target.device.launch_all(target.device.pack(launches, address), stream, target.overlap, follows=i > 0)
        return operands.output(i)

    return GraphContender(work, operands.count, operands.check, operands.pace)
