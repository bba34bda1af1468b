"""The interpreter of the IR against onnx.reference, on the operators whose arithmetic is its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import symbol
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Value
from tests.engine.ir_interpreter import run

RNG = np.random.default_rng(7)
TOLERANCE = 2e-6  # a few float32 roundings of values around 1


def compute(op: ops.Op, *arrays: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values = [Value(f"i{i}", DType.of(a.dtype), a.shape) for i, a in enumerate(arrays)]
    graph = Graph("g", inputs=values, output_names=["y"])
    graph.outputs = list(graph.add(op, values, "y"))
    graph.validate()
    return run(graph, {f"i{i}": a for i, a in enumerate(arrays)})["y"]


def reference(op_type: str, *arrays: np.ndarray[Any, Any], **attributes: Any) -> np.ndarray[Any, Any]:
    names = [f"i{i}" for i in range(len(arrays))]
    node = onnx.helper.make_node(op_type, names, ["y"], **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info(n, 1, a.shape) for n, a in zip(names, arrays, strict=True)],
        [onnx.helper.make_empty_tensor_value_info("y")],
    )
    results: Any = ReferenceEvaluator(onnx.helper.make_model(graph)).run(None, dict(zip(names, arrays, strict=True)))
    return np.asarray(results[0])


def random(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 1, 1), (2, 2, 1), (4, 1, 2)])
def test_conv_matches_reference(groups: int, stride: int, dilation: int) -> None:
    x, w = random(2, 4, 9, 8), random(8, 4 // groups, 3, 2)
    op = ops.Conv((stride, stride), ((1, 2), (0, 1)), (dilation, dilation), groups)
    expected = reference("Conv", x, w, pads=[1, 0, 2, 1], strides=[stride] * 2, dilations=[dilation] * 2, group=groups)
    np.testing.assert_allclose(compute(op, x, w), expected, atol=TOLERANCE * 10)


def test_conv_transposed_matches_reference() -> None:
    x, w = random(2, 4, 5, 6), random(4, 3, 3, 2)
    op = ops.Conv((2, 3), ((1, 1), (0, 1)), (1, 1), 1, transposed=True, output_padding=(1, 0))
    expected = reference("ConvTranspose", x, w, pads=[1, 0, 1, 1], strides=[2, 3], output_padding=[1, 0])
    np.testing.assert_allclose(compute(op, x, w), expected, atol=TOLERANCE * 10)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("kind", list(ops.PoolKind))
def test_pool_matches_reference(kind: ops.PoolKind, ceil_mode: bool, include: bool) -> None:
    x = random(2, 3, 8, 9)
    op = ops.Pool(kind, (3, 3), (2, 2), ((1, 0), (1, 1)), (1, 1), ceil_mode, include)
    attributes: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 0, 1]}
    attributes["ceil_mode"] = int(ceil_mode)
    if kind is ops.PoolKind.AVERAGE:
        expected = reference("AveragePool", x, count_include_pad=int(include), **attributes)
    else:
        expected = reference("MaxPool", x, **attributes)
    np.testing.assert_allclose(compute(op, x), expected, atol=TOLERANCE)


def test_attention_is_softmax_of_scores_times_values() -> None:
    q, k, v, bias = random(2, 4, 5, 8), random(2, 2, 7, 8), random(2, 2, 7, 6), random(2, 1, 1, 7)
    got = compute(ops.Attention(0.3, has_bias=True), q, k, v, bias)
    k, v = np.repeat(k, 2, 1), np.repeat(v, 2, 1)
    scores = 0.3 * q @ np.swapaxes(k, -1, -2) + bias
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(got, weights @ v, atol=TOLERANCE)


def test_attention_rows_without_keys() -> None:
    q = random(1, 1, 2, 4)
    bias = np.array([[[[0, 0], [-np.inf, -np.inf]]]], np.float32)
    assert np.isnan(compute(ops.Attention(1.0, has_bias=True), q, q, q, bias)[0, 0, 1]).all()
    assert not compute(ops.Attention(1.0, has_bias=True, masked_rows_zero=True), q, q, q, bias)[0, 0, 1].any()


@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_is_attention_of_each_sequence(causal: bool) -> None:
    q, k, v = random(1, 4, 9, 8), random(1, 2, 9, 8), random(1, 2, 9, 6)
    starts = np.array([0, 3, 3, 8], np.int32)
    got = compute(ops.Attention(0.3, causal, packed=True), q, k, v, starts)
    for first, end in ((0, 3), (3, 8)):
        alone = compute(ops.Attention(0.3, causal), *(x[:, :, first:end] for x in (q, k, v)))
        np.testing.assert_allclose(got[:, :, first:end], alone, atol=TOLERANCE)
    assert not got[:, :, 8:].any()


@pytest.mark.parametrize(
    ("op", "shapes", "starts", "message"),
    [
        (ops.Attention(1.0, has_bias=True, packed=True), [(1, 2, 9, 8)] * 3, np.zeros(3, np.int32), "no bias"),
        (ops.Attention(1.0, packed=True), [(2, 2, 9, 8)] * 3, np.zeros(3, np.int32), "tokens"),
        (ops.Attention(1.0, packed=True), [(1, 2, 9, 8), (1, 2, 7, 8), (1, 2, 7, 8)], np.zeros(3, np.int32), "tokens"),
        (ops.Attention(1.0, packed=True), [(1, 2, 9, 8)] * 3, np.zeros(3, np.int64), "i32"),
    ],
)
def test_packed_attention_refuses_other_operands(
    op: ops.Attention, shapes: list[tuple[int, ...]], starts: np.ndarray[Any, Any], message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        compute(op, *(random(*shape) for shape in shapes), starts)


def test_gathered_operands_read_rows_of_the_table() -> None:
    table, index = random(10, 4), np.array([[1, 2], [3, 9]])
    sum_of_two = ex.apply(ex.PointOp.ADD, ex.Arg(0, DType.F32), ex.Arg(0, DType.F32))
    np.testing.assert_array_equal(compute(ops.Pointwise((sum_of_two,), ((0, 1),)), table, index), 2 * table[index])


def test_symbolic_sizes_come_from_the_feeds() -> None:
    n = symbol("n")
    graph = Graph("g", inputs=[Value("x", DType.F32, (n, 6))], output_names=["y"])
    graph.outputs = list(graph.add(ops.Reshape((n * 2, 3)), graph.inputs, "y"))
    assert run(graph, {"x": random(5, 6)})["y"].shape == (10, 3)


@pytest.mark.parametrize("mode", list(ops.ResizeMode))
@pytest.mark.parametrize("coordinates", ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"])
def test_resize_matches_reference(mode: ops.ResizeMode, coordinates: str) -> None:
    x = random(1, 2, 5, 4)
    got = compute(ops.Resize((1, 2, 9, 3), (None, None, None, None), mode, coordinates, "floor"), x)
    node = onnx.helper.make_node(
        "Resize", ["x", "", "", "sizes"], ["y"], mode=mode.value, coordinate_transformation_mode=coordinates,
        nearest_mode="floor",
    )  # fmt: skip
    graph = onnx.helper.make_graph(
        [node], "g", [onnx.helper.make_tensor_value_info("x", 1, x.shape)],
        [onnx.helper.make_empty_tensor_value_info("y")],
        [onnx.numpy_helper.from_array(np.array([1, 2, 9, 3]), "sizes")],
    )  # fmt: skip
    expected: Any = ReferenceEvaluator(onnx.helper.make_model(graph)).run(None, {"x": x})
    np.testing.assert_allclose(got, expected[0], atol=TOLERANCE * 10)
