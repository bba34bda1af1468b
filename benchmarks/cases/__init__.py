"""The committed lists of what is measured. A row is named by its suite and its case; a full table has all of them.

Plain data: importing this needs neither a GPU nor PyTorch. `gpu/` and `cpu/` know how to run each type of case.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from benchmarks.cases import (
    accuracy,
    attention,
    block,
    conv,
    cpu,
    exports,
    gemm,
    light,
    memory,
    metrics,
    models,
    packed,
    ready,
)


class Case(Protocol):
    """Anything that can be a row."""

    @property
    def suite(self) -> str: ...
    @property
    def name(self) -> str: ...


AnyCase = TypeVar("AnyCase", bound=Case)

AnyAttention = attention.AttentionCase | attention.WindowCase | attention.DecodeCase
AnyProduct = gemm.GemmCase | gemm.Fp8Case | gemm.MatricesCase
KernelCase = AnyProduct | conv.ConvCase | block.BlockCase | AnyAttention | attention.VarlenCase | light.LightCase

KERNELS: Mapping[str, Sequence[KernelCase]] = {
    "gemm": gemm.CASES,
    "random": gemm.RANDOM_CASES,
    "fp8": gemm.FP8_CASES,
    "matrices": gemm.MATRICES_CASES,
    "conv": conv.CASES,
    "block": block.CASES,
    "attention": attention.CASES,
    "windows": attention.WINDOW_CASES,
    "varlen": attention.VARLEN_CASES,
    "decode": attention.DECODE_CASES,
    "light": light.CASES,
}
GPU_MODELS: Sequence[models.ModelCase] = models.GPU_CASES
PACKED: Sequence[packed.PackedCase] = packed.CASES
ACCURACY: Sequence[accuracy.AccuracyCase] = accuracy.CASES
MEMORY: Sequence[memory.MemoryCase] = memory.CASES
METRICS: Sequence[metrics.MetricsCase] = metrics.CASES
CPU_MODELS: Sequence[models.ModelCase] = models.CPU_CASES
CPU_LAYERS: Sequence[cpu.LayerCase] = cpu.CASES

GPU: Mapping[str, Sequence[Case]] = {
    "models": GPU_MODELS,
    "packed": PACKED,
    "accuracy": ACCURACY,
    "memory": MEMORY,
    "ready": ready.GPU_CASES,
    "metrics": METRICS,
    **KERNELS,
}
CPU: Mapping[str, Sequence[Case]] = {
    "models": CPU_MODELS,
    "layers": CPU_LAYERS,
    "ready": ready.CPU_CASES,
    "exports": exports.CASES,
}


def suites_of(stem: str) -> Mapping[str, Sequence[Case]]:
    """The suites that a results file of this name should have, in the order of the tables."""
    return CPU if stem.startswith("cpu-") else GPU


def select(cases: Iterable[AnyCase], substrings: Sequence[str], part: tuple[int, int] = (1, 1)) -> list[AnyCase]:
    """The cases whose name contains one of `substrings` (all, where there are none); of these every `part[1]`-th,
    beginning with number `part[0]` (from 1)."""
    named = [case for case in cases if not substrings or any(substring in case.name for substring in substrings)]
    number, parts = part
    return named[number - 1 :: parts]


def part_of(text: str) -> tuple[int, int]:
    """``2/3`` as (2, 3). Raises ValueError."""
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ValueError(f"{text!r} is not a part such as 1/3")
    return int(number), int(parts)
