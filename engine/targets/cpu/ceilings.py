"""What this machine can do at most, measured: FLOP/s from registers and bytes/s of a copy. The roofline's two ceilings.

Measured once per machine and number of threads (some 0.1 s) and kept beside the compiled kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from engine.cache_folder import cache_folder
from engine.ir.dtype import DType
from engine.plan.tensor import Buffer, BufferKind
from engine.targets.cpu.codegen.emit import Value, vector_type
from engine.targets.cpu.codegen.isa import Isa
from engine.targets.cpu.kernel import KernelBuilder, KernelSpec, Launch, Pointer, launch
from engine.targets.cpu.runtime import Program, address, aligned_bytes, pool

_SUMS = 12  # in flight at once: more than latency times rate of any processor we know
_TURNS = 20_000
_COPY_BYTES = 64 << 20  # beyond the caches of most machines
_REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """`flops`: fp32 FLOP/s. `bytes`: bytes read plus bytes written per second of a copy."""

    flops: float
    bytes: float


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
class CopySpec(KernelSpec):
    """Copies `bytes` per task."""

    family: ClassVar[str] = "ceiling_bytes"

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("source", "target", "bytes")

    def emit(self, kernel: KernelBuilder) -> None:
        size = kernel.integer("bytes")
        source = kernel.offset(kernel.pointer("source"), kernel.mul(kernel.task, size))
        target = kernel.offset(kernel.pointer("target"), kernel.mul(kernel.task, size))
        width = self.isa.vector_bytes

        def step(i: Value, _: list[Value]) -> None:
            value = kernel.load_elements(DType.F32, self.isa.lanes, kernel.offset(source, i))
            kernel.store_elements(DType.F32, value, kernel.offset(target, i))

        kernel.loop(0, size, width, step)


@cache
def ceilings(isa: Isa, threads: int) -> Ceilings:
    """The ceilings of this machine for so many threads: from the cache on disk, or measured now."""
    machine = f"{platform.node()} {processor_name()} {isa!r} {threads}"
    folder = cache_folder("cpu")
    if folder is None:
        return _measure(isa, threads)
    path = folder / f"ceilings-{hashlib.sha256(machine.encode()).hexdigest()[:20]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(path.read_text())
        return Ceilings(float(stored["flops"]), float(stored["bytes"]))
    measured = _measure(isa, threads)
    with contextlib.suppress(OSError):
        _write(path, json.dumps(asdict(measured)))
    return measured


def _measure(isa: Isa, threads: int) -> Ceilings:
    memory = aligned_bytes(2 * _COPY_BYTES)
    memory[:] = 0
    buffer = Buffer("ceiling", BufferKind.PLAN, memory.nbytes, memory)
    tasks = 4 * threads
    flops = launch(MultiplyAddSpec(isa), {"out": Pointer(buffer), "turns": _TURNS}, tasks, isa.vector_bytes)
    share = _COPY_BYTES // tasks // 64 * 64
    copy = launch(
        CopySpec(isa), {"source": Pointer(buffer), "target": Pointer(buffer, _COPY_BYTES), "bytes": share}, tasks
    )
    return Ceilings(
        2 * isa.lanes * _SUMS * _TURNS * tasks / _seconds(flops, threads),
        2 * share * tasks / _seconds(copy, threads),
    )


def _seconds(work: Launch, threads: int) -> float:
    """The best of a few runs."""
    program = Program([[work]], threads)
    program.prepare()
    for slot, pointer in zip(program.pointer_slots, program.pointers, strict=True):
        assert pointer.buffer.data is not None
        program.slots[slot] = address(pointer.buffer.data) + pointer.offset
    workers, times = pool(), []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        workers.run(program)
        times.append(time.perf_counter() - start)
    return min(times)


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
