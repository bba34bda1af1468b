"""The default models at the sizes they are measured at, and the random inputs of each."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

EFFICIENTNET = "efficientnet-lite0"
MINILM = "all-minilm-l6-v2"
_IMAGE = (3, 224, 224)
_VOCABULARY = 30522


@dataclass(frozen=True)
class ModelCase:
    """A model of the repository. `sequence` is 0 where the model takes images."""

    model: str
    batch: int
    sequence: int = 0
    suite: ClassVar[str] = "models"

    @property
    def name(self) -> str:
        return " ".join([self.model, *(f"{symbol}={size}" for symbol, size in self.sizes.items())])

    @property
    def sizes(self) -> dict[str, int]:
        """The symbols of the model's input shapes."""
        return {"batch": self.batch, **({"sequence": self.sequence} if self.sequence else {})}

    def feeds(self) -> dict[str, np.ndarray]:
        """Random inputs, the same whenever asked: normally distributed pixels, or token ids of sentence pairs whose
        lengths differ, from half of `sequence` to all of it."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        if not self.sequence:
            return {"input": rng.standard_normal((self.batch, *_IMAGE), dtype=np.float32)}
        shape = (self.batch, self.sequence)
        lengths = rng.integers(max(1, self.sequence // 2), self.sequence + 1, (self.batch, 1))
        positions = np.arange(self.sequence)[None]
        return {
            "input_ids": rng.integers(0, _VOCABULARY, shape),
            "attention_mask": (positions < lengths).astype(np.int64),
            "token_type_ids": ((positions >= lengths // 2) & (positions < lengths)).astype(np.int64),
        }


GPU_CASES = (
    *(ModelCase(EFFICIENTNET, batch) for batch in (1, 7, 32, 128)),
    *(
        ModelCase(MINILM, batch, sequence)
        for batch, sequence in ((1, 16), (1, 128), (7, 33), (32, 128), (128, 128), (4, 256))
    ),
)
CPU_CASES = (
    *(ModelCase(EFFICIENTNET, batch) for batch in (1, 8)),
    *(ModelCase(MINILM, batch, sequence) for batch, sequence in ((1, 64), (8, 64), (1, 16), (1, 128), (1, 256))),
)
