"""Times the tiles that the cost model ranks first on the device, and keeps the fastest (choices.py). Asked for by
``python -m engine tune`` and by the benchmarks; nothing waits for it when a model is loaded."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import TYPE_CHECKING

import cupy
import numpy as np

from engine.ir.dtype import DType
from engine.ir.ops import Conv, Gemm
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind
from engine.specs import TileTrial
from engine.targets.cuda import conv, gemm
from engine.targets.cuda.choices import choice_of, key_of, tile_text
from engine.targets.cuda.device import Packed
from engine.targets.cuda.gemm import estimated_best, launches_of, operands_of, other_tiles, pick_tile, ranked_tiles
from engine.targets.cuda.kernel import ALIGNMENT, Context, Functor, Launch, Pointer, ceildiv
from engine.targets.cuda.product import Product
from engine.targets.cuda.product_cost import Ranked
from engine.targets.cuda.timing import elapsed_seconds

if TYPE_CHECKING:
    from engine.targets.cuda.target import CudaTarget

CANDIDATES = 6
"""Tiles that are timed of each product."""
OTHER_CANDIDATES = 3
"""Those of each `Way` that are timed beside them."""
_LOADED_TOGETHER = 12  # products whose kernels are compiled side by side, before the first of them is timed
_ROTATE_BYTES = 160 << 20  # several times the L2 cache: operands come from memory
_MOST_SETS = 32
_ROUNDS = 5
_ROUND_SECONDS = 1e-3
_POOL = 1 << 20  # random numbers that the operands repeat
_GAIN = 0.98  # of the cost model's tile: what is faster by less than the noise does not take its place


def trials(
    target: CudaTarget, steps: Iterable[Step], timed: bool, most: int = CANDIDATES, deadline: float = inf
) -> Iterator[TileTrial]:
    """The tiles of the products among `steps`, 1×1 convolutions among them, each kind of product once, from what the
    cost model expects to be the fastest on. `timed`: they are run, unless the product has been timed before, and the
    fastest is kept; those that have not come to it at `deadline` (of `time.monotonic`) are not. Raises CompileError,
    OutOfMemory."""
    found = _products(steps, target.context, most)
    untimed = [key for key in found if timed and key not in target.choices]
    loaded = set[str]()
    for key, one in found.items():
        times: Sequence[float | None] = [None] * len(one.ranked)
        if key in untimed and time.monotonic() < deadline:
            if key not in loaded:
                loaded |= _load(target, found, untimed[untimed.index(key) :][:_LOADED_TOGETHER])
            with target.lock, target.device.errors(), target.device.current():
                measured = timed_launches(target, one.step, one.launches(target.context))
            fastest = _fastest(measured)
            target.keep_choices({key: choice_of(one.ranked[fastest].tile, measured[fastest])})
            times = measured
        chosen = pick_tile(one.product, one.epilogue, target.context)
        for ranked, us in zip(one.ranked, times, strict=True):
            tile, estimate = ranked.tile, ranked.estimate
            yield TileTrial(one.step.name, key, tile_text(tile), estimate.us, estimate.bound, us, tile == chosen)


def product_of(step: Step, context: Context) -> tuple[Product, Functor] | None:
    """The product that a step runs as, of those whose tile is chosen here, and its epilogue; None for others."""
    match step.op:
        case Gemm():
            return gemm.parts_of(step, context)
        case Conv():
            return conv.parts_of(step, context)
    return None


def _products(steps: Iterable[Step], context: Context, most: int) -> dict[str, _Product]:
    """The products among steps by their keys."""
    found = dict[str, _Product]()
    for step in steps:
        parts = product_of(step, context)
        if parts is not None:
            product, epilogue = parts
            key = key_of(product, operands_of(product, context), epilogue)
            if key not in found:
                found[key] = _Product(step, product, epilogue, candidates(product, epilogue, context, most))
    return found


def _load(target: CudaTarget, found: Mapping[str, _Product], keys: Sequence[str]) -> set[str]:
    """Compile and load, in parallel, what some products could run in."""
    rows = [row for key in keys for row in found[key].launches(target.context)]
    target.device.load(launch.kernel for row in rows for launch in row)
    return set(keys)


@dataclass(frozen=True)
class _Product:
    """A product of a step, and what it could run in."""

    step: Step
    product: Product
    epilogue: Functor
    ranked: list[Ranked]

    def launches(self, context: Context) -> list[list[Launch]]:
        return [launches_of(self.product, self.epilogue, one.tile, context) for one in self.ranked]


def candidates(product: Product, epilogue: Functor, context: Context, most: int = CANDIDATES) -> list[Ranked]:
    """The tiles worth timing, that which should be the fastest first: the first ones by their estimates, the best of
    every other kernel, whose estimates compare less well, and the first ones of every other way."""
    ranked = ranked_tiles(product, context, epilogue.reads)
    chosen = ranked[:most]
    for one in ranked[most:]:
        if all(type(one.tile) is not type(other.tile) for other in chosen):
            chosen.append(one)
    others = other_tiles(product, epilogue, context)
    chosen += (ranked for tiles in others.values() for ranked in tiles[:OTHER_CANDIDATES])
    best = estimated_best(product, epilogue, context)
    return [best, *(one for one in chosen if one.tile != best.tile)]


def _fastest(times: Sequence[float]) -> int:
    """The tile to take: the cost model's own, the first, unless another one beats it by more than noise."""
    best = min(range(len(times)), key=times.__getitem__)
    return best if times[best] < _GAIN * times[0] else 0


def timed_launches(target: CudaTarget, step: Step, rows: Sequence[list[Launch]]) -> list[float]:
    """Microseconds of each row of launches, whose kernels are loaded: the median of rounds that take turns."""
    count = min(_MOST_SETS, max(1, ceildiv(_ROTATE_BYTES, max(1, step.cost.bytes))))
    memory = _Memory(count)
    stream = cupy.cuda.Stream(non_blocking=True)
    graphs = [_captured(target, row, memory, stream) for row in rows]
    cupy.cuda.get_current_stream().synchronize()  # on which the operands were written
    repeats = [max(1, int(_ROUND_SECONDS / max(_seconds(graph, stream, 2) / 2, 1e-7))) for graph in graphs]
    rounds = [
        [_seconds(graph, stream, repeat) / repeat / count for graph, repeat in zip(graphs, repeats, strict=True)]
        for _ in range(_ROUNDS)
    ]
    return [median(one) * 1e6 for one in zip(*rounds, strict=True)]


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


def _seconds(graph: cupy.cuda.Graph, stream: cupy.cuda.Stream, repeats: int) -> float:
    def work() -> None:
        for _ in range(repeats):
            graph.launch(stream)

    return elapsed_seconds(stream, work)
