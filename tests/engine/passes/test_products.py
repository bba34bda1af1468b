"""Products: sibling projections merged, rows flattened, causal masks recognised, flattened images read as they lie."""

from __future__ import annotations

import numpy as np
import pytest

from engine.ir import ops
from engine.passes import Traits
from tests.engine.passes.toolkit import check, kinds, model, only, random, views

W = {
    "wa": random(8, 6, seed=1), "wb": random(8, 4, seed=2), "wc": random(8, 2, seed=3),
    "ba": random(6, seed=4), "bb": random(4, seed=5), "zero": np.array([0]),
}  # fmt: skip
X = {"x": random(2, 5, 8)}
HEAD = "(double[n,5,8] x) => (double[n,5,6] y, double[n,5,4] z) "
# Reversed along the batch, so that no result is an output of the graph itself.
TAIL = " y = Softmax(a) z = Softmax(b)"


def test_three_siblings_of_which_one_has_no_bias() -> None:
    text = """(double[n,5,8] x) => (double[n,5,6] y, double[n,5,4] z, double[n,5,2] u) {
        p = MatMul(x, wa) a = Add(p, ba) q = MatMul(x, wb) b = Add(bb, q) c = MatMul(x, wc)
        y = Softmax(a) z = Softmax(b) u = Softmax(c) }"""
    graph = check(model(text, W), X)
    assert kinds(graph) == {"Gemm": 1, "Softmax": 3}
    assert only(graph, ops.Gemm).output.shape[-1] == 12
    assert [view for view in views(graph) if isinstance(view, ops.Slice)] == views(graph)


def test_siblings_without_any_bias_get_none() -> None:
    graph = check(model(HEAD + "{ a = MatMul(x, wa) b = MatMul(x, wb)" + TAIL + "}", W), X)
    assert kinds(graph) == {"Gemm": 1, "Softmax": 2}
    assert len(only(graph, ops.Gemm).inputs) == 2


def test_siblings_of_which_one_is_rectified() -> None:
    graph = check(model(HEAD + "{ p = MatMul(x, wa) q = Add(p, ba) a = Relu(q) b = MatMul(x, wb)" + TAIL + "}", W), X)
    assert kinds(graph) == {"Gemm": 1, "Softmax": 2}
    limit = only(graph, ops.Gemm).inputs[3].data
    assert limit is not None
    assert np.array_equal(limit, [0.0] * 6 + [-np.inf] * 4)


NOT_MERGED = {
    "different epilogues": HEAD + "{ p = MatMul(x, wa) a = Tanh(p) b = MatMul(x, wb)" + TAIL + "}",
    "a result is an output": HEAD + "{ y = MatMul(x, wa) b = MatMul(x, wb) z = Softmax(b) }",
    "different inputs": HEAD + "{ e = Exp(x) a = MatMul(e, wa) b = MatMul(x, wb)" + TAIL + "}",
    "a residual": "(double[n,5,8] x, double[n,5,6] r) => (double[n,5,6] y, double[n,5,4] z) { p = MatMul(x, wa)"
    " a = Add(p, r) b = MatMul(x, wb)" + TAIL + "}",
}


@pytest.mark.parametrize("case", NOT_MERGED)
def test_products_that_are_no_siblings(case: str) -> None:
    graph = check(model(NOT_MERGED[case], W), {**X, "r": random(2, 5, 6)} if "residual" in case else X)
    assert kinds(graph)["Gemm"] == 2


def test_rows_are_not_regrouped_for_a_product() -> None:
    text = """(double[n,5,8] x) => (double[n,5,6] y) { f = Reshape(x, rows) m = MatMul(f, wa) a = Add(m, ba)
        y = Reshape(a, back) }"""
    graph = check(model(text, W | {"rows": np.array([-1, 8]), "back": np.array([-1, 5, 6])}), X)
    assert kinds(graph) == {"Gemm": 1}
    assert views(graph) == []


def test_a_reshape_that_changes_the_columns_stays() -> None:
    text = "(double[n,2,4] x) => (double[n,6] y) { f = Reshape(x, rows) y = MatMul(f, wa) }"
    graph = check(model(text, W | {"rows": np.array([-1, 8])}), {"x": random(3, 2, 4)})
    assert len(views(graph)) == 1


