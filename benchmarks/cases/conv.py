"""Convolutions of fp16 images in NHWC with bias and what follows fused: every distinct layer of ResNet-50, VGG-16,
MobileNetV2 and EfficientNet-B0 as the passes leave them (tests/benchmarks/test_conv_cases.py derives them from the
graphs), the convolutions that other libraries were measured with before there was an engine, and a few more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar


class Tail(Enum):
    """What follows the convolution and its bias."""

    LINEAR = "linear"
    RELU = "relu"
    RELU6 = "relu6"
    SILU = "silu"
    SIGMOID = "sigmoid"
    RESIDUAL = "residual"
    RESIDUAL_RELU = "residual relu"

    @property
    def has_residual(self) -> bool:
        return self in (Tail.RESIDUAL, Tail.RESIDUAL_RELU)


class Group(Enum):
    """Kinds of convolution that are summed up apart."""

    STEM = "stem"
    SPATIAL = "3×3"
    POINTWISE = "1×1"
    GATE = "1×1 of one pixel"
    POOLED = "with the max pool behind it"
    DEPTHWISE = "depthwise"


@dataclass(frozen=True)
class ConvCase:
    """A square image of `size` pixels a side, "same" padding, but none where kernel and stride are equal. `groups`
    above 1: depthwise.

    With `fp32_image` the image is a model's input: fp32 in NCHW, rounded to fp16 as part of the work. `pool`: pixels a
    side of the windows of a max pool behind it, two apart: 2, or 3 with padding of one pixel; 0 where there is none.
    """

    batch: int
    channels: int
    outputs: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1
    tail: Tail = Tail.RELU
    fp32_image: bool = False
    pool: int = 0
    suite: ClassVar[str] = "conv"

    @property
    def name(self) -> str:
        kind = " depthwise" if self.groups > 1 else ""
        image = " fp32 image" if self.fp32_image else ""
        shape = f"{self.channels}->{self.outputs}@{self.size} {self.kernel}x{self.kernel}/{self.stride}"
        pool = f" max pool {self.pool}x{self.pool}" if self.pool else ""
        return f"b{self.batch} {shape}{kind} {self.tail.value}{image}{pool}"

    @property
    def pad(self) -> int:
        return 0 if self.kernel == self.stride else self.kernel // 2

    @property
    def output_size(self) -> int:
        """Pixels a side of the convolution's result."""
        return (self.size + 2 * self.pad - self.kernel) // self.stride + 1

    @property
    def group(self) -> Group:
        """Stems are those of images, three channels deep; gates those of squeeze-and-excite."""
        if self.pool:
            return Group.POOLED
        if self.channels == 3:
            return Group.STEM
        if self.groups > 1:
            return Group.DEPTHWISE
        if self.kernel > 1:
            return Group.SPATIAL
        return Group.POINTWISE if self.size > 1 else Group.GATE


BATCHES = (1, 32, 128)


def _layer(
    channels: int, outputs: int, size: int, kernel: int, stride: int = 1, tail: Tail = Tail.RELU, fp32: bool = False
) -> ConvCase:
    return ConvCase(1, channels, outputs, size, kernel, stride, 1, tail, fp32)


def _depthwise(channels: int, size: int, kernel: int, stride: int, tail: Tail) -> ConvCase:
    return ConvCase(1, channels, channels, size, kernel, stride, channels, tail)


