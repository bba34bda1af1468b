"""EfficientNet-Lite0 as an ONNX graph, from the weights of a PyTorch checkpoint. Called through ``catalog``.

Architecture: ``efficientnet_lite_builder.py`` of the TensorFlow TPU models (EfficientNet without squeeze-and-
excitation, ReLU6 for swish, stem and head not scaled). The weights come from TensorFlow, so the padding is its
``SAME``: where the total is odd, the extra row and column are at the bottom and right.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from models.errors import FormatError
from models.onnx_writer import GraphWriter
from models.weights import Weights

IMAGE_SIZE = 224
CLASSES = 1000
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
BATCH_NORM_EPSILON = 1e-3
"""TensorFlow's value for EfficientNet; PyTorch's default differs."""


@dataclass(frozen=True)
class Stage:
    """A run of inverted-bottleneck blocks; only the first has the stride and the change of channels."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(blocks=1, kernel=3, stride=1, expansion=1, channels=16),
    Stage(blocks=2, kernel=3, stride=2, expansion=6, channels=24),
    Stage(blocks=2, kernel=5, stride=2, expansion=6, channels=40),
    Stage(blocks=3, kernel=3, stride=2, expansion=6, channels=80),
    Stage(blocks=3, kernel=5, stride=1, expansion=6, channels=112),
    Stage(blocks=4, kernel=5, stride=2, expansion=6, channels=192),
    Stage(blocks=1, kernel=3, stride=1, expansion=6, channels=320),
)


@dataclass(frozen=True)
class _Map:
    """A feature map inside the graph: the value's name, channels, and height = width."""

    value: str
    channels: int
    size: int


def build_graph(tensors: dict[str, npt.NDArray[Any]]) -> onnx.ModelProto:
    """Return the model: ``input`` float32 [batch, 3, 224, 224] → ``logits`` float32 [batch, 1000].

    Raises:
        FormatError: a tensor is missing, unknown, or of the wrong shape.
    """
    weights = Weights(tensors)
    writer = GraphWriter("efficientnet-lite0")
    network = _Network(writer, weights)

    x = network.conv(_Map("input", 3, IMAGE_SIZE), "_conv_stem", "_bn0", STEM_CHANNELS, kernel=3, stride=2)
    index = 0
    for stage in STAGES:
        for repeat in range(stage.blocks):
            x = network.block(x, f"_blocks.{index}", stage, stage.stride if repeat == 0 else 1)
            index += 1
    x = network.conv(x, "_conv_head", "_bn1", HEAD_CHANNELS, kernel=1)

    pooled = writer.node("GlobalAveragePool", [x.value], "/_avg_pooling")
    flat = writer.node("Flatten", [pooled], "", axis=1)
    fc_weight = writer.weight("_fc.weight", weights.take("_fc.weight", CLASSES, HEAD_CHANNELS))
    fc_bias = writer.weight("_fc.bias", weights.take("_fc.bias", CLASSES))
    logits = writer.node("Gemm", [flat, fc_weight, fc_bias], "/_fc", alpha=1.0, beta=1.0, transB=1)
    writer.result(logits, "logits")
    weights.expect_left("num_batches_tracked")
    return writer.model(
        {"input": (TensorProto.FLOAT, ("batch", 3, IMAGE_SIZE, IMAGE_SIZE))}, {"logits": ("batch", CLASSES)}
    )


def read_labels(content: bytes) -> str:
    """Turn the ``{"0": "tench, Tinca tinca", …}`` of the labels package into one label a line.

    Raises:
        FormatError: it is not a mapping of the 1,000 class numbers to one-line strings.
    """
    try:
        names = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the class names are not JSON: {error}") from error
    if not isinstance(names, dict) or set(names) != {str(index) for index in range(CLASSES)}:
        raise FormatError(f"the class names are not a mapping of the numbers 0 to {CLASSES - 1}")
    labels = [names[str(index)] for index in range(CLASSES)]
    if not all(isinstance(label, str) and label.strip() and label.isprintable() for label in labels):
        raise FormatError("a class name is not one line of text")
    return "".join(f"{label}\n" for label in labels)


class _Network:
    """Adds layers to one graph."""

    def __init__(self, writer: GraphWriter, weights: Weights) -> None:
        self._writer = writer
        self._weights = weights

    def block(self, x: _Map, scope: str, stage: Stage, stride: int) -> _Map:
        """Expand (1×1), depthwise, project (1×1, no activation), and the residual where shapes allow it."""
        hidden = x
        norms = iter(("_bn0", "_bn1", "_bn2") if stage.expansion > 1 else ("_bn1", "_bn2"))
        if stage.expansion > 1:
            hidden = self.conv(x, f"{scope}._expand_conv", f"{scope}.{next(norms)}", x.channels * stage.expansion)
        hidden = self.conv(
            hidden,
            f"{scope}._depthwise_conv",
            f"{scope}.{next(norms)}",
            hidden.channels,
            kernel=stage.kernel,
            stride=stride,
            depthwise=True,
        )
        out = self.conv(hidden, f"{scope}._project_conv", f"{scope}.{next(norms)}", stage.channels, activation=False)
        if stride == 1 and x.channels == out.channels:
            total = self._writer.node("Add", [out.value, x.value], _scope(scope))
            return _Map(total, out.channels, out.size)
        return out

    def conv(
        self,
        x: _Map,
        name: str,
        norm: str,
        channels: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
        activation: bool = True,
    ) -> _Map:
        """Convolution with SAME padding and no bias, batch normalisation, and ReLU6 if ``activation``."""
        writer = self._writer
        before, after, size = same_padding(x.size, kernel, stride)
        weight = self._weights.take(f"{name}.weight", channels, 1 if depthwise else x.channels, kernel, kernel)
        value = writer.node(
            "Conv",
            [x.value, writer.weight(f"{name}.weight", weight)],
            _scope(name),
            dilations=[1, 1],
            group=channels if depthwise else 1,
            kernel_shape=[kernel, kernel],
            pads=[before, before, after, after],
            strides=[stride, stride],
        )
        parameters = [
            writer.weight(f"{norm}.{field}", self._weights.take(f"{norm}.{field}", channels))
            for field in ("weight", "bias", "running_mean", "running_var")
        ]
        value = writer.node("BatchNormalization", [value, *parameters], _scope(norm), epsilon=BATCH_NORM_EPSILON)
        if activation:
            low = writer.constant(_scope(norm), np.array(0.0, np.float32))
            high = writer.constant(_scope(norm), np.array(6.0, np.float32))
            value = writer.node("Clip", [value, low, high], _scope(norm))
        return _Map(value, channels, size)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int, int]:
    """TensorFlow's SAME: (padding before, padding after, output size) of one spatial axis."""
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2, out


def _scope(name: str) -> str:
    return "/" + name.replace(".", "/")
