"""Layers of convolutional networks, as PyTorch's exporter spells them; weights by torchvision's names.

Batch normalisation has two forms: the node with its running statistics, and, while these are being found
(`statistics`), the formula over the batch itself, whose means and variances become outputs of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.models.weights import RandomWeights
from models.onnx_writer import GraphWriter

EPSILON = 1e-5


@dataclass(frozen=True)
class Map:
    """A feature map: the value's name and its channels."""

    value: str
    channels: int


class Layers:
    """Adds layers to one graph. `statistics` names, for each mean and variance, the value that holds it."""

    def __init__(self, writer: GraphWriter, weights: RandomWeights, find_statistics: bool = False) -> None:
        self.writer = writer
        self.weights = weights
        self.statistics: dict[str, str] | None = {} if find_statistics else None

    def weight(self, name: str, *shape: int, factor: float = 1.0, offset: float = 0.0) -> str:
        return self.writer.weight(name, self.weights.take(name, *shape, factor=factor, offset=offset))

    def node(self, op: str, inputs: list[str], scope: str = "", **attributes: object) -> str:
        return self.writer.node(op, inputs, scope, **attributes)

    def constant(self, value: object, dtype: type[np.generic] = np.float32) -> str:
        return self.writer.constant("", np.array(value, dtype))

    def conv(
        self,
        x: Map,
        name: str,
        channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        bias: float | None = None,
    ) -> Map:
        """Convolution with padding (kernel − 1) / 2; with a bias where its mean is given."""
        inputs = [x.value, self.weight(f"{name}.weight", channels, x.channels // groups, kernel, kernel)]
        if bias is not None:
            inputs.append(self.weight(f"{name}.bias", channels, offset=bias))
        pad = (kernel - 1) // 2
        value = self.node(
            "Conv", inputs, name, dilations=[1, 1], group=groups, kernel_shape=[kernel] * 2, pads=[pad] * 4,
            strides=[stride] * 2,
        )  # fmt: skip
        return Map(value, channels)

    def batch_norm(self, x: Map, name: str, factor: float = 1.0, offset: float = 0.0) -> Map:
        """`factor` and `offset`: of the scale and of the shift, beside what is drawn."""
        scale = self.weight(f"{name}.weight", x.channels, factor=factor)
        shift = self.weight(f"{name}.bias", x.channels, offset=offset)
        if self.statistics is None:
            mean, variance = (self.weight(f"{name}.{field}", x.channels) for field in ("running_mean", "running_var"))
            inputs = [x.value, scale, shift, mean, variance]
            return Map(self.node("BatchNormalization", inputs, name, epsilon=EPSILON), x.channels)
        column = self.constant([-1, 1, 1], np.int64)
        mean = self.node("ReduceMean", [x.value], name, axes=[0, 2, 3])
        centred = self.node("Sub", [x.value, mean], name)
        variance = self.node("ReduceMean", [self.node("Mul", [centred, centred], name)], name, axes=[0, 2, 3])
        self.statistics |= {f"{name}.running_mean": mean, f"{name}.running_var": variance}
        deviation = self.node("Sqrt", [self.node("Add", [variance, self.constant(EPSILON)], name)], name)
        value = self.node("Div", [centred, deviation], name)
        value = self.node("Mul", [value, self.node("Reshape", [scale, column], name)], name)
        return Map(self.node("Add", [value, self.node("Reshape", [shift, column], name)], name), x.channels)

    def relu(self, x: Map) -> Map:
        return Map(self.node("Relu", [x.value]), x.channels)

    def relu6(self, x: Map) -> Map:
        return Map(self.node("Clip", [x.value, self.constant(0.0), self.constant(6.0)]), x.channels)

    def sigmoid(self, x: Map) -> Map:
        return Map(self.node("Sigmoid", [x.value]), x.channels)

    def silu(self, x: Map) -> Map:
        return self.multiply(x, self.sigmoid(x))

    def add(self, a: Map, b: Map) -> Map:
        return Map(self.node("Add", [a.value, b.value]), a.channels)

    def multiply(self, a: Map, b: Map) -> Map:
        return Map(self.node("Mul", [a.value, b.value]), a.channels)

    def max_pool(self, x: Map, kernel: int, stride: int, pad: int = 0) -> Map:
        value = self.node("MaxPool", [x.value], kernel_shape=[kernel] * 2, pads=[pad] * 4, strides=[stride] * 2)
        return Map(value, x.channels)

    def average(self, x: Map) -> Map:
        """Global average: [n, c, 1, 1]."""
        return Map(self.node("GlobalAveragePool", [x.value]), x.channels)

    def flatten(self, x: Map, pixels: int = 1) -> Map:
        return Map(self.node("Flatten", [x.value], axis=1), x.channels * pixels)

    def linear(self, x: Map, name: str, outputs: int, bias_mean: float = 0.0) -> Map:
        weight = self.weight(f"{name}.weight", outputs, x.channels)
        bias = self.weight(f"{name}.bias", outputs, offset=bias_mean)
        return Map(self.node("Gemm", [x.value, weight, bias], name, alpha=1.0, beta=1.0, transB=1), outputs)
