"""What attention over one very long sequence takes of a GPU's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

BOUND = 2e-3
"""Relative L2 distance of the sampled queries' results from float64."""


@dataclass(frozen=True)
class MemoryCase:
    """A model of one attention, fp16, q, k and v [1, heads, tokens, head]."""

    heads: int
    tokens: int
    head: int
    suite: ClassVar[str] = "memory"

    @property
    def name(self) -> str:
        return f"b1 h{self.heads} s{self.tokens} d{self.head}"

    @property
    def tensors_bytes(self) -> int:
        """Of q, k, v and the result."""
        return 4 * self.heads * self.tokens * self.head * 2

    @property
    def scores_bytes(self) -> int:
        """Of the scores of all heads in fp16, were they kept."""
        return self.heads * self.tokens**2 * 2


CASES = (MemoryCase(16, 32 * 1024, 128),)
