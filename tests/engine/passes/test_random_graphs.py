"""Random small graphs of fusible operators keep their meaning under the whole pipeline, and after every single pass."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from engine.passes import PASSES, Traits
from tests.engine import ir_interpreter
from tests.engine.passes.toolkit import check, close, load, model

UNARY = ("Relu", "Sigmoid", "Tanh", "Abs", "Neg", "Exp", "Erf", "Identity", "HardSwish", "Softplus")
BINARY = ("Add", "Sub", "Mul", "Max", "Min")


class Writer:
    """Writes a random model as ONNX text, keeping track of the values there are and of their shapes."""

    def __init__(self, seed: int, image: bool) -> None:
        self.random = np.random.default_rng([seed, image])
        self.image = image
        self.shape = (2, 4, 6, 6) if image else (2, 5, 8)
        self.values: list[tuple[str, tuple[int, ...]]] = [("x", self.shape), ("z", self.shape)]
        self.lines: list[str] = []
        self.weights: dict[str, np.ndarray] = {}

    def pick(self) -> tuple[str, tuple[int, ...]]:
        # Late values more often: chains, not only fans.
        values = [pair for pair in self.values if len(pair[1]) >= 2]
        weights = np.arange(1, len(values) + 1) ** 2.0
        return values[int(self.random.choice(len(values), p=weights / weights.sum()))]

    def weight(self, *shape: int, scale: float = 0.5) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = self.random.standard_normal(shape) * scale
        return name

    def integers(self, *numbers: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.array(numbers)
        return name

    def emit(self, expression: str, shape: tuple[int, ...]) -> None:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        self.values.append((name, shape))

    def step(self) -> None:
        choices = [self.unary, self.binary, self.constant, self.same, self.view, self.norm, self.reduction]
        choices.append(self.product)
        if self.image:
            choices += [self.convolution, self.convolution, self.batch_norm, self.pool]
        else:
            choices += [self.product, self.attention, self.softmax]
        choices[int(self.random.integers(len(choices)))]()

    def unary(self) -> None:
        value, shape = self.pick()
        kind = UNARY[int(self.random.integers(len(UNARY)))]
        # Without bounds, a few exponentials in a row leave nothing to compare.
        self.emit(f"Tanh({value})" if kind == "Exp" and self.random.random() < 0.5 else f"{kind}({value})", shape)

    def binary(self) -> None:
        a, shape = self.pick()
        b, other = self.pick()
        if _broadcast(shape, other):
            kind = BINARY[int(self.random.integers(len(BINARY)))]
            self.emit(f"{kind}({a}, {b})", tuple(np.broadcast_shapes(shape, other)))

    def constant(self) -> None:
        value, shape = self.pick()
        kind = BINARY[int(self.random.integers(len(BINARY)))]
        form = int(self.random.integers(4))
        sizes = [(), (shape[-1],), (shape[1], *[1] * (len(shape) - 2)), shape][form]
        self.emit(f"{kind}({value}, {self.weight(*sizes)})", shape)

    def same(self) -> None:
        value, shape = self.pick()
        self.emit(f"Add({value}, {value})", shape)

    def view(self) -> None:
        value, shape = self.pick()
        form = int(self.random.integers(4))
        if form == 0:
            perm = [int(axis) for axis in self.random.permutation(len(shape))]
            self.emit(f"Transpose<perm={perm}>({value})", tuple(shape[axis] for axis in perm))
        elif form == 1:
            target = (shape[0], int(np.prod(shape[1:])))
            self.emit(f"Reshape({value}, {self.integers(*target)})", target)
        elif form == 2 and int(np.prod(shape)) == int(np.prod(self.shape)):
            self.emit(f"Reshape({value}, {self.integers(*self.shape)})", self.shape)
        elif form == 3 and shape[-1] > 1:
            cut = (*shape[:-1], shape[-1] - 1)
            ranges = ", ".join(self.integers(n) for n in (1, shape[-1], len(shape) - 1))
            self.emit(f"Slice({value}, {ranges})", cut)

    def norm(self) -> None:
        value, shape = self.pick()
        last = shape[-1]
        self.emit(f"LayerNormalization({value}, {self.weight(last)}, {self.weight(last)})", shape)

    def reduction(self) -> None:
        value, shape = self.pick()
        keep = int(self.random.integers(2))
        kind = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2")[int(self.random.integers(4))]
        result = (*shape[:-1], 1) if keep else shape[:-1]
        self.emit(f"{kind}<keepdims={keep}>({value}, {self.integers(len(shape) - 1)})", result)

    def product(self) -> None:
        value, shape = self.pick()
        columns = int(self.random.choice([shape[-1], 3]))
        self.emit(f"MatMul({value}, {self.weight(shape[-1], columns)})", (*shape[:-1], columns))

    def softmax(self) -> None:
        value, shape = self.pick()
        self.emit(f"Softmax<axis={int(self.random.integers(len(shape)))}>({value})", shape)

    def attention(self) -> None:
        value, shape = self.pick()
        if len(shape) != 3:
            return
        swapped = (shape[0], shape[2], shape[1])
        self.emit(f"Transpose<perm=[0,2,1]>({value})", swapped)
        keys = self.values[-1][0]
        self.emit(f"MatMul({value}, {keys})", (shape[0], shape[1], shape[1]))
        self.emit(f"Mul({self.values[-1][0]}, {self.weight()})", (shape[0], shape[1], shape[1]))
        self.emit(f"Softmax({self.values[-1][0]})", (shape[0], shape[1], shape[1]))
        self.emit(f"MatMul({self.values[-1][0]}, {value})", shape)

    def convolution(self) -> None:
        value, shape = self.pick()
        if len(shape) != 4 or min(shape[2:]) < 3:
            return
        channels, pad = int(self.random.choice([shape[1], 4])), int(self.random.integers(2))
        bias = f", {self.weight(channels)}" if self.random.random() < 0.5 else ""
        size = tuple(n - 2 + 2 * pad for n in shape[2:])
        kernel = self.weight(channels, shape[1], 3, 3, scale=0.2)
        self.emit(f"Conv<pads={[pad] * 4}>({value}, {kernel}{bias})", (shape[0], channels, *size))

    def batch_norm(self) -> None:
        value, shape = self.pick()
        parts = [self.weight(shape[1]) for _ in range(3)]
        variance = self.weight(shape[1])
        self.weights[variance] = self.weights[variance] ** 2 + 0.5
        self.emit(f"BatchNormalization({value}, {', '.join(parts)}, {variance})", shape)

    def pool(self) -> None:
        value, shape = self.pick()
        if len(shape) == 4 and min(shape[2:]) >= 2:
            kind = ("MaxPool", "AveragePool", "GlobalAveragePool")[int(self.random.integers(3))]
            if kind == "GlobalAveragePool":
                self.emit(f"{kind}({value})", (*shape[:2], 1, 1))
            else:
                self.emit(f"{kind}<kernel_shape=[2,2]>({value})", (*shape[:2], shape[2] - 1, shape[3] - 1))

    def model(self, steps: int) -> onnx.ModelProto:
        while len(self.lines) < steps:
            self.step()
        # The last value, and some in the middle, are outputs.
        names = dict(self.values[-1:]) | {n: s for n, s in self.values[2:-1] if self.random.random() < 0.1}
        dims = ",".join(map(str, self.shape))
        outputs = ", ".join(f"double[{','.join(map(str, shape))}] {name}" for name, shape in names.items())
        return model(f"(double[{dims}] x, double[{dims}] z) => ({outputs}) {{ {' '.join(self.lines)} }}", self.weights)


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(1 in (x, y) or x == y for x, y in zip(a[::-1], b[::-1], strict=False))


def feeds(writer: Writer) -> dict[str, np.ndarray]:
    return {name: writer.random.standard_normal(writer.shape) for name in ("x", "z")}


# Attributes such as epsilon are fp32 in the file, and onnx.reference computes some operators in fp32.
TOLERANCE = 1e-5


@pytest.mark.parametrize("image", [False, True], ids=["tokens", "images"])
@pytest.mark.parametrize("seed", range(60))
def test_a_random_graph_keeps_its_meaning(seed: int, image: bool) -> None:
    writer = Writer(seed, image)
    check(writer.model(14), feeds(writer), tolerance=TOLERANCE)


@pytest.mark.parametrize("image", [False, True], ids=["tokens", "images"])
@pytest.mark.parametrize("seed", range(100, 110))
def test_every_pass_keeps_the_meaning(seed: int, image: bool) -> None:
    writer = Writer(seed, image)
    proto = writer.model(20)
    inputs = feeds(writer)
    graph = load(proto)
    with np.errstate(all="ignore"):
        expected = ir_interpreter.run(graph, inputs)
        for rewrite in PASSES:
            rewrite(graph, Traits())
            graph.validate()
            for name, array in ir_interpreter.run(graph, inputs).items():
                close(array, expected[name], 1e-9, f"{name} after {rewrite.__name__}")
