"""Matrix products of fp16 activations [m, k] with fp16 weights, and what rides in their epilogue; the same of fp8; and
products of activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import exp, log
from random import Random
from typing import ClassVar


class Epilogue(Enum):
    """What is done to the accumulator before it is stored."""

    NONE = ""
    BIAS = "bias"
    BIAS_GELU = "bias gelu"
    BIAS_RESIDUAL = "bias residual"


@dataclass(frozen=True)
class GemmCase:
    m: int
    n: int
    k: int
    epilogue: Epilogue = Epilogue.NONE
    suite: ClassVar[str] = "gemm"

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n}x{self.k} {self.epilogue.value}".strip()


@dataclass(frozen=True)
class RandomGemmCase(GemmCase):
    """A shape that nobody chose: no constant of a cost model was fitted to it."""

    suite: ClassVar[str] = "random"


@dataclass(frozen=True)
class Fp8Case:
    """Activations and weights of e4m3 with a scale for all, to fp16; the epilogue's operands are fp16."""

    m: int
    n: int
    k: int
    epilogue: Epilogue = Epilogue.NONE
    suite: ClassVar[str] = "fp8"

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n}x{self.k} {self.epilogue.value}".strip()

    @property
    def scale(self) -> float:
        """Of the sums: it brings them to the size of 1."""
        return float(self.k**-0.5)


@dataclass(frozen=True)
class MatricesCase:
    """Products of so many pairs of computed matrices [m, k] and [k, n], columns innermost in both."""

    batch: int
    m: int
    n: int
    k: int
    suite: ClassVar[str] = "matrices"

    @property
    def name(self) -> str:
        return f"{self.batch} of {self.m}x{self.n}x{self.k}"


_SQUARES = (8192, 4096, 2048, 1024)
_TOKENS = (128, 512, 4096, 16384)  # through BERT-base and ViT-B
_MINILM = (  # the layers of all-MiniLM-L6-v2 at 64 and 4,096 tokens
    (64, 1152, 384), (64, 384, 1536),
    (4096, 1152, 384), (4096, 384, 384), (4096, 1536, 384), (4096, 384, 1536),
)  # fmt: skip
_CLASSIFIERS = (  # few rows, wide weights: classifier heads and decoding
    (1, 1000, 2048), (8, 1000, 2048), (128, 1000, 2048), (1, 4096, 4096), (16, 4096, 4096), (128, 4096, 25088),
    (16, 50257, 768),
)  # fmt: skip
_POINTWISE_CONVOLUTIONS = (  # of ResNet-50 at batch 32, one row for each pixel
    (100352, 256, 64), (100352, 64, 256), (25088, 512, 128), (25088, 128, 512), (6272, 1024, 256), (6272, 256, 1024),
    (1568, 2048, 512), (1568, 512, 2048),
)  # fmt: skip


def _cases() -> Iterator[GemmCase]:
    for size in _SQUARES:
        yield GemmCase(size, size, size)
    yield GemmCase(4096, 4096, 4096, Epilogue.BIAS)
    yield GemmCase(4096, 4096, 4096, Epilogue.BIAS_GELU)
    for m in _TOKENS:
        for n, k in ((2304, 768), (768, 768), (3072, 768), (768, 3072)):
            for epilogue in (Epilogue.NONE, Epilogue.BIAS, Epilogue.BIAS_GELU):
                yield GemmCase(m, n, k, epilogue)
            if n == 768:
                yield GemmCase(m, n, k, Epilogue.BIAS_RESIDUAL)
    for m, n, k in (*_MINILM, *_CLASSIFIERS, *_POINTWISE_CONVOLUTIONS):
        yield GemmCase(m, n, k)
    yield GemmCase(4096, 1536, 384, Epilogue.BIAS_GELU)
    yield GemmCase(4096, 384, 1536, Epilogue.BIAS_RESIDUAL)
    yield GemmCase(100352, 256, 64, Epilogue.BIAS)
    yield GemmCase(25088, 512, 128, Epilogue.BIAS)


_RANDOM_SHAPES = 48
_LEAST, _MOST = (1, 8, 16), 16384  # of m, n and k
_MOST_FLOPS = 2e11  # about 0.3 ms on an H100
_BYTES = range(
    1 << 20, 1 << 28
)  # of operands and result: smaller ones would take hundreds of copies to leave the cache


def _random_cases(seed: int = 20261125) -> Iterator[RandomGemmCase]:
    """Sizes uniform in their logarithms; every third shape as it is drawn, the others in multiples of 8."""
    source, found = Random(seed), set[tuple[int, int, int]]()
    while len(found) < _RANDOM_SHAPES:
        m, n, k = (round(exp(source.uniform(log(least), log(_MOST)))) for least in _LEAST)
        if len(found) % 3:
            m, n, k = (max(8, size - size % 8) for size in (m, n, k))
        elif n % 8 == 0 and k % 8 == 0:
            continue
        if 2 * m * n * k <= _MOST_FLOPS and 2 * (m * k + k * n + m * n) in _BYTES and (m, n, k) not in found:
            found.add((m, n, k))
            yield RandomGemmCase(m, n, k)


CASES = tuple(_cases())
FP8_CASES = (
    *(Fp8Case(size, size, size) for size in _SQUARES),
    *(
        Fp8Case(m, n, k, epilogue)
        for m in (512, 4096, 16384)
        for n, k in ((2304, 768), (768, 768), (3072, 768), (768, 3072))
        for epilogue in (Epilogue.NONE, *([Epilogue.BIAS_GELU] if n == 3072 else []))
    ),
)
MATRICES_CASES = tuple(
    MatricesCase(*sizes)
    for sizes in (
        (1, 4096, 4096, 4096), (1, 2048, 2048, 2048), (1, 1024, 1024, 1024),
        (16, 1024, 1024, 1024), (64, 512, 512, 512),
        (96, 1024, 64, 1024), (96, 512, 64, 512), (384, 128, 64, 128), (12, 2048, 128, 2048),  # values by probabilities
    )
)  # fmt: skip
RANDOM_CASES = tuple(_random_cases())
