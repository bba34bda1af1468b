"""Sizes that are known only at run time: shape arithmetic disappears, symbols are found equal, names stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from engine.errors import UnsupportedOp
from engine.frontend import read
from engine.frontend.bounds import at_least, lower_bound, smaller
from engine.frontend.operators.slicing import slice_range
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import evaluate, floordiv, symbol
from engine.ir.graph import Graph
from tests.engine.frontend.models import model, node, shape_arithmetic, tensor
from tests.engine.ir_interpreter import run

INT = TensorProto.INT64
BATCH, SEQUENCE = symbol("batch"), symbol("sequence")


def build(nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], **constants: Any) -> Graph:
    arrays = {name: np.asarray(content) for name, content in constants.items()}
    graph = read(model(nodes, inputs, ["y"], arrays).SerializeToString())
    graph.validate()
    return graph


def test_shape_arithmetic_leaves_nothing_behind() -> None:
    graph = read(shape_arithmetic().SerializeToString())
    assert [node.op.name for node in graph.nodes] == ["Reshape", "Transpose", "Softmax", "Transpose", "Reshape"]
    assert graph.nodes[0].output.shape == (BATCH, SEQUENCE, 4, 8)
    assert graph.outputs[0].shape == (BATCH, SEQUENCE, 32)
    x = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)
    assert run(graph, {"x": x})["y"].shape == x.shape


def test_names_and_origins_are_those_of_the_file() -> None:
    graph = read(shape_arithmetic().SerializeToString())
    assert [value.name for value in graph.inputs] == ["x"]
    assert graph.output_names == ["y"]
    assert [node.output.name for node in graph.nodes] == ["apart", "turned", "soft", "back", "y"]
    assert graph.nodes[2].origin == "Softmax_soft"


def test_every_value_has_a_name_of_its_own() -> None:
    nodes = [node("Gelu", "x", "a", domain="com.microsoft"), node("LpNormalization", "a", "y", p=1)]
    graph = build(nodes, [tensor("x", [2, 3])])
    names = [value.name for n in graph.nodes for value in n.outputs]
    assert len(set(names)) == len(names)
    assert all(names)


def test_sizes_needed_as_data_become_a_shape_tensor() -> None:
    nodes = [node("Shape", "x", "s"), node("Cast", "s", "f", to=1), node("Mul", "f h", "m"), node("Neg", "m", "y")]
    graph = build(nodes, [tensor("x", ["n", 4])], h=np.float32(0.5))
    assert any(isinstance(n.op, ops.ShapeTensor) for n in graph.nodes)
    np.testing.assert_array_equal(run(graph, {"x": np.zeros((5, 4), np.float32)})["y"], [-2.5, -2.0])


def test_unnamed_batch_axes_become_one_symbol() -> None:
    graph = build([node("Add", "a b", "y")], [tensor("a", [None, 4]), tensor("b", [None, 4])])
    assert [value.shape for value in graph.inputs] == [(BATCH, 4), (BATCH, 4)]


def test_unnamed_axes_that_need_not_be_equal_stay_apart() -> None:
    graph = build([node("Concat", "a b", "y", axis=0)], [tensor("a", [None, 4]), tensor("b", [None, 4])])
    first, second = (value.shape[0] for value in graph.inputs)
    assert first != second
    assert graph.outputs[0].shape[0] == first + second


def test_symbols_with_different_names_that_must_be_equal_are_one() -> None:
    inputs = [tensor("a", ["unk__1", "s1"]), tensor("b", ["unk__2", "s2"])]
    graph = build([node("Mul", "a b", "y")], inputs)
    assert graph.inputs[0].shape == graph.inputs[1].shape == graph.outputs[0].shape


def test_resize_target_from_the_shape() -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Slice", "s two four", "hw"),
        node("Cast", "hw", "f", to=1),
        node("Mul", "f scale", "g"),
        node("Floor", "g", "h"),
        node("Cast", "h", "i", to=7),
        node("Slice", "s zero two", "nc"),
        node("Concat", "nc i", "target", axis=0),
        node("Resize", "x _ _ target", "y", mode="linear"),
    ]
    scale = np.array([2.0, 1.5], np.float32)
    graph = build(nodes, [tensor("x", ["n", 3, "h", "w"])], two=[2], four=[4], zero=[0], scale=scale)
    h, w = symbol("h"), symbol("w")
    assert graph.outputs[0].shape == (symbol("n"), 3, 2 * h, floordiv(3 * w, 2))
    assert run(graph, {"x": np.zeros((1, 3, 4, 5), np.float32)})["y"].shape == (1, 3, 8, 7)


def test_expand_with_minus_one_replaced_by_where() -> None:
    """PyTorch writes `x.expand(-1, n, -1)` as a choice between ones and the wanted sizes."""
    nodes = [
        node("Shape", "z", "s"),
        node("Gather", "s one", "n"),
        node("Unsqueeze", "n axis", "n1"),
        node("Concat", "minus n1 minus", "wanted", axis=0),
        node("Equal", "wanted minus", "open"),
        node("Where", "open ones wanted", "target"),
        node("Expand", "x target", "y"),
    ]
    inputs = [tensor("x", ["b", 1, 4]), tensor("z", ["b", "n"])]
    graph = build(nodes, inputs, one=1, axis=[0], minus=[-1], ones=[1, 1, 1])
    assert graph.outputs[0].shape == (symbol("b"), symbol("n"), 4)


@pytest.mark.parametrize(
    ("begin", "end", "step", "size"),
    [
        (0, 2**63 - 1, 1, 9),
        (1, -1, 1, 9),
        (-3, 100, 1, 9),
        (-1, -(2**63), -1, 9),
        (8, 1, -2, 9),
        (5, 2, 1, 9),
        (0, 9, 4, 9),
    ],
)
def test_slice_bounds_are_those_of_python(begin: int, end: int, step: int, size: int) -> None:
    expected = list(range(size))[begin:end:step]
    start, count = slice_range(size, begin, end, step)
    assert isinstance(start, int)
    assert isinstance(count, int)
    assert [start + step * i for i in range(count)] == expected
    # The same with a size known only later, wherever it is large enough.
    start, count = slice_range(symbol("n"), begin, end, step)
    assert (evaluate(start, {"n": size}) if expected else 0) == (expected[0] if expected else 0)
    assert evaluate(count, {"n": size}) == len(expected)


def test_slices_of_symbolic_axes() -> None:
    nodes = [node("Slice", "x start end axes", "y")]
    graph = build(nodes, [tensor("x", ["n", "s"])], start=[0], end=[-1], axes=[1])
    assert graph.outputs[0].shape == (symbol("n"), symbol("s") - 1)


def test_split_and_tile_of_symbolic_axes() -> None:
    nodes = [node("Split", "x", "a b", axis=1), node("Shape", "a", "s"), node("Tile", "b two", "y")]
    graph = build(nodes, [tensor("x", ["n", 6])], two=[2, 1])
    assert graph.outputs[0].shape == (2 * symbol("n"), 3)


def test_if_on_a_size_that_is_decided() -> None:
    then = onnx.helper.make_graph([node("Relu", "x", "t")], "t", [], [onnx.helper.make_empty_tensor_value_info("t")])
    other = onnx.helper.make_graph([node("Neg", "x", "e")], "e", [], [onnx.helper.make_empty_tensor_value_info("e")])
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s one", "width"),
        node("Equal", "width four", "same"),
        node("If", "same", "y", then_branch=then, else_branch=other),
    ]
    graph = build(nodes, [tensor("x", ["n", 4])], one=1, four=4)
    assert graph.nodes[0].origin.endswith("Relu_t")


def test_a_shape_that_depends_on_data_is_refused() -> None:
    with pytest.raises(UnsupportedOp, match="Reshape_y.*computed from data"):
        build([node("Reshape", "x s", "y")], [tensor("x", ["n", 4]), tensor("s", [2], INT)])


# --- grids ------------------------------------------------------------------------------------------------------------


def test_lookup_by_consecutive_positions_is_a_view() -> None:
    nodes = [
        node("Shape", "ids", "s"),
        node("Gather", "s one", "n"),
        node("Range", "zero n step", "positions"),
        node("Unsqueeze", "positions axis", "row"),
        node("Expand", "row s", "all"),
        node("Gather", "table all", "y"),
    ]
    table = np.arange(60, dtype=np.float32).reshape(20, 3)
    constants = {"one": 1, "zero": 0, "step": 1, "axis": [0], "table": table}
    graph = build(nodes, [tensor("ids", ["batch", "sequence"], INT)], **constants)
    assert [n.op.name for n in graph.nodes] == ["Slice", "Reshape", "Expand"]
    got = run(graph, {"ids": np.zeros((2, 5), np.int64)})["y"]
    np.testing.assert_array_equal(got, np.broadcast_to(table[:5], (2, 5, 3)))


def test_lookup_of_one_row_for_all_is_a_broadcast_row() -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("ConstantOfShape", "s", "ones", value=onnx.numpy_helper.from_array(np.array([1]))),
        node("Gather", "table ones", "row"),
        node("Add", "row row", "y"),
    ]
    graph = build(nodes, [tensor("x", ["n", "m"])], table=np.eye(4, dtype=np.float32))
    assert not any(isinstance(n.op, ops.Gather) for n in graph.nodes)
    assert run(graph, {"x": np.zeros((2, 3), np.float32)})["y"][1, 2].tolist() == [0, 2, 0, 0]


def test_comparisons_of_positions_stay_where_they_differ() -> None:
    """A causal mask is data: it depends on two positions."""
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s one", "n"),
        node("Range", "zero n step", "i"),
        node("Unsqueeze", "i axis", "column"),
        node("LessOrEqual", "i column", "seen"),
        node("Where", "seen x hidden", "y"),
    ]
    constants = {"one": 1, "zero": 0, "step": 1, "axis": [1], "hidden": np.float32(-1)}
    graph = build(nodes, [tensor("x", ["n", "n"])], **constants)
    np.testing.assert_array_equal(run(graph, {"x": np.ones((3, 3), np.float32)})["y"], 2 * np.tri(3) - 1)


def test_broadcasts_are_looked_through() -> None:
    """What is computed from a broadcast tensor is computed before the broadcast."""
    nodes = [
        node("Shape", "x", "s"),
        node("Expand", "row s", "wide"),
        node("Exp", "wide", "e"),
        node("Add", "e x", "y"),
    ]
    graph = build(nodes, [tensor("x", ["n", 4]), tensor("row", [1, 4])])
    assert [n.op.name for n in graph.nodes] == ["Pointwise", "Pointwise"]
    assert graph.nodes[0].output.shape == (1, 4)


def test_neutral_steps_disappear() -> None:
    graph = build([node("Mul", "x one", "a"), node("Relu", "a", "y")], [tensor("x", ["n", 4])], one=np.float32(1))
    (only,) = graph.nodes
    assert isinstance(only.op, ops.Pointwise)
    assert ex.to_text(only.op.stores[0]) == "max(%0, 0)"


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_bounds_of_sizes() -> None:
    n, m = symbol("n"), symbol("m")
    assert lower_bound(n * m + 2) == 3
    assert lower_bound(floordiv(n, 2)) == 0
    assert lower_bound(n - m) is None
    assert at_least(n + m, 2)
    assert smaller(n, n + 1) == n
    assert smaller(1, n) == 1
