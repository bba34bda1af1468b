"""Attention in fp16: long sequences, full and causal, and short ones with a padding mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar


class Mask(Enum):
    """Which keys a query sees. PADDING: an fp16 tensor [batch, 1, 1, sequence] of 0 and −65504, lengths ragged."""

    NONE = "full"
    CAUSAL = "causal"
    PADDING = "padding"


@dataclass(frozen=True)
class AttentionCase:
    """q, k and v are [batch, heads, sequence, head]."""

    batch: int
    heads: int
    sequence: int
    head: int
    mask: Mask
    suite: ClassVar[str] = "attention"

    @property
    def name(self) -> str:
        return f"b{self.batch} h{self.heads} s{self.sequence} d{self.head} {self.mask.value}"


_TOKENS = 16384  # of a batch of long sequences
_LONG = (128, 512, 1024, 2048, 4096, 8192, 16384)
_PADDED = (  # all-MiniLM-L6-v2, then BERT-base
    (1, 128, 32), (32, 128, 32), (32, 256, 32),
    (1, 128, 64), (32, 128, 64), (32, 384, 64), (8, 512, 64),
)  # fmt: skip


def _cases() -> Iterator[AttentionCase]:
    for heads, head in ((32, 64), (16, 128)):
        for mask in (Mask.NONE, Mask.CAUSAL):
            for sequence in _LONG:
                yield AttentionCase(_TOKENS // sequence, heads, sequence, head, mask)
    for batch, sequence, head in _PADDED:
        yield AttentionCase(batch, 12, sequence, head, Mask.PADDING)


CASES = tuple(_cases())
