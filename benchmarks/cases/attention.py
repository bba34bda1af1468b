"""Attention in fp16: short and long sequences, full, causal and in windows; short ones with a padding mask, also where
it hides every key; sequences of different lengths that lie one after the other; and few queries over many keys, as of a
decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import numpy as np

from benchmarks.cases.lengths import CORPUS_OF, corpora


class Mask(Enum):
    """Which keys a query sees. PADDING: an fp16 tensor [batch, 1, 1, sequence] of 0 and −65504, lengths ragged. EMPTY:
    the same of 0 and −∞, and a quarter of the sequences has no key at all: their results are 0."""

    NONE = "full"
    CAUSAL = "causal"
    PADDING = "padding"
    EMPTY = "padding, a quarter empty"

    @property
    def is_tensor(self) -> bool:
        """Whether it is an operand, not the operator's own."""
        return self in (Mask.PADDING, Mask.EMPTY)


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
        """int64 [batch], in random order: those of the corpus whose rows are as wide, or of the next wider one (of the
        widest, where there is none), each in proportion."""
        width = min((width for width in CORPUS_OF if width >= self.longest), default=max(CORPUS_OF))
        drawn = -(-corpora()[CORPUS_OF[width]].batch(self.batch, width) * self.longest // width)
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
_LONG = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_PADDED = (  # all-MiniLM-L6-v2, then BERT-base
    (1, 128, 32), (32, 64, 32), (32, 128, 32), (32, 256, 32),
    (1, 128, 64), (32, 64, 64), (32, 128, 64), (32, 256, 64), (32, 384, 64), (8, 512, 64),
)  # fmt: skip
_EMPTY = ((32, 128), (32, 384))

_FLASH3_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
_FLASH3 = {
    (64, Mask.NONE): (333, 392, 460, 476, 496, 497),
    (64, Mask.CAUSAL): (197, 265, 371, 420, 460, 473),
    (128, Mask.NONE): (467, 565, 625, 638, 646, 648),
    (128, Mask.CAUSAL): (292, 423, 521, 579, 602, 616),
}
FLASH3_TFLOPS: Mapping[str, int] = {
    AttentionCase(_TOKENS // sequence, 2048 // head, sequence, head, mask).name: reached
    for (head, mask), figures in _FLASH3.items()
    for sequence, reached in zip(_FLASH3_LENGTHS, figures, strict=True)
}
"""What FlashAttention-3 reaches on an H100 SXM, by the name of our case: its authors' figures (Shah et al. 2024,
forward in fp16), which were not measured here. 4 · sequence² · head FLOPs a head, half of them where causal."""


def _cases() -> Iterator[AttentionCase]:
    for heads, head in ((32, 64), (16, 128)):
        for mask in (Mask.NONE, Mask.CAUSAL):
            for sequence in _LONG:
                yield AttentionCase(_TOKENS // sequence, heads, sequence, head, mask)
    for batch, sequence, head in _PADDED:
        yield AttentionCase(batch, 12, sequence, head, Mask.PADDING)
    for batch, sequence in _EMPTY:
        yield AttentionCase(batch, 12, sequence, 64, Mask.EMPTY)


CASES = tuple(_cases())
WINDOW_CASES = tuple(
    WindowCase(_TOKENS // sequence, heads, sequence, head, window)
    for heads, head in ((32, 64), (16, 128))
    for sequence in (4096, 16384)
    for window in (512, 1024)
)
VARLEN_CASES = (
    *(VarlenCase(batch, 12, longest, 64) for longest in (64, 128, 256, 512) for batch in (32, 128)),  # BERT-base
    *(VarlenCase(batch, 12, longest, 32) for longest in (64, 128, 256, 512) for batch in (32, 128)),  # all-MiniLM-L6-v2
    *(VarlenCase(batch, 12, longest, 64, True) for batch, longest in ((128, 128), (32, 512), (16, 1024))),  # GPT-2
    *(VarlenCase(16, 16, 2048, 64, causal) for causal in (False, True)),
    *(
        VarlenCase(batch, 16, longest, 128, causal)
        for causal in (False, True)
        for batch, longest in ((128, 64), (32, 256), (32, 512), (16, 2048), (8, 4096))
    ),
)
DECODE_CASES = tuple(
    DecodeCase(batch, 32, kv_heads, queries, keys, head)
    for kv_heads, head in ((8, 128), (32, 64))
    for batch in (1, 8, 32)
    for queries in (1, 4, 16)
    for keys in (2048, 8192, 32768)
)
