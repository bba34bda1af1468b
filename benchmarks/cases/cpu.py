"""Single layers in fp32 at batch 1: matrix products and convolutions with bias and an activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class LayerCase:
    """A product of m rows, or a convolution of an image of `m` × `m` positions with a kernel of `kernel` × `kernel`.

    The activation is a clamp to 0 … 6, or GELU.
    """

    m: int
    k: int
    n: int
    kernel: int = 0
    groups: int = 1
    gelu: bool = False
    suite: ClassVar[str] = "layers"

    @property
    def name(self) -> str:
        if not self.kernel:
            return f"gemm {self.m}x{self.k}x{self.n}{' gelu' if self.gelu else ''}"
        kind = "depthwise" if self.groups > 1 else "conv"
        return f"{kind} {self.kernel}x{self.kernel} {self.m}x{self.m}x{self.k}->{self.n}"

    @property
    def input(self) -> list[int]:
        return [1, self.k, self.m, self.m] if self.kernel else [self.m, self.k]

    @property
    def output(self) -> list[int]:
        return [1, self.n, self.m, self.m] if self.kernel else [self.m, self.n]


CASES = (
    LayerCase(12544, 32, 16), LayerCase(12544, 16, 96), LayerCase(3136, 96, 24), LayerCase(784, 144, 40),
    LayerCase(196, 480, 80), LayerCase(196, 672, 112), LayerCase(49, 1152, 320), LayerCase(1, 1280, 1000),
    LayerCase(64, 384, 384), LayerCase(64, 1536, 384), LayerCase(64, 384, 1536, gelu=True),
    LayerCase(512, 384, 1536, gelu=True), LayerCase(512, 3072, 768), LayerCase(1, 4096, 4096),
    LayerCase(56, 64, 64, 3), LayerCase(28, 128, 128, 3), LayerCase(14, 256, 256, 3), LayerCase(7, 512, 512, 3),
    LayerCase(112, 3, 32, 3), LayerCase(112, 32, 32, 3, 32), LayerCase(28, 240, 240, 5, 240),
    LayerCase(14, 672, 672, 5, 672),
)  # fmt: skip
