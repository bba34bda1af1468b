"""What the code generators know of a processor: vector width, registers, and the names LLVM has for it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache

import llvmlite.binding as llvm

from engine.errors import DeviceError

ISA_VARIABLE = "TILEWAVE_CPU_ISA"


@dataclass(frozen=True)
class Isa:
    """An instruction set. `lanes` counts float32 lanes of the widest vector, `registers` its architectural registers.

    `masked` says whether loads and stores under a mask are single instructions for every element type.
    `cpu` and `features` are what LLVM compiles for.
    """

    name: str
    architecture: str
    lanes: int
    registers: int
    fma: bool
    masked: bool
    cpu: str
    features: str

    @property
    def x86(self) -> bool:
        return self.architecture == "x86_64"

    @property
    def vector_bytes(self) -> int:
        return 4 * self.lanes

    def lanes_of(self, itemsize: int) -> int:
        """Lanes of the widest vector for elements of `itemsize` bytes."""
        return self.vector_bytes // itemsize


_AVX512 = ("avx512f", "avx512vl", "avx512bw", "avx512dq")


def initialise_llvm() -> None:
    """Make LLVM's back end for this machine available. Cheap to call again."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


@cache
def host_isas() -> dict[str, Isa]:
    """The instruction sets this machine runs, best first. The first is compiled for exactly this processor."""
    initialise_llvm()
    found: dict[str, Isa] = {}
    triple = llvm.get_process_triple()
    host, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features()
    if triple.startswith("x86_64"):
        if all(features.get(name) for name in _AVX512):
            found["avx512"] = Isa("avx512", "x86_64", 16, 32, True, True, "x86-64-v4", "")
        if features.get("avx2") and features.get("fma"):
            found["avx2"] = Isa("avx2", "x86_64", 8, 16, True, False, "x86-64-v3", "")
        found["generic"] = Isa("generic", "x86_64", 4, 16, False, False, "x86-64", "")
    elif triple.startswith(("aarch64", "arm64")):
        found["neon"] = Isa("neon", "aarch64", 4, 32, True, False, host, features.flatten())
    else:
        found["generic"] = Isa("generic", "", 4, 16, False, False, host, features.flatten())
    best = next(iter(found))
    found[best] = replace(found[best], cpu=host, features=features.flatten())
    return found


def host_isa() -> Isa:
    """The instruction set to compile for: the best of this machine, or the one that TILEWAVE_CPU_ISA names.

    Raises DeviceError for a name that this machine does not have.
    """
    isas = host_isas()
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted:
        return next(iter(isas.values()))
    if wanted not in isas:
        raise DeviceError(f"{ISA_VARIABLE}={wanted!r}: this machine has {', '.join(isas)}; name one or unset it")
    return isas[wanted]
