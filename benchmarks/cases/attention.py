"""Attention in fp16: long sequences, full, causal and in windows; short ones with a padding mask; sequences of
different lengths that lie one after the other; and few queries over many keys, as of a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import numpy as np

from benchmarks.cases.lengths import CORPUS_OF, corpora


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


@dataclass(frozen=True)
class WindowCase:
    """As an `AttentionCase`; a query sees itself and the `window` − 1 keys before it."""

    batch: int
    heads: int
    sequence: int
    head: int
    window: int
    suite: ClassVar[str] = "windows"

    @property
    def name(self) -> str:
        return f"b{self.batch} h{self.heads} s{self.sequence} d{self.head} window {self.window}"


@dataclass(frozen=True)
class VarlenCase:
    """Sequences that lie one after the other, none longer than `longest`, which attend to themselves. q, k and v lie as
    one projection of all three writes them, [tokens, 3, heads, head]."""

    batch: int
    heads: int
    longest: int
    head: int
    causal: bool = False
    suite: ClassVar[str] = "varlen"

    @property
    def name(self) -> str:
        return f"b{self.batch} h{self.heads} s{self.longest} d{self.head} {'causal' if self.causal else 'full'}"

    @property
    def lengths(self) -> np.ndarray:
        """int64 [batch], in random order: those of a corpus; beyond 512 tokens the stories', so many times as long."""
        width = self.longest if self.longest in CORPUS_OF else max(CORPUS_OF)
        drawn = corpora()[CORPUS_OF[width]].batch(self.batch, width) * (self.longest // width)
        return np.random.default_rng(self.batch + self.longest).permutation(drawn)


@dataclass(frozen=True)
class DecodeCase:
    """q is [batch, heads, queries, head], k and v are [batch, kv_heads, keys, head]; every query sees all keys."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head: int
    suite: ClassVar[str] = "decode"

    @property
    def name(self) -> str:
        heads = f"h{self.heads}" if self.heads == self.kv_heads else f"h{self.heads}/{self.kv_heads}"
        return f"b{self.batch} {heads} q{self.queries} k{self.keys} d{self.head}"


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
WINDOW_CASES = tuple(
    WindowCase(_TOKENS // sequence, heads, sequence, head, window)
    for heads, head in ((32, 64), (16, 128))
    for sequence in (4096, 16384)
    for window in (512, 1024)
)
VARLEN_CASES = (
    *(VarlenCase(batch, 12, longest, 64) for longest in (128, 512) for batch in (32, 128)),  # BERT-base
    *(VarlenCase(batch, 12, longest, 32) for longest in (128, 512) for batch in (32, 128)),  # all-MiniLM-L6-v2
    *(VarlenCase(batch, 12, longest, 64, True) for batch, longest in ((128, 128), (32, 512), (16, 1024))),  # GPT-2
    *(VarlenCase(16, 16, 2048, 64, causal) for causal in (False, True)),
    *(
        VarlenCase(batch, 16, longest, 128, causal)
        for causal in (False, True)
        for batch, longest in ((32, 512), (16, 2048), (8, 4096))
    ),
)
DECODE_CASES = tuple(
    DecodeCase(batch, 32, kv_heads, queries, keys, head)
    for kv_heads, head in ((8, 128), (32, 64))
    for batch in (1, 8, 32)
    for queries in (1, 4, 16)
    for keys in (2048, 8192, 32768)
)