def test_swapped_rows_are_swapped_back_behind_the_product() -> None:
    text = """(double[n,5,8] x) => (double[n,5,6] y) { e = Softmax(x) t = Transpose<perm=[1,0,2]>(e) m = MatMul(t, wa)
        a = Add(m, ba) b = Transpose<perm=[1,0,2]>(a) y = Softmax(b) }"""
    graph = check(model(text, W), X)
    assert kinds(graph) == {"Gemm": 1, "Softmax": 2}
    assert views(graph) == []


def test_windows_stay_in_the_order_that_what_comes_behind_the_product_needs() -> None:
    text = """(double[n,2,3,2,3,8] x) => (double[n,2,2,9,6] y) { e = Softmax(x)
        t = Transpose<perm=[0,1,3,2,4,5]>(e) r = Reshape(t, windows) m = MatMul(r, wa) y = Reshape(m, back) }"""
    weights = W | {"windows": np.array([-1, 9, 8]), "back": np.array([-1, 2, 2, 9, 6])}
    feeds = {"x": random(2, 2, 3, 2, 3, 8)}
    graph = check(model(text, weights), feeds, traits=Traits())
    order = [type(node.op) for node in graph.nodes]
    assert order.index(ops.Transpose) < order.index(ops.Gemm)
    # Where rows can be written in any order the product reads them as they lie.
    graph = check(model(text, weights), feeds)
    order = [type(node.op) for node in graph.nodes]
    assert order.index(ops.Gemm) < order.index(ops.Transpose)
    assert only(graph, ops.Gemm).output.order == (0, 1, 3, 2, 4, 5)


SWIN = """(double[n,8,8,8] x) => (double[n,8,8,8] y) { e = Softmax(x) w = Reshape(e, windows)
    t = Transpose<perm=[0,1,3,2,4,5]>(w) r = Reshape(t, rows) m = MatMul(r, w1) a = Add(m, b1) g = Tanh(a)
    f = MatMul(g, w2) c = Add(f, b2) s = Reshape(c, apart) u = Transpose<perm=[0,1,3,2,4,5]>(s) v = Reshape(u, image)
    z = Add(x, v) y = Softmax(z) }"""
SWIN_WEIGHTS = {
    "windows": np.array([-1, 2, 4, 2, 4, 8]), "rows": np.array([-1, 16, 8]), "apart": np.array([-1, 2, 2, 4, 4, 8]),
    "image": np.array([-1, 8, 8, 8]), "w1": random(8, 24), "b1": random(24), "w2": random(24, 8), "b2": random(8),
}  # fmt: skip


def test_windows_of_an_image_are_written_where_they_belong() -> None:
    """The residual is the product's, whose rows are windows; no view takes a copy."""
    graph = check(model(SWIN, SWIN_WEIGHTS), {"x": random(2, 8, 8, 8)})
    assert kinds(graph) == {"Softmax": 2, "Gemm": 2}
    plain = check(model(SWIN, SWIN_WEIGHTS), {"x": random(2, 8, 8, 8)}, traits=Traits())
    assert kinds(plain)["Gemm"] == 2


def test_rows_with_a_bias_of_their_own_are_not_spread() -> None:
    text = SWIN.replace("c = Add(f, b2)", "c = Add(f, own)").replace("b2", "own")
    check(model(text, SWIN_WEIGHTS | {"own": random(16, 8)}), {"x": random(2, 8, 8, 8)})


def test_heads_become_columns_and_rows_stay_apart() -> None:
    text = """(double[n,5,2,4] x) => (double[n,5,6] y) { e = Softmax(x) f = Reshape(e, rows) m = MatMul(f, wa)
        y = Reshape(m, back) }"""
    graph = check(model(text, W | {"rows": np.array([-1, 8]), "back": np.array([-1, 5, 6])}), {"x": random(2, 5, 2, 4)})
    assert [view.shape for view in views(graph) if isinstance(view, ops.Reshape)] == [
        only(graph, ops.Gemm).inputs[0].shape
    ]