def _resnet() -> Iterator[ConvCase]:
    yield _layer(3, 64, 224, 7, 2, fp32=True)
    # The two layers that read the first pool, and the one that the passes merge them into: some of its columns have a
    # ReLU, as if all had.
    yield _layer(64, 64, 56, 1)
    yield _layer(64, 256, 56, 1, tail=Tail.LINEAR)
    yield _layer(64, 320, 56, 1)
    for width, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        yield _layer(4 * width, width, size, 1)
        yield _layer(width, width, size, 3)
        yield _layer(width, 4 * width, size, 1, tail=Tail.RESIDUAL_RELU)
    for width, size in ((128, 56), (256, 28), (512, 14)):  # the first block of a stage
        yield _layer(2 * width, width, size, 1)
        yield _layer(width, width, size, 3, 2)
        yield _layer(width, 4 * width, size // 2, 1, tail=Tail.LINEAR)
        yield _layer(2 * width, 4 * width, size, 1, 2, Tail.RESIDUAL_RELU)


def _vgg() -> Iterator[ConvCase]:
    yield _layer(3, 64, 224, 3, fp32=True)
    for channels, outputs, size in (
        (64, 64, 224), (64, 128, 112), (128, 128, 112), (128, 256, 56), (256, 256, 56), (256, 512, 28), (512, 512, 28),
        (512, 512, 14),
    ):  # fmt: skip
        yield _layer(channels, outputs, size, 3)


def _block(
    channels: int, outputs: int, size: int, kernel: int, stride: int, tail: Tail, residual: bool
) -> Iterator[ConvCase]:
    """An inverted residual: expanded sixfold, depthwise, projected."""
    hidden = 6 * channels
    yield _layer(channels, hidden, size, 1, tail=tail)
    yield _depthwise(hidden, size, kernel, stride, tail)
    yield _layer(hidden, outputs, size // stride, 1, tail=Tail.RESIDUAL if residual else Tail.LINEAR)


def _gates(channels: int, squeezed: int) -> Iterator[ConvCase]:
    """Squeeze-and-excite on pooled channels."""
    yield _layer(channels, squeezed, 1, 1, tail=Tail.SILU)
    yield _layer(squeezed, channels, 1, 1, tail=Tail.SIGMOID)


def _mobilenet() -> Iterator[ConvCase]:
    yield _layer(3, 32, 224, 3, 2, Tail.RELU6, fp32=True)
    yield _depthwise(32, 112, 3, 1, Tail.RELU6)
    yield _layer(32, 16, 112, 1, tail=Tail.LINEAR)
    for channels, outputs, size, stride, repeated in (
        (16, 24, 112, 2, True), (24, 32, 56, 2, True), (32, 64, 28, 2, True), (64, 96, 14, 1, True),
        (96, 160, 14, 2, True), (160, 320, 7, 1, False),
    ):  # fmt: skip
        yield from _block(channels, outputs, size, 3, stride, Tail.RELU6, residual=False)
        if repeated:
            yield from _block(outputs, outputs, size // stride, 3, 1, Tail.RELU6, residual=True)
    yield _layer(320, 1280, 7, 1, tail=Tail.RELU6)


def _efficientnet() -> Iterator[ConvCase]:
    yield _layer(3, 32, 224, 3, 2, Tail.SILU, fp32=True)
    yield _depthwise(32, 112, 3, 1, Tail.SILU)
    yield from _gates(32, 8)
    yield _layer(32, 16, 112, 1, tail=Tail.LINEAR)
    for channels, outputs, size, kernel, stride, repeated in (
        (16, 24, 112, 3, 2, True), (24, 40, 56, 5, 2, True), (40, 80, 28, 3, 2, True), (80, 112, 14, 5, 1, True),
        (112, 192, 14, 5, 2, True), (192, 320, 7, 3, 1, False),
    ):  # fmt: skip
        yield from _block(channels, outputs, size, kernel, stride, Tail.SILU, residual=False)
        yield from _gates(6 * channels, channels // 4)
        if repeated:
            yield from _block(outputs, outputs, size // stride, kernel, 1, Tail.SILU, residual=True)
            yield from _gates(6 * outputs, outputs // 4)
    yield _layer(320, 1280, 7, 1, tail=Tail.SILU)


def _anchors() -> Iterator[ConvCase]:
    """What was measured of cuDNN and PyTorch before, with a ReLU each: from layers of the networks these differ in what
    follows or in the image's type."""
    yield _layer(3, 64, 224, 7, 2)
    yield _layer(64, 256, 56, 1)
    yield _layer(256, 512, 56, 1, 2)
    for channels, size, kernel in ((144, 56, 3), (240, 28, 5), (672, 14, 5)):
        yield _depthwise(channels, size, kernel, 1, Tail.RELU)


def _pooled() -> Iterator[ConvCase]:
    """The layers of ResNet-50 and VGG-16 whose results only a max pool reads."""
    yield replace(_layer(3, 64, 224, 7, 2, fp32=True), pool=3)
    for channels, size in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14)):
        yield replace(_layer(channels, channels, size, 3), pool=2)


def _others() -> Iterator[ConvCase]:
    """A residual block of two 3×3 layers (ResNet-34), a stem of an fp16 image, patches of a vision transformer."""
    yield _layer(64, 64, 56, 3, tail=Tail.RESIDUAL_RELU)
    yield _layer(3, 32, 224, 3, 2, Tail.RELU6)
    yield _layer(3, 768, 224, 16, 16, fp32=True)


NETWORKS = {
    "resnet50": tuple(_resnet()),
    "vgg16": tuple(_vgg()),
    "mobilenet_v2": tuple(dict.fromkeys(_mobilenet())),
    "efficientnet_b0": tuple(dict.fromkeys(_efficientnet())),
}
"""The distinct layers of each network at batch 1, those of ResNet-50 as they are before and after siblings merge."""

LAYERS = tuple(
    dict.fromkeys((*(layer for each in NETWORKS.values() for layer in each), *_anchors(), *_others(), *_pooled()))
)
CASES = tuple(replace(layer, batch=batch) for batch in BATCHES for layer in LAYERS)
