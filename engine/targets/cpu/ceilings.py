"""What this machine can do at most, measured: FLOP/s from registers, bytes/s of memory and of the caches. The ceilings
of the roofline.

Measured once per machine and number of threads (about 0.3 s), as the best of rounds with pauses between them, and kept
beside the compiled kernels. A machine that is busy meanwhile shows less than it can do: what was measured on one is
used where nothing better is known, kept nowhere, and measured anew for the next model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import ClassVar

from engine.cache_folder import cache_folder
from engine.ir.dtype import DType
from engine.plan.tensor import Buffer, BufferKind
from engine.targets.cpu.codegen.emit import Value, vector_type
from engine.targets.cpu.codegen.isa import Isa
from engine.targets.cpu.kernel import KernelBuilder, KernelSpec, Launch, Pointer, launch
from engine.targets.cpu.runtime import Program, address, aligned_bytes, available_cores, pool

_SUMS = 12  # in flight at once: more than latency times rate of any processor we know
_TURNS = 1_000_000  # milliseconds: a processor that was idle takes one to raise its clock
_MEMORY_BYTES = 64 << 20  # beyond the caches of most machines
_CACHED_BYTES = 64 << 10  # a task's two together leave the first level and stay in the second
_CACHED_TURNS = 100
_STREAMS = 8  # loads in flight
_ROUNDS, _PAUSE_S = 6, 0.03
# A calm machine repeats itself within some percent, and has had no more to do than half of what it could.
_CALM_SPREAD, _CALM_LOAD = 0.1, 0.5


@dataclass(frozen=True)
class Ceilings:
    """`flops`: fp32 FLOP/s. `bytes`, `cached_bytes`: bytes read plus bytes written per second in memory and in the
    caches, copying or only reading, whichever is more.

    `load`: runnable processes per core, over the last minute, when this was measured; `spread`: by how much a usual
    round took longer than the best.
    """

    flops: float
    bytes: float
    cached_bytes: float
    load: float
    spread: float

    @property
    def calm(self) -> bool:
        """Whether the machine had time for this."""
        return self.load <= _CALM_LOAD and self.spread <= _CALM_SPREAD

    def or_better(self, other: Ceilings) -> Ceilings:
        """The higher ceilings of both: nothing shows more than there is."""
        return Ceilings(
            max(self.flops, other.flops),
            max(self.bytes, other.bytes),
            max(self.cached_bytes, other.cached_bytes),
            self.load,
            self.spread,
        )


@dataclass(frozen=True)
class MultiplyAddSpec(KernelSpec):
    """Multiply-adds that never leave the registers. Writes one vector so that they are not for nothing."""

    family: ClassVar[str] = "ceiling_flops"

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("out", "turns")

    def emit(self, kernel: KernelBuilder) -> None:
        type_ = vector_type("float", self.isa.lanes)
        a, b = kernel.const(1.0, type_), kernel.const(1e-9, type_)
        factor = kernel.splat(kernel.load("float", kernel.pointer("out"), 4), self.isa.lanes)

        def turn(_: Value, sums: list[Value]) -> list[Value]:
            return [kernel.fma(factor, b, value) for value in sums]

        total, *others = kernel.loop(0, kernel.integer("turns"), 1, turn, [a] * _SUMS)
        for value in others:
            total = kernel.binary("fadd", total, value)
        kernel.store(total, kernel.scratch, 4)


@dataclass(frozen=True)
class StreamSpec(KernelSpec):
    """Reads `bytes` per task, `turns` times, and writes them elsewhere where it is a `copy`."""

    family: ClassVar[str] = "ceiling_bytes"
    copy: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("source", "target", "bytes", "turns")

    def emit(self, kernel: KernelBuilder) -> None:
        size, width = kernel.integer("bytes"), self.isa.vector_bytes
        source = kernel.offset(kernel.pointer("source"), kernel.mul(kernel.task, size))
        target = kernel.offset(kernel.pointer("target"), kernel.mul(kernel.task, size))

        def step(i: Value, sums: list[Value]) -> list[Value]:
            places = [kernel.add(i, number * width) for number in range(_STREAMS)]
            values = [kernel.load_elements(DType.F32, self.isa.lanes, kernel.offset(source, at)) for at in places]
            if self.copy:
                for at, value in zip(places, values, strict=True):
                    kernel.store_elements(DType.F32, value, kernel.offset(target, at))
                return sums
            return [kernel.binary("fadd", total, value) for total, value in zip(sums, values, strict=True)]

        def turn(_: Value, sums: list[Value]) -> list[Value]:
            return kernel.loop(0, size, _STREAMS * width, step, sums)

        zero = kernel.const(0.0, vector_type("float", self.isa.lanes))
        total, *others = kernel.loop(0, kernel.integer("turns"), 1, turn, [zero] * _STREAMS)
        for value in others:
            total = kernel.binary("fadd", total, value)
        kernel.store(total, kernel.scratch, 4)


_best: dict[tuple[Isa, int], Ceilings] = {}
"""What this process knows: a cache."""


def ceilings(isa: Isa, threads: int) -> Ceilings:
    """The ceilings of this machine for so many threads: known, from the cache on disk, or measured now."""
    known = _best.get((isa, threads))
    if known is not None and known.calm:
        return known
    machine = f"{platform.node()} {processor_name()} {isa!r} {threads}"
    folder = cache_folder("cpu")
    path = folder and folder / f"ceilings-{hashlib.sha256(machine.encode()).hexdigest()[:20]}.json"
    found = _read(path) if path else None
    if found is None:
        found = _measure(isa, threads)
        if known is not None:
            found = found.or_better(known)
        if found.calm and path:
            with contextlib.suppress(OSError):
                _write(path, json.dumps(asdict(found)))
    _best[isa, threads] = found
    return found


def _read(path: Path) -> Ceilings | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(path.read_text())
        found = Ceilings(**{name: float(stored[name]) for name in Ceilings.__dataclass_fields__})
        return found if found.calm else None
    return None


def _measure(isa: Isa, threads: int) -> Ceilings:
    load = os.getloadavg()[0] / available_cores()  # before we add to it
    tasks = 4 * threads
    memory = aligned_bytes(2 * max(_MEMORY_BYTES, tasks * _CACHED_BYTES))
    memory[:] = 0
    buffer = Buffer("ceiling", BufferKind.PLAN, memory.nbytes, memory)
    unit = _STREAMS * isa.vector_bytes

    def stream(copy: bool, total: int, turns: int) -> tuple[Launch, float]:
        share = total // tasks // unit * unit
        ends = {"source": Pointer(buffer), "target": Pointer(buffer, memory.nbytes // 2)}
        work = launch(StreamSpec(isa, copy), {**ends, "bytes": share, "turns": turns}, tasks, isa.vector_bytes)
        return work, float((1 + copy) * share * tasks * turns)

    flops = launch(MultiplyAddSpec(isa), {"out": Pointer(buffer), "turns": _TURNS}, tasks, isa.vector_bytes)
    works = [
        (flops, 2.0 * isa.lanes * _SUMS * _TURNS * tasks),
        *(stream(copy, _MEMORY_BYTES, 1) for copy in (True, False)),
        *(stream(copy, tasks * _CACHED_BYTES, _CACHED_TURNS) for copy in (True, False)),
    ]
    programs = [_program(work, threads) for work, _ in works]
    for program in programs:  # wakes the threads, brings code and pages in
        pool().run(program)
    rounds = []
    for number in range(_ROUNDS):
        time.sleep(_PAUSE_S if number else 0.0)
        rounds.append([_seconds(program) for program in programs])
    times = list(zip(*rounds, strict=True))
    rate = [amount / min(seconds) for (_, amount), seconds in zip(works, times, strict=True)]
    spread = max(median(seconds) / min(seconds) - 1 for seconds in times[:2])
    return Ceilings(rate[0], max(rate[1:3]), max(rate[3:]), load, spread)


def _program(work: Launch, threads: int) -> Program:
    program = Program([[work]], threads)
    program.prepare()
    for slot, pointer in zip(program.pointer_slots, program.pointers, strict=True):
        assert pointer.buffer.data is not None
        program.slots[slot] = address(pointer.buffer.data) + pointer.offset
    return program


def _seconds(program: Program) -> float:
    start = time.perf_counter()
    pool().run(program)
    return time.perf_counter() - start


def processor_name() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{time.monotonic_ns()}")
    temporary.write_text(text)
    temporary.replace(path)