def test_flattened_image_is_read_channels_last() -> None:
    text = """(double[n,3,6,6] x) => (double[n,7] y) { c = Conv(x, k) r = Relu(c) f = Flatten(r) m = MatMul(f, w)
        y = Add(m, b) }"""
    weights = {"k": random(5, 3, 3, 3), "w": random(80, 7), "b": random(7)}
    graph = check(model(text, weights), {"x": random(2, 3, 6, 6)})
    assert kinds(graph) == {"Conv": 1, "Gemm": 1}
    assert [type(view) for view in views(graph)] == [ops.Transpose, ops.Reshape]
    assert only(graph, ops.Conv).output.order == (0, 2, 3, 1)


ATTENTION = """q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) kt = Transpose<perm=[0,2,1]>(k) s = MatMul(q, kt)
    {mask} p = Softmax(t) y = MatMul(p, v)"""
CAUSAL_WEIGHTS = {
    "wq": random(8, 8, seed=1), "wk": random(8, 8, seed=2), "wv": random(8, 8, seed=3),
    "low": np.array(-np.inf), "lowest": np.array(float(np.finfo(np.float32).min)), "z": np.array(0.0),
    "tril": np.tril(np.ones((1, 16, 16), np.bool_)), "i0": np.array(0), "i1": np.array(1),
    "additive": np.where(np.tril(np.ones((16, 16))) > 0, 0.0, -np.inf), "n0": np.array([0, 0]), "ax": np.array([1, 2]),
    "ax2": np.array([0, 1]), "u0": np.array([0]), "u1": np.array([1]),
    "shifted": np.tril(np.ones((1, 16, 16), np.bool_), 1),
    "window": np.tri(16, dtype=np.bool_)[None] & ~np.tri(16, k=-3, dtype=np.bool_)[None],
}  # fmt: skip
SIZE = "w = Shape<start=1, end=2>(x) e = Concat<axis=0>(w, w) "
RANGE = (
    "w = Shape<start=1, end=2>(x) n = Squeeze(w, zero) r = Range(i0, n, i1) qi = Unsqueeze(r, u1)"
    " ki = Unsqueeze(r, u0) "
)
CAUSAL = {
    "sliced triangle": SIZE + "m = Slice(tril, n0, e, ax) t = Where(m, s, low)",
    "sliced triangle, lowest number": SIZE + "m = Slice(tril, n0, e, ax) t = Where(m, s, lowest)",
    "additive triangle": SIZE + "m = Slice(additive, n0, e, ax2) t = Add(s, m)",
    "positions, LessOrEqual": RANGE + "m = LessOrEqual(ki, qi) t = Where(m, s, low)",
    "positions, Greater": RANGE + "m = Greater(ki, qi) t = Where(m, lowest, s)",
    "positions, Less and Not": RANGE + "f = Less(qi, ki) m = Not(f) b = Where(m, z, low) t = Add(s, b)",
}
NOT_CAUSAL = {
    "shifted triangle": SIZE + "m = Slice(shifted, n0, e, ax) t = Where(m, s, low)",
    "window": SIZE + "m = Slice(window, n0, e, ax) t = Where(m, s, low)",
    "later queries": RANGE + "m = LessOrEqual(qi, ki) t = Where(m, s, low)",
    "strictly earlier keys": RANGE + "m = Less(ki, qi) t = Where(m, s, lowest)",
}


def causal(mask: str) -> ops.Attention:
    text = f"(double[b,n,8] x) => (double[b,n,8] y) {{ {ATTENTION.format(mask=mask)} }}"
    graph = check(model(text, CAUSAL_WEIGHTS | {"zero": np.array([0])}), {"x": random(2, 5, 8)})
    op = only(graph, ops.Attention).op
    assert isinstance(op, ops.Attention)
    return op


@pytest.mark.parametrize("spelling", CAUSAL)
def test_causal_mask(spelling: str) -> None:
    op = causal(CAUSAL[spelling])
    assert op.causal
    assert not op.has_bias


@pytest.mark.parametrize("spelling", NOT_CAUSAL)
def test_masks_that_are_not_causal(spelling: str) -> None:
    op = causal(NOT_CAUSAL[spelling])
    assert op.has_bias
    assert not op.causal


