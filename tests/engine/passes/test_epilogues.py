"""Point-wise tails, residuals, sources of norms and embeddings ride in the operator beside them, or else they stay."""

from __future__ import annotations

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.graph import Graph
from engine.passes.operands import stores_of
from tests.engine.passes.toolkit import check, kinds, model, only, random, views

W = {
    "w": random(8, 6, seed=1), "b": random(6, seed=2), "w2": random(6, 6, seed=3), "zero": np.array(0.0),
    "k": random(6, 8, 3, 3, seed=4), "kb": random(6, seed=5), "six": np.array(6.0), "g": random(6, seed=6),
}  # fmt: skip
X = {"x": random(2, 5, 8, seed=7)}
IMAGE = {"x": random(2, 8, 7, 7, seed=8)}


def epilogue(graph: Graph, kind: type[ops.Op]) -> str:
    return "; ".join(map(ex.to_text, stores_of(only(graph, kind).op)))


def test_gemm_bias_and_relu() -> None:
    graph = check(model("(double[n,5,8] x) => (double[n,5,6] y) { m = MatMul(x, w) a = Add(m, b) y = Relu(a) }", W), X)
    assert kinds(graph) == {"Gemm": 1}
    assert epilogue(graph, ops.Gemm) == "max((acc + %2), 0)"


def test_conv_bias_clamp_and_residual() -> None:
    text = """(double[n,8,7,7] x) => (double[n,6,7,7] y) { c = Conv<pads=[1,1,1,1]>(x, k, kb) r = Clip(c, zero, six)
        d = Conv<pads=[1,1,1,1]>(x, k) y = Add(r, d) }"""
    graph = check(model(text, W), IMAGE)
    assert kinds(graph) == {"Conv": 2}


def test_residual_of_the_block_input() -> None:
    text = """(double[n,5,6] x) => (double[n,5,6] y) { m = MatMul(x, w2) a = Add(m, b) y = Add(x, a) }"""
    graph = check(model(text, W), {"x": random(2, 5, 6)})
    assert kinds(graph) == {"Gemm": 1}
    # The input is an operand of the product and, apart from it, an argument of the epilogue.
    assert [value.name for value in only(graph, ops.Gemm).inputs].count("x") == 2


def test_value_before_the_activation_is_stored_too() -> None:
    text = """(double[n,5,8] x) => (double[n,5,6] y, double[n,5,6] a) { m = MatMul(x, w) a = Add(m, b) y = Relu(a) }"""
    graph = check(model(text, W), X)
    assert kinds(graph) == {"Gemm": 1}
    assert len(only(graph, ops.Gemm).outputs) == 2


def test_no_circle_through_an_operator_that_reads_the_stored_value() -> None:
    # y needs d, d needs a: the last sum must go into the second product, not back into the first.
    text = """(double[n,5,8] x) => (double[n,5,6] y) { m = MatMul(x, w) a = Relu(m) d = MatMul(a, w2) y = Add(a, d) }"""
    graph = check(model(text, W), X)
    assert kinds(graph) == {"Gemm": 2}


def test_squeeze_and_excitation_keeps_its_product_outside() -> None:
    text = """(double[n,8,7,7] x) => (double[n,6,7,7] y) { c = Conv<pads=[1,1,1,1]>(x, k) r = Relu(c)
        p = GlobalAveragePool(r) s = Conv(p, se) t = Sigmoid(s) y = Mul(r, t) }"""
    graph = check(model(text, W | {"se": random(6, 6, 1, 1)}), IMAGE)
    # The gate comes from the image it scales: only the sigmoid can ride along.
    assert kinds(graph) == {"Conv": 2, "Reduce": 1, "Pointwise": 1}
    assert any("sigmoid(acc)" in ex.to_text(store) for node in graph.nodes for store in stores_of(node.op))


def test_a_larger_result_is_no_epilogue() -> None:
    text = """(double[n,1,8] x, double[n,5,6] z) => (double[n,5,6] y) { m = MatMul(x, w) y = Add(m, z) }"""
    graph = check(model(text, W), {"x": random(2, 1, 8), "z": random(2, 5, 6)})
    assert kinds(graph) == {"Gemm": 1, "Pointwise": 1}


@pytest.mark.parametrize("bias", ["b", "b1"])
def test_bias_behind_a_reshape(bias: str) -> None:
    text = f"""(double[n,s,8] x) => (double[n,s,6] y) {{ f = Reshape(x, rows) m = MatMul(f, w) sh = Shape(x)
        two = Constant<value_ints=[0]>() last = Constant<value_ints=[6]>() ends = Constant<value_ints=[2]>()
        head = Slice(sh, two, ends) shape = Concat<axis=0>(head, last) u = Reshape(m, shape) a = Add(u, {bias})
        y = Relu(a) }}"""
    graph = check(model(text, W | {"rows": np.array([-1, 8]), "b1": random(1, 1, 6)}), X)
    assert kinds(graph) == {"Gemm": 1}
    assert views(graph) == []


