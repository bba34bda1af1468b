"""What every model has to hold against fp32 in every precision, and the memory it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from benchmarks.cases.models import ARCHITECTURES, BERT, DEFAULTS, GPT2, MINILM, ModelCase

BOUNDS: Mapping[str, float] = {"fp16": 5e-3, "bf16": 2e-2, "tf32": 1e-3, "fp32": 1e-5}
"""Relative L2 distance of the outputs from fp32, by precision."""

_TOKENS = (MINILM, BERT, GPT2)


def compared(model: str) -> tuple[ModelCase, ...]:
    """The sizes at which outputs are compared."""
    if model in _TOKENS:
        return tuple(ModelCase(model, batch, sequence) for batch in (1, 7, 32) for sequence in (17, 128, 384))
    return tuple(ModelCase(model, batch) for batch in (1, 7, 32))


def largest(model: str) -> ModelCase:
    """The sizes at which arena and activations are counted: batch 128."""
    return ModelCase(model, 128, 128 if model in _TOKENS else 0)


def buckets(model: str) -> tuple[ModelCase, ...]:
    """Eight sizes that a server would have plans for at once."""
    if model in _TOKENS:
        return tuple(ModelCase(model, 8, sequence) for sequence in (16, 32, 64, 96, 128, 192, 256, 384))
    return tuple(ModelCase(model, batch) for batch in (1, 2, 4, 8, 16, 32, 64, 128))


@dataclass(frozen=True)
class AccuracyCase:
    """A model in one precision."""

    model: str
    precision: str
    suite: ClassVar[str] = "accuracy"

    @property
    def name(self) -> str:
        return f"{self.model} {self.precision}"


CASES = tuple(AccuracyCase(model, precision) for model in (*DEFAULTS, *ARCHITECTURES) for precision in BOUNDS)
