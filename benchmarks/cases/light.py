"""Operators that are bound by memory: norms, softmax, reductions, pools, point-wise chains. All in fp16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar


class Kind(Enum):
    """What is computed. Rows and columns for the first four; batch, channels and image size for the others."""

    LAYER_NORM_RESIDUAL = "layer norm residual"  # of x + r, with scale and shift
    RMS_NORM = "rms norm"
    SOFTMAX = "softmax"
    BIAS_GELU = "bias gelu"
    GLOBAL_MEAN = "global mean"
    MAX_POOL = "max pool 3x3/2"


@dataclass(frozen=True)
class LightCase:
    kind: Kind
    shape: tuple[int, ...]
    suite: ClassVar[str] = "light"

    @property
    def name(self) -> str:
        return f"{self.kind.value} {'x'.join(map(str, self.shape))}"


def _cases() -> Iterator[LightCase]:
    for rows, columns in ((4096, 384), (4096, 768), (16384, 1024)):
        yield LightCase(Kind.LAYER_NORM_RESIDUAL, (rows, columns))
    yield LightCase(Kind.RMS_NORM, (4096, 4096))
    yield LightCase(Kind.SOFTMAX, (8192, 1000))
    yield LightCase(Kind.BIAS_GELU, (16384, 3072))
    for batch in (1, 32, 128):
        yield LightCase(Kind.GLOBAL_MEAN, (batch, 1280, 7, 7))
    yield LightCase(Kind.MAX_POOL, (32, 64, 112, 112))


CASES = tuple(_cases())
