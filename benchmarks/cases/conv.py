"""Convolutions of fp16 images in NHWC with bias and activation: layers of ResNet-50, VGG-16, EfficientNet-B0,
MobileNetV2 and ViT-B/16, every distinct depthwise one of the two networks that have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar


class Tail(Enum):
    """What follows the convolution and its bias."""

    RELU = "relu"
    RELU6 = "relu6"
    RESIDUAL_RELU = "residual relu"


@dataclass(frozen=True)
class ConvCase:
    """A square image of `size` pixels a side, "same" padding, but none where kernel and stride are equal. `groups`
    above 1: depthwise.

    With `fp32_image` the image is a model's input: fp32 in NCHW, rounded to fp16 as part of the work.
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
    suite: ClassVar[str] = "conv"

    @property
    def name(self) -> str:
        kind = " depthwise" if self.groups > 1 else ""
        image = " fp32 image" if self.fp32_image else ""
        shape = f"{self.channels}->{self.outputs}@{self.size} {self.kernel}x{self.kernel}/{self.stride}"
        return f"b{self.batch} {shape}{kind} {self.tail.value}{image}"

    @property
    def pad(self) -> int:
        return 0 if self.kernel == self.stride else self.kernel // 2


_BATCHES = (1, 32, 128)
# Channels, image size, kernel, stride.
_DEPTHWISE = (
    (32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 3, 1), (144, 56, 3, 2), (144, 56, 5, 2), (192, 28, 3, 1),
    (192, 28, 3, 2), (240, 28, 3, 2), (240, 28, 5, 1), (384, 14, 3, 1), (480, 14, 3, 1), (480, 14, 5, 1),
    (576, 14, 3, 1), (576, 14, 3, 2), (672, 14, 5, 1), (672, 14, 5, 2), (960, 7, 3, 1), (1152, 7, 3, 1),
    (1152, 7, 5, 1),
)  # fmt: skip


def _stems(batch: int) -> Iterator[ConvCase]:
    """First layers of a model's input as it comes; ResNet's and EfficientNet's are among the others."""
    yield ConvCase(batch, 3, 64, 224, 7, 2, fp32_image=True)
    yield ConvCase(batch, 3, 32, 224, 3, 2, tail=Tail.RELU6)
    yield ConvCase(batch, 3, 64, 224, 3, fp32_image=True)
    yield ConvCase(batch, 3, 768, 224, 16, 16, fp32_image=True)


def _resnet(batch: int) -> Iterator[ConvCase]:
    yield ConvCase(batch, 3, 64, 224, 7, 2)
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        yield ConvCase(batch, channels, channels, size, 3)
    yield ConvCase(batch, 128, 128, 56, 3, 2)
    yield ConvCase(batch, 64, 256, 56, 1)
    yield ConvCase(batch, 512, 128, 28, 1)
    yield ConvCase(batch, 256, 512, 56, 1, 2)
    yield ConvCase(batch, 64, 64, 56, 3, tail=Tail.RESIDUAL_RELU)
    yield ConvCase(batch, 64, 256, 56, 1, tail=Tail.RESIDUAL_RELU)


def _vgg(batch: int) -> Iterator[ConvCase]:
    for channels, size in ((64, 224), (256, 56), (512, 28)):
        yield ConvCase(batch, channels, channels, size, 3)


def _efficientnet(batch: int) -> Iterator[ConvCase]:
    yield ConvCase(batch, 3, 32, 224, 3, 2, tail=Tail.RELU6, fp32_image=True)
    for channels, outputs, size in ((16, 96, 112), (96, 24, 56), (240, 40, 28), (672, 112, 14), (1152, 320, 7)):
        yield ConvCase(batch, channels, outputs, size, 1, tail=Tail.RELU6)
    for channels, size, kernel, stride in _DEPTHWISE:
        yield ConvCase(batch, channels, channels, size, kernel, stride, channels, Tail.RELU6)


def _cases() -> Iterator[ConvCase]:
    for batch in _BATCHES:
        yield from _resnet(batch)
    yield from _vgg(32)
    for batch in _BATCHES:
        yield from _efficientnet(batch)
        yield from _stems(batch)


CASES = tuple(_cases())
