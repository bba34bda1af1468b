"""Steps on the GPU beside PyTorch: operands in rotating sets, launches in CUDA graphs, rounds interleaved. Needs
PyTorch.

Used by `cuda_kernels.py`. A set is one copy of all the tensors of a step; a graph runs the step once on every set, and
there are so many sets that together they outgrow the L2 cache, unless the case says that it lives there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import cupy
import numpy as np
import torch

from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda.kernel import Launch, Pointer, TensorMap, pack
from engine.targets.cuda.target import CudaTarget

ROTATE_BYTES = 160 << 20
MAX_SETS = 64
ROUNDS = 7
ROUND_MS = 3.0

_TORCH = {
    DType.F16: torch.float16, DType.F32: torch.float32, DType.BF16: torch.bfloat16, DType.I64: torch.int64,
    DType.I32: torch.int32, DType.U8: torch.uint8, DType.BOOL: torch.bool,
}  # fmt: skip


@dataclass
class OperandSet:
    """One copy of a step's tensors: device memory by buffer."""

    memory: dict[int, torch.Tensor]

    def view(self, tensor: Tensor) -> torch.Tensor:
        """A tensor of the step, with its own strides."""
        flat = self.memory[id(tensor.buffer)].view(_TORCH[tensor.dtype])
        return torch.as_strided(flat, tensor.shape, tensor.strides, tensor.offset)


class Prepared:
    """A step with its launches on several operand sets."""

    def __init__(self, target: CudaTarget, step: Step, launches: Sequence[Launch], rotate: bool = True) -> None:
        self.target, self.step, self.launches = target, step, launches
        target.device.load(launch.kernel for launch in launches)
        count = -(-ROTATE_BYTES // max(1, step.cost.bytes)) if rotate else 1
        self.sets = [self._new_set() for _ in range(max(1, min(MAX_SETS, count)))]

    def _new_set(self) -> OperandSet:
        buffers = {id(t.buffer): t for t in (*self.step.inputs, *self.step.outputs)}
        made = OperandSet({key: _filled(tensor) for key, tensor in buffers.items()})
        for launch in self.launches:
            for _, argument in launch.arguments:
                pointer = getattr(argument, "pointer", argument)
                if isinstance(pointer, Pointer) and id(pointer.buffer) not in made.memory:
                    made.memory[id(pointer.buffer)] = _uploaded(pointer.buffer)
        return made

    def run(self, operands: OperandSet, stream: cupy.cuda.Stream, overlap: bool) -> None:
        """Queue the launches on one set."""

        def address(pointer: Pointer) -> int:
            return int(operands.memory[id(pointer.buffer)].data_ptr()) + pointer.offset

        def encode(map_: TensorMap) -> bytes:
            return self.target.device.encode(map_, address(map_.pointer))

        for launch in self.launches:
            params = pack(launch.arguments, address, encode, 0)
            self.target.device.launch(launch.kernel, launch.grid, params, stream, overlap)

    def graph(self) -> torch.cuda.CUDAGraph:
        """One run on every set."""

        def work() -> None:
            stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
            for i, operands in enumerate(self.sets):
                self.run(operands, stream, self.target.overlap and i > 0)

        return captured(work)

    def peer_graph(self, peer: Callable[..., torch.Tensor]) -> torch.cuda.CUDAGraph:
        """`peer` on the same operands (as tensors with the step's strides), on every set."""
        arguments = [[operands.view(tensor) for tensor in self.step.inputs] for operands in self.sets]

        def work() -> None:
            for tensors in arguments:
                peer(*tensors)

        return captured(work)

    def error(self, peer: Callable[..., torch.Tensor]) -> float:
        """Relative L2 error of our first result against `peer` in fp32."""
        operands = self.sets[0]
        out = operands.view(self.step.outputs[0])
        out.fill_(float("nan"))
        with torch.cuda.stream(torch.cuda.Stream()):
            self.run(operands, cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream), False)
        torch.cuda.synchronize()
        wide = [t.float() if t.is_floating_point() else t for t in map(operands.view, self.step.inputs)]
        want = peer(*wide).float()
        return float((out.float() - want).norm() / want.norm())


def _filled(tensor: Tensor) -> torch.Tensor:
    """Memory for a buffer: a constant's content, else random values of about unit size."""
    if tensor.buffer.kind is BufferKind.CONSTANT:
        return _uploaded(tensor.buffer)
    elements = tensor.buffer.nbytes // tensor.dtype.itemsize
    if tensor.dtype.is_float:
        return torch.randn(elements, device="cuda").to(_TORCH[tensor.dtype]).view(torch.uint8)
    return torch.zeros(elements, device="cuda", dtype=_TORCH[tensor.dtype]).view(torch.uint8)


def _uploaded(buffer: Buffer) -> torch.Tensor:
    assert buffer.data is not None
    return torch.from_numpy(np.ascontiguousarray(buffer.data).reshape(-1).view(np.uint8).copy()).cuda()


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`work` as a CUDA graph, after a warm-up that lets libraries choose their algorithms."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def interleaved_us(graphs: Mapping[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int = ROUNDS) -> dict[str, float]:
    """Microseconds of one step in each graph (graph, steps in it): the median of rounds that take turns."""
    repeats = {}
    for name, (graph, _) in graphs.items():
        graph.replay()
        repeats[name] = max(1, int(ROUND_MS / max(_elapsed_ms(graph, 1), 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, steps) in graphs.items():
            times[name].append(_elapsed_ms(graph, repeats[name]) * 1e3 / repeats[name] / steps)
    return {name: median(values) for name, values in times.items()}


def _elapsed_ms(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
