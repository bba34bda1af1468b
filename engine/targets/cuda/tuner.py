"""Times the tiles that the cost models rank first on the device (tunables.py), and keeps the fastest (choice_file.py).
Asked for by ``python -m engine tune`` and by the benchmarks; nothing waits for it when a model is loaded."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from statistics import median
from typing import TYPE_CHECKING

import cupy
import numpy as np

from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind
from engine.specs import TileTrial
from engine.targets.cuda.device import Packed
from engine.targets.cuda.kernel import ALIGNMENT, Context, Launch, Pointer, ceildiv
from engine.targets.cuda.timing import elapsed_seconds
from engine.targets.cuda.tunables import CANDIDATES, Tunable, tunable

if TYPE_CHECKING:
    from engine.targets.cuda.target import CudaTarget

_LOADED_TOGETHER = (
    12  # products and convolutions whose kernels are compiled side by side, before the first of them is timed
)
_ROTATE_BYTES = 160 << 20  # several times the L2 cache: operands come from memory
_MOST_SETS = 32
_ROUNDS = 5
_ROUND_SECONDS = 1e-3
_FINAL_ROUNDS = 9
_FINAL_SECONDS = 3e-3  # long enough for the clock to fall to what it is under load
_CHALLENGERS = 3
_POOL = 1 << 20  # random numbers that the operands repeat
_GAIN = 0.98  # of the cost model's tile: what is faster by less than the noise does not take its place


def trials(
    target: CudaTarget, steps: Iterable[Step], timed: bool, most: int = CANDIDATES, deadline: float = inf
) -> Iterator[TileTrial]:
    """The tiles of the products and convolutions among `steps`, each kind of them once, from what should be the fastest
    on. `timed`: they are run, unless their like has been timed before, and the fastest is kept; those that have not
    come to it at `deadline` (of `time.monotonic`) are not. Raises CompileError, OutOfMemory."""
    found = _tunables(steps, target.context, most)
    untimed = [key for key in found if timed and key not in target.choices]
    loaded = set[str]()
    for key, one in found.items():
        times: Sequence[float | None] = [None] * len(one.candidates)
        if key in untimed and time.monotonic() < deadline:
            if key not in loaded:
                loaded |= _load(target, found, untimed[untimed.index(key) :][:_LOADED_TOGETHER])
            with target.lock, target.device.errors(), target.device.current():
                measured, fastest = _decided(target, one)
            target.keep_choices({key: one.choice(fastest, measured[fastest])})
            times = measured
        chosen = one.chosen(target.context)
        for i, (candidate, us) in enumerate(zip(one.candidates, times, strict=True)):
            yield TileTrial(one.step.name, key, candidate.text, candidate.estimate_us, candidate.bound, us, i == chosen)


def _tunables(steps: Iterable[Step], context: Context, most: int) -> dict[str, Tunable]:
    """What there is to choose among steps, by its key."""
    found = dict[str, Tunable]()
    for step in steps:
        one = tunable(step, context, most)
        if one is not None:
            found.setdefault(one.key, one)
    return found


def _rows(one: Tunable, context: Context) -> list[list[Launch]]:
    """The launches of every candidate."""
    return [one.launches(i, context) for i in range(len(one.candidates))]


def _load(target: CudaTarget, found: Mapping[str, Tunable], keys: Sequence[str]) -> set[str]:
    """Compile and load, in parallel, what some steps could run in."""
    rows = [row for key in keys for row in _rows(found[key], target.context)]
    target.device.load(launch.kernel for row in rows for launch in row)
    return set(keys)


def _decided(target: CudaTarget, one: Tunable) -> tuple[list[float], int]:
    """Microseconds of the candidates, and which of them to take: the cost model's own, the first, unless another one
    beats it by more than noise once more, in longer rounds of the two alone. Short rounds of many mislead where what
    ran before decides the clock."""
    rows = _rows(one, target.context)
    measured = timed_launches(target, one.step, rows)
    for i in sorted(range(1, len(rows)), key=measured.__getitem__)[:_CHALLENGERS]:
        if measured[i] >= _GAIN * measured[0]:
            break
        own, other = timed_launches(target, one.step, [rows[0], rows[i]], _FINAL_ROUNDS, _FINAL_SECONDS)
        if other < _GAIN * own:
            return measured, i
    return measured, 0


def timed_launches(
    target: CudaTarget,
    step: Step,
    rows: Sequence[list[Launch]],
    rounds: int = _ROUNDS,
    round_seconds: float = _ROUND_SECONDS,
) -> list[float]:
    """Microseconds of each row of launches, whose kernels are loaded: the median of rounds that take turns."""
    count = min(_MOST_SETS, max(1, ceildiv(_ROTATE_BYTES, max(1, step.cost.bytes))))
    memory = _Memory(count)
    stream = cupy.cuda.Stream(non_blocking=True)
    graphs = [_captured(target, row, memory, stream) for row in rows]
    cupy.cuda.get_current_stream().synchronize()  # on which the operands were written
    repeats = [max(1, int(round_seconds / max(_seconds(graph, stream, 2) / 2, 1e-7))) for graph in graphs]
    times = [
        [_seconds(graph, stream, repeat) / repeat / count for graph, repeat in zip(graphs, repeats, strict=True)]
        for _ in range(rounds)
    ]
    return [median(one) * 1e6 for one in zip(*times, strict=True)]


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