def test_bias_behind_a_transposition() -> None:
    text = """(double[n,8,7,7] x) => (double[n,7,7,6] y) { c = Conv<pads=[1,1,1,1]>(x, k)
        t = Transpose<perm=[0,2,3,1]>(c) a = Add(t, kb) y = Relu(a) }"""
    graph = check(model(text, W), IMAGE)
    assert kinds(graph) == {"Conv": 1}


def test_bias_per_row_stays_behind_a_reshape_that_splits_rows() -> None:
    text = """(double[6,8] x) => (double[2,3,6] y) { m = MatMul(x, w) u = Reshape(m, s) y = Add(u, r) }"""
    graph = check(model(text, W | {"s": np.array([2, 3, 6]), "r": random(3, 1)}), {"x": random(6, 8)})
    assert kinds(graph) == {"Gemm": 1, "Pointwise": 1}


def test_residual_sum_before_a_norm_that_is_needed_again() -> None:
    text = """(double[n,5,6] x, double[n,5,6] z) => (double[n,5,6] y) { r = Add(x, z)
        n = LayerNormalization(r, g, b) m = MatMul(n, w2) y = Add(m, r) }"""
    graph = check(model(text, W), {"x": random(2, 5, 6), "z": random(2, 5, 6, seed=1)}, tolerance=1e-7)
    assert kinds(graph) == {"Norm": 1, "Gemm": 1}
    assert len(only(graph, ops.Norm).outputs) == 2


def test_embedding_sum_and_norm_are_one_node() -> None:
    text = """(int64[n,s] ids, int64[n,s] types) => (double[n,s,6] y) { e = Gather(words, ids) t = Gather(kinds, types)
        p = Gather(places, order) a = Add(e, t) c = Add(a, p) y = LayerNormalization(c, g, b) }"""
    weights = W | {"words": random(20, 6), "kinds": random(2, 6), "places": random(5, 6),
                   "order": np.arange(5)[None]}  # fmt: skip
    feeds = {"ids": np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 19]]), "types": np.array([[0, 0, 1, 1, 1]] * 2)}
    graph = check(model(text, weights), feeds, tolerance=1e-7)
    assert kinds(graph) == {"Norm": 1}
    assert len(only(graph, ops.Norm).op.gathers) == 2  # type: ignore[attr-defined]


def test_lookup_that_two_nodes_read_stays() -> None:
    text = """(int64[n,s] ids) => (double[n,s,6] y, double[n,s,6] e) { e = Gather(words, ids) y = Relu(e) }"""
    graph = check(model(text, W | {"words": random(20, 6)}), {"ids": np.array([[1, 2], [3, 4]])})
    assert kinds(graph) == {"Gather": 1, "Pointwise": 1}


def test_softmax_source_and_reduction_epilogue() -> None:
    text = """(double[n,6] x) => (double[n,6] y, double[n,1] r) { s = Mul(x, b) y = Softmax(s)
        q = Mul(x, x) m = ReduceMean(q, axis) r = Sqrt(m) }"""
    graph = check(model(text, W | {"axis": np.array([1])}), {"x": random(4, 6)})
    assert kinds(graph) == {"Softmax": 1, "Reduce": 1}


def test_graph_output_in_the_middle_is_kept() -> None:
    text = """(double[n,6] x) => (double[n,6] y, double[n,6] m) { m = Mul(x, b) y = Exp(m) }"""
    graph = check(model(text, W), {"x": random(4, 6)})
    assert kinds(graph) == {"Pointwise": 2}


def test_costly_producer_of_a_broadcast_is_not_repeated() -> None:
    text = """(double[n,1] x, double[n,6] z) => (double[n,6] y) { e = Exp(x) y = Mul(e, z) }"""
    graph = check(model(text, W), {"x": random(4, 1), "z": random(4, 6)})
    assert kinds(graph) == {"Pointwise": 2}


def test_diamond_of_pointwise_nodes_is_one() -> None:
    text = """(double[n,6] x, double[n,6] z) => (double[n,6] y) {
        a = Exp(x) p = Mul(a, z) q = Add(a, b) y = Sub(p, q) }"""
    graph = check(model(text, W), {"x": random(4, 6), "z": random(4, 6, seed=1)})
    assert kinds(graph) == {"Pointwise": 1}
