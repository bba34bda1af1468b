"""The models at the sizes they are measured at, and the inputs of each: the default models of the repository, and the
architectures that `benchmarks.models` builds."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

EFFICIENTNET = "efficientnet-lite0"
MINILM = "all-minilm-l6-v2"
DEFAULTS = (EFFICIENTNET, MINILM)

RESNET, VGG, MOBILENET, EFFICIENTNET_B0 = "resnet50", "vgg16", "mobilenet_v2", "efficientnet_b0"
VIT, BERT, GPT2 = "vit_b_16", "bert_base", "gpt2"
VISION = (RESNET, VGG, MOBILENET, EFFICIENTNET_B0, VIT)
ARCHITECTURES = (*VISION, BERT, GPT2)

_IMAGE = (3, 224, 224)
_NOISE = 0.1  # standard deviation of what makes the rows of one photo differ; photos have one of about 1
_WORDPIECES, _BYTE_PAIRS = 30522, 50257  # the vocabularies of BERT and of GPT-2


@dataclass(frozen=True)
class ModelCase:
    """A model at some sizes. `sequence` is 0 where the model takes images."""

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
        """Inputs, the same whenever asked: normally distributed pixels, or for the architectures photos with noise;
        token ids, for BERT those of sentence pairs whose lengths differ, from half of `sequence` to all of it."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        if self.model in VISION:
            return {"input": _photos(rng, self.batch)}
        if not self.sequence:
            return {"input": rng.standard_normal((self.batch, *_IMAGE), dtype=np.float32)}
        shape = (self.batch, self.sequence)
        if self.model == GPT2:
            return {"input_ids": rng.integers(0, _BYTE_PAIRS, shape)}
        return sentence_pairs(rng, self._lengths(rng), self.sequence)

    def _lengths(self, rng: np.random.Generator) -> np.ndarray:
        """int64 [batch]: the tokens of every sentence pair."""
        return rng.integers(max(1, self.sequence // 2), self.sequence + 1, self.batch)


def sentence_pairs(rng: np.random.Generator, lengths: np.ndarray, sequence: int) -> dict[str, np.ndarray]:
    """BERT's inputs, int64 [batch, sequence]: random tokens, half of each row's `lengths` of either sentence."""
    positions, ends = np.arange(sequence)[None], lengths[:, None]
    return {
        "input_ids": rng.integers(0, _WORDPIECES, (len(lengths), sequence)),
        "attention_mask": (positions < ends).astype(np.int64),
        "token_type_ids": ((positions >= ends // 2) & (positions < ends)).astype(np.int64),
    }


def _photos(rng: np.random.Generator, batch: int) -> np.ndarray:
    """[batch, 3, 224, 224]: photos, again and again, each time with other noise."""
    from benchmarks.models.photos import photos  # which needs the packages that the photos come with

    found = photos(_IMAGE[-1])
    images = found[np.arange(batch) % len(found)]
    return images + np.float32(_NOISE) * rng.standard_normal(images.shape, dtype=np.float32)


GPU_CASES = (
    *(ModelCase(EFFICIENTNET, batch) for batch in (1, 7, 32, 128)),
    *(
        ModelCase(MINILM, batch, sequence)
        for batch, sequence in (
            (1, 16),
            (1, 64),
            (32, 64),
            (128, 64),
            (1, 128),
            (7, 33),
            (32, 128),
            (128, 128),
            (4, 256),
        )
    ),
    *(ModelCase(name, batch) for name in VISION for batch in (1, 32, 128)),
    *(ModelCase(BERT, batch, sequence) for sequence in (128, 384) for batch in (1, 32, 128)),
    *(ModelCase(GPT2, batch, 256) for batch in (1, 32, 128)),
)
CPU_CASES = (
    *(ModelCase(EFFICIENTNET, batch) for batch in (1, 8)),
    *(ModelCase(MINILM, batch, sequence) for batch, sequence in ((1, 64), (8, 64), (1, 16), (1, 128), (1, 256))),
)