BRANCHES = {
    "k1": random(8, 4, 1, 1, seed=1), "k2": random(16, 4, 1, 1, seed=2), "k3": random(16, 8, 3, 3, seed=3),
    "b1": random(8, seed=4), "s1": random(8, seed=5), "m1": random(8, seed=6), "v1": random(8, seed=7) ** 2 + 1,
    "b2": random(16, seed=4), "s2": random(16, seed=5), "m2": random(16, seed=6), "v2": random(16, seed=7) ** 2 + 1,
    "bias": random(16, seed=8), "zero": np.array(0.0), "one": np.array(1.0),
}  # fmt: skip
IMAGE = {"x": random(2, 4, 6, 6)}
BOTTLENECK = """(double[n,4,6,6] x) => (double[n,16,6,6] y) {
    c1 = Conv(x, k1) n1 = BatchNormalization(c1, s1, b1, m1, v1) r1 = Relu(n1)
    c3 = Conv<pads=[1,1,1,1]>(r1, k3) n3 = BatchNormalization(c3, s2, b2, m2, v2)
    c2 = Conv<strides=[STRIDE,STRIDE]>(x, k2) n2 = BatchNormalization(c2, s2, b2, m2, v2)
    a = Add(n3, n2) y = Relu(a) }"""


def test_the_branches_of_a_residual_block_are_one_convolution() -> None:
    graph = check(model(BOTTLENECK.replace("STRIDE", "1"), BRANCHES), IMAGE)
    assert kinds(graph) == {"Conv": 2}
    wide, last = (node for node in graph.nodes if isinstance(node.op, ops.Conv))
    assert wide.output.shape[1] == 24
    assert len(wide.inputs) == 4, "the weight, a bias and a lower limit per channel"
    limit = wide.inputs[3].data
    assert limit is not None
    assert np.array_equal(limit.reshape(-1), [0.0] * 8 + [-np.inf] * 16)
    assert len(last.inputs) == 4, "its own normalisation is in its weights, that of the other branch in the other's"


def test_branches_of_another_geometry_stay_apart() -> None:
    text = BOTTLENECK.replace("STRIDE", "2").replace("pads=[1,1,1,1]", "pads=[1,1,1,1], strides=[2,2]")
    assert kinds(check(model(text.replace("16,6,6] y", "16,3,3] y"), BRANCHES), IMAGE)) == {"Conv": 3}


def test_convolutions_with_one_clamp_share_it() -> None:
    text = """(double[n,4,6,6] x) => (double[n,8,6,6] y, double[n,16,6,6] z) {
        c1 = Conv(x, k1, b1) a = Clip(c1, zero, one) c2 = Conv(x, k2, bias) b = Clip(c2, zero, one)
        y = Softmax<axis=1>(a) z = Softmax<axis=1>(b) }"""
    graph = check(model(text, BRANCHES), IMAGE)
    assert kinds(graph) == {"Conv": 1, "Softmax": 2}
    assert len(only(graph, ops.Conv).inputs) == 3


CONVOLUTIONS_APART = {
    "into a concatenation": """(double[n,4,6,6] x) => (double[n,24,6,6] y) { a = Conv(x, k1) b = Conv(x, k2)
        y = Concat<axis=1>(a, b) }""",
    "channels that are not whole vectors": """(double[n,4,6,6] x) => (double[n,8,6,6] y, double[n,6,6,6] z) {
        a = Conv(x, k1) b = Conv(x, odd) y = Softmax<axis=1>(a) z = Softmax<axis=1>(b) }""",
    "groups": """(double[n,4,6,6] x) => (double[n,8,6,6] y, double[n,8,6,6] z) { a = Conv<group=2>(x, grouped)
        b = Conv<group=2>(x, grouped2) y = Softmax<axis=1>(a) z = Softmax<axis=1>(b) }""",
    "another activation": """(double[n,4,6,6] x) => (double[n,8,6,6] y, double[n,16,6,6] z) {
        c = Conv(x, k1) a = Tanh(c) b = Conv(x, k2) y = Softmax<axis=1>(a) z = Softmax<axis=1>(b) }""",
}


@pytest.mark.parametrize("case", CONVOLUTIONS_APART)
def test_convolutions_that_stay_apart(case: str) -> None:
    weights = {"odd": random(6, 4, 1, 1), "grouped": random(8, 2, 1, 1), "grouped2": random(8, 2, 1, 1, seed=9)}
    assert kinds(check(model(CONVOLUTIONS_APART[case], BRANCHES | weights), IMAGE))["Conv"] == 2
