"""Inverted residuals of fp16 images in NHWC with biases and ReLU6 fused: the distinct ones of MobileNetV2 and
EfficientNet-lite0 that conv_block.cuh has tiles for (tests/benchmarks/test_block_cases.py derives them from the
graphs)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from benchmarks.cases.conv import BATCHES


@dataclass(frozen=True)
class BlockCase:
    """A 1×1 convolution to `expanded` channels, a depthwise one of `kernel` pixels a side, and a 1×1 convolution to
    `outputs` channels, to which the image is added where it is as large."""

    batch: int
    channels: int
    expanded: int
    outputs: int
    size: int
    kernel: int = 3
    stride: int = 1
    suite: ClassVar[str] = "block"

    @property
    def name(self) -> str:
        channels = f"{self.channels}->{self.expanded}->{self.outputs}@{self.size}"
        residual = " residual" if self.has_residual else ""
        return f"b{self.batch} {channels} {self.kernel}x{self.kernel}/{self.stride}{residual}"

    @property
    def has_residual(self) -> bool:
        return self.channels == self.outputs and self.stride == 1


_LAYERS = (
    BlockCase(1, 16, 96, 24, 112, 3, 2), BlockCase(1, 24, 144, 24, 56), BlockCase(1, 24, 144, 32, 56, 3, 2),
    BlockCase(1, 32, 192, 32, 28), BlockCase(1, 32, 192, 64, 28, 3, 2), BlockCase(1, 64, 384, 64, 14),
    BlockCase(1, 64, 384, 96, 14), BlockCase(1, 96, 576, 96, 14), BlockCase(1, 96, 576, 160, 14, 3, 2),
    BlockCase(1, 160, 960, 160, 7),
    BlockCase(1, 24, 144, 40, 56, 5, 2), BlockCase(1, 40, 240, 40, 28, 5), BlockCase(1, 40, 240, 80, 28, 3, 2),
    BlockCase(1, 80, 480, 80, 14), BlockCase(1, 80, 480, 112, 14, 5), BlockCase(1, 112, 672, 112, 14, 5),
    BlockCase(1, 112, 672, 192, 14, 5, 2),
)  # fmt: skip

CASES = tuple(replace(layer, batch=batch) for batch in BATCHES for layer in _LAYERS)
