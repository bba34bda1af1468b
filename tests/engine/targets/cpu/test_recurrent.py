"""Recurrent networks against the interpreter in float64: cells, directions, sizes around the vector width, strides."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import engine
from engine.ir.dtype import DType
from engine.ir.graph import Value, make_node
from engine.ir.ops import Cell, Opaque, Recurrent
from tests.engine import ir_interpreter
from tests.engine.targets.cpu.steps import ISAS, Layout, place, run_step

TOLERANCE = 2e-6  # absolute; states are at most about 1, and every step rounds once more
SIZES = [(1, 1, 1, 1), (5, 2, 3, 20), (7, 2, 9, 16), (3, 1, 1, 33), (4, 2, 2, 64), (0, 1, 2, 8)]


def operands(cell: Cell, steps: int, directions: int, batch: int, hidden: int) -> list[np.ndarray]:
    rng = np.random.default_rng(hidden)
    shapes = [
        (steps, directions, batch, cell.gates * hidden), (directions, cell.gates * hidden, hidden),
        (directions, batch, hidden), (directions, batch, hidden), (directions, hidden),
    ]  # fmt: skip
    x, r, h, c, b = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    r /= np.float32(np.sqrt(hidden))
    return [x, r, h, *([c] if cell is Cell.LSTM else [b] if cell is Cell.GRU else [])]


def expected(op: Recurrent, inputs: list[np.ndarray]) -> list[np.ndarray]:
    values = [Value(str(i), DType.F32, array.shape) for i, array in enumerate(inputs)]
    return ir_interpreter.run_node(make_node(op, values, "test"), inputs, {})


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cell", Cell)
@pytest.mark.parametrize("size", SIZES)
def test_recurrent_matches_float64(size: tuple[int, int, int, int], cell: Cell, isa: str) -> None:
    inputs = operands(cell, *size)
    op = Recurrent(cell, reversed=size[1] - 1)
    x = place(inputs[0], Layout((0, 2, 1, 3), gap=3))
    layouts = [Layout((0, 2, 1, 3)), Layout(gap=5), Layout()][: 3 if cell is Cell.LSTM else 2]
    result = run_step(op, [x, *inputs[1:]], isa, layouts)
    for got, want in zip(result.outputs, expected(op, inputs), strict=True):
        np.testing.assert_allclose(got, want, atol=TOLERANCE * max(1, size[0]), rtol=0)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_onnx_recurrent_networks_have_kernels(kind: str, direction: str) -> None:
    """A whole model, with a symbolic batch and sequence, against onnx.reference; nothing runs on the host."""
    rng = np.random.default_rng(1)
    directions, hidden, features = 1 + (direction == "bidirectional"), 10, 6
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    weights = {
        "w": rng.standard_normal((directions, gates * hidden, features)),
        "r": rng.standard_normal((directions, gates * hidden, hidden)) * 0.3,
        "b": rng.standard_normal((directions, 2 * gates * hidden)),
    }
    extra = {"linear_before_reset": 1} if kind == "GRU" else {}
    names = ["y", "h", "c"][: 3 if kind == "LSTM" else 2]
    node = helper.make_node(kind, ["x", "w", "r", "b"], names, hidden_size=hidden, direction=direction, **extra)
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["sequence", "batch", features])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    proto: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    reference = ReferenceEvaluator(proto)
    with engine.load(proto.SerializeToString(), device="cpu") as model:
        assert not any(isinstance(node.op, Opaque) for node in model.graph.nodes)
        for sequence, batch in ((1, 1), (6, 3)):
            feeds = {"x": rng.standard_normal((sequence, batch, features)).astype(np.float32)}
            got = model.run(feeds)
            for name, want in zip(names, reference.run(None, feeds), strict=True):
                np.testing.assert_allclose(got[name], want, atol=1e-5, rtol=1e-5)
