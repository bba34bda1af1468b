"""How long launches take on the device, on operands that come from memory: what the tuner (tuner.py) decides by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import cupy
import numpy as np

from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind
from engine.targets.cuda.device import Packed
from engine.targets.cuda.kernel import ALIGNMENT, Launch, Pointer, ceildiv
from engine.targets.cuda.timing import elapsed_seconds

if TYPE_CHECKING:
    from engine.targets.cuda.target import CudaTarget

_ROTATE_BYTES = 160 << 20  # several times the L2 cache: operands come from memory
_MOST_SETS = 32
_POOL = 1 << 20  # random numbers that the operands repeat


@dataclass(frozen=True)
class Rounds:
    """So many rounds in which contenders take turns, each of so many seconds, behind `before` seconds of the same
    work."""

    count: int
    seconds: float
    before: float = 0.0


SHORT_ROUNDS = Rounds(5, 1e-3)
"""To find which of many contenders are worth longer ones."""


def timed_launches(target: CudaTarget, step: Step, rows: Sequence[list[Launch]], rounds: Rounds) -> list[float]:
    """Microseconds of each row of launches, whose kernels are loaded: the median of rounds that take turns, every other
    one backwards."""
    count = min(_MOST_SETS, max(1, ceildiv(_ROTATE_BYTES, max(1, step.cost.bytes))))
    memory = _Memory(count)
    stream = cupy.cuda.Stream(non_blocking=True)
    graphs = [_captured(target, row, memory, stream) for row in rows]
    cupy.cuda.get_current_stream().synchronize()  # on which the operands were written
    once = [max(_seconds(graph, stream, 2) / 2, 1e-7) for graph in graphs]
    times: list[list[float]] = [[] for _ in rows]
    for number in range(rounds.count):
        order = range(len(rows)) if number % 2 == 0 else reversed(range(len(rows)))
        for i in order:
            repeats = max(1, int(rounds.seconds / once[i]))
            _queue(graphs[i], stream, int(rounds.before / once[i]))
            times[i].append(_seconds(graphs[i], stream, repeats) / repeats / count)
    return [median(one) * 1e6 for one in times]


class _Memory:
    """Device memory of every buffer that launches name: a copy for each set, but for what launches leave to each other
    or to their next run, which has one place."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pieces: dict[int, tuple[Buffer, cupy.ndarray]] = {}
        self._pool = cupy.asarray(np.random.default_rng(0).standard_normal(_POOL).astype(np.float32))

    def address(self, pointer: Pointer, i: int) -> int:
        buffer = pointer.buffer
        if id(buffer) not in self._pieces:
            self._pieces[id(buffer)] = (buffer, self._allocated(buffer, pointer.ctype))
        memory = self._pieces[id(buffer)][1]
        return int(memory[i % len(memory)].data.ptr) + pointer.offset

    def _allocated(self, buffer: Buffer, ctype: str) -> cupy.ndarray:
        shared = buffer.kind in (BufferKind.WORKSPACE, BufferKind.PLAN)
        padded = ceildiv(max(1, buffer.nbytes), ALIGNMENT) * ALIGNMENT
        memory = cupy.zeros((1 if shared else self.count, padded), cupy.uint8)
        if shared:  # counters and partial sums; counters begin at zero
            return memory
        numbers = self._numbers(ctype)
        if numbers is not None:
            flat = memory.reshape(-1)
            for start in range(0, flat.size, numbers.size):
                flat[start : start + numbers.size] = numbers[: flat.size - start]
        return memory

    def _numbers(self, ctype: str) -> cupy.ndarray | None:
        """Random numbers of a type as bytes; None for integers, which may be indices."""
        match ctype:
            case "half":
                return self._pool.astype(cupy.float16).view(cupy.uint8)
            case "bfloat16":
                return (self._pool.view(cupy.uint32) >> 16).astype(cupy.uint16).view(cupy.uint8)
            case "e4m3":
                return cupy.asarray(DType.F8E4M3.convert(self._pool.get()).view(np.uint8))
            case "i8":
                return cupy.clip(cupy.rint(self._pool * 32), -128, 127).astype(cupy.int8).view(cupy.uint8)
            case "float":
                return self._pool.view(cupy.uint8)
        return None


def _captured(target: CudaTarget, row: Sequence[Launch], memory: _Memory, stream: cupy.cuda.Stream) -> cupy.cuda.Graph:
    """A graph that runs the launches on every set."""
    device, packed = target.device, list[Packed]()
    for i in range(memory.count):

        def address(pointer: Pointer, i: int = i) -> int:
            return memory.address(pointer, i)

        packed += device.pack(row, address)
    return device.capture(packed, stream, target.overlap)


def _queue(graph: cupy.cuda.Graph, stream: cupy.cuda.Stream, repeats: int) -> None:
    for _ in range(repeats):
        graph.launch(stream)


def _seconds(graph: cupy.cuda.Graph, stream: cupy.cuda.Stream, repeats: int) -> float:
    return elapsed_seconds(stream, lambda: _queue(graph, stream, repeats))
