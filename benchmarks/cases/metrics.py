"""What the kernel metrics of a GPU cost, and how right they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from benchmarks.cases.models import BERT, RESNET, ModelCase

LEAST_RATIO = 0.99
"""Throughput with stamps over throughput without."""
BANDS = {"over 10 µs": (10.0, float("inf"), 0.05), "3 to 10 µs": (3.0, 10.0, 0.15)}
"""Kernels by their time in µs, from and to, and how far a stamp may be from it, relative."""


@dataclass(frozen=True)
class MetricsCase:
    """A model at some sizes."""

    of: ModelCase
    suite: ClassVar[str] = "metrics"

    @property
    def name(self) -> str:
        return self.of.name


CASES = tuple(
    MetricsCase(case)
    for case in (ModelCase(RESNET, 1), ModelCase(RESNET, 128), ModelCase(BERT, 1, 128), ModelCase(BERT, 128, 128))
)
