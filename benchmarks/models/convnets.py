"""ResNet-50, VGG-16, MobileNetV2 and EfficientNet-B0 as torchvision has them: [n, 3, 224, 224] → [n, 1000].

Papers: He et al. 2015 (the stride in the 3×3 convolution, as torchvision), Simonyan & Zisserman 2014, Sandler et al.
2018, Tan & Le 2019.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.models.layers import Layers, Map

CLASSES = 1000

# Random weights behave as trained ones do only with these. Each ReLU of zero-mean values followed by a normalisation
# takes the mean away and leaves the rounding errors, which so grow 1.2-fold a layer: in fp16 to 1.8e-2 at the end of
# MobileNetV2. With most values positive, and small residual branches (the scales that training finds), they come out at
# 1e-3, as in trained networks. VGG, which normalises nothing, keeps the size of its values with POSITIVE biases.
ACTIVE = 1.0  # mean of the shifts before a ReLU, in standard deviations of what it gets
POSITIVE = 0.5
RESIDUAL = 0.25  # factor of the scales at the end of a residual branch


def resnet50(net: Layers, x: Map) -> Map:
    x = net.relu(net.batch_norm(net.conv(x, "conv1", 64, 7, 2), "bn1", offset=ACTIVE))
    x = net.max_pool(x, 3, 2, 1)
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            x = _bottleneck(net, x, f"layer{stage}.{block}", width, 2 if stage > 1 and block == 0 else 1, block == 0)
    return net.linear(net.flatten(net.average(x)), "fc", CLASSES)


def _bottleneck(net: Layers, x: Map, name: str, width: int, stride: int, project: bool) -> Map:
    y = net.relu(net.batch_norm(net.conv(x, f"{name}.conv1", width, 1), f"{name}.bn1", offset=ACTIVE))
    y = net.relu(net.batch_norm(net.conv(y, f"{name}.conv2", width, 3, stride), f"{name}.bn2", offset=ACTIVE))
    y = net.batch_norm(net.conv(y, f"{name}.conv3", 4 * width, 1), f"{name}.bn3", factor=RESIDUAL)
    if project:
        x = net.conv(x, f"{name}.downsample.0", 4 * width, 1, stride)
        x = net.batch_norm(x, f"{name}.downsample.1", offset=ACTIVE)
    return net.relu(net.add(y, x))


def vgg16(net: Layers, x: Map) -> Map:
    index = 0
    for repeats, channels in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(repeats):
            x = net.relu(net.conv(x, f"features.{index}", channels, 3, bias=POSITIVE))
            index += 2
        x = net.max_pool(x, 2, 2)
        index += 1
    x = net.flatten(x, 7 * 7)
    for layer in (0, 3):
        x = net.relu(net.linear(x, f"classifier.{layer}", 4096, POSITIVE))
    return net.linear(x, "classifier.6", CLASSES)


def mobilenet_v2(net: Layers, x: Map) -> Map:
    x = net.relu6(_normed(net, x, "features.0", 32, 3, 2))
    index = 1
    for expansion, channels, repeats, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for repeat in range(repeats):
            x = _inverted_residual(net, x, f"features.{index}.conv", expansion, channels, stride if repeat == 0 else 1)
            index += 1
    x = net.relu6(_normed(net, x, f"features.{index}", 1280, 1))
    return net.linear(net.flatten(net.average(x)), "classifier.1", CLASSES)


def _inverted_residual(net: Layers, x: Map, name: str, expansion: int, channels: int, stride: int) -> Map:
    hidden, index = x, 0
    if expansion > 1:
        hidden, index = net.relu6(_normed(net, x, f"{name}.0", x.channels * expansion, 1)), 1
    hidden = net.relu6(_normed(net, hidden, f"{name}.{index}", hidden.channels, 3, stride, hidden.channels))
    is_residual = stride == 1 and x.channels == channels
    y = net.conv(hidden, f"{name}.{index + 1}", channels, 1)
    y = net.batch_norm(y, f"{name}.{index + 2}", factor=RESIDUAL if is_residual else 1.0)
    return net.add(x, y) if is_residual else y


def _normed(net: Layers, x: Map, name: str, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> Map:
    """torchvision's Conv2dNormActivation without its activation."""
    return net.batch_norm(net.conv(x, f"{name}.0", channels, kernel, stride, groups), f"{name}.1", offset=ACTIVE)


def efficientnet_b0(net: Layers, x: Map) -> Map:
    x = net.silu(_normed(net, x, "features.0", 32, 3, 2))
    for stage, (expansion, kernel, stride, channels, repeats) in enumerate(
        (
            (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3),
            (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
        ), start=1,
    ):  # fmt: skip
        for repeat in range(repeats):
            name = f"features.{stage}.{repeat}.block"
            x = _mobile_block(net, x, name, expansion, kernel, stride if repeat == 0 else 1, channels)
    x = net.silu(_normed(net, x, "features.8", 1280, 1))
    return net.linear(net.flatten(net.average(x)), "classifier.1", CLASSES)


def _mobile_block(net: Layers, x: Map, name: str, expansion: int, kernel: int, stride: int, channels: int) -> Map:
    """Expand, depthwise, squeeze-and-excite (to a quarter of the block's input channels), project."""
    hidden, index = x, 0
    if expansion > 1:
        hidden, index = net.silu(_normed(net, x, f"{name}.0", x.channels * expansion, 1)), 1
    hidden = net.silu(_normed(net, hidden, f"{name}.{index}", hidden.channels, kernel, stride, hidden.channels))
    squeeze = net.conv(net.average(hidden), f"{name}.{index + 1}.fc1", x.channels // 4, 1, bias=0.0)
    excite = net.conv(net.silu(squeeze), f"{name}.{index + 1}.fc2", hidden.channels, 1, bias=0.0)
    hidden = net.multiply(net.sigmoid(excite), hidden)
    is_residual = stride == 1 and x.channels == channels
    y = net.conv(hidden, f"{name}.{index + 2}.0", channels, 1)
    y = net.batch_norm(y, f"{name}.{index + 2}.1", factor=RESIDUAL if is_residual else 1.0)
    return net.add(y, x) if is_residual else y


CONVNETS: dict[str, Callable[[Layers, Map], Map]] = {
    "resnet50": resnet50,
    "vgg16": vgg16,
    "mobilenet_v2": mobilenet_v2,
    "efficientnet_b0": efficientnet_b0,
}
