"""Encoders on batches whose lengths are those of a real corpus: half of a padded batch is padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from benchmarks.cases.lengths import CORPUS_OF, corpora
from benchmarks.cases.models import BERT, MINILM, ModelCase


@dataclass(frozen=True)
class PackedCase(ModelCase):
    """An encoder at a padded size, its lengths drawn from the corpus for that width, in random order. The longest row
    has no padding, so nothing could be padded less."""

    suite: ClassVar[str] = "packed"

    @property
    def lengths(self) -> np.ndarray:
        """int64 [batch]: the real tokens of every row, from the shortest to the longest."""
        return corpora()[CORPUS_OF[self.sequence]].batch(self.batch, self.sequence)

    def _lengths(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self.lengths)


CASES = tuple(
    PackedCase(model, batch, sequence) for model in (BERT, MINILM) for sequence in CORPUS_OF for batch in (32, 128)
)
