"""Attention in every spelling of the PyTorch exporters becomes one node over views; what must stay separate does."""

from __future__ import annotations

import re

import numpy as np
import pytest

import engine
from engine.ir import ops
from engine.ir.graph import Graph
from tests.engine.passes.toolkit import Arrays, check, kinds, model, only, random, views

B, S, HEADS, D = 2, 5, 3, 4
H = HEADS * D
LOWEST = float(np.finfo(np.float32).min)

WEIGHTS = {
    "wq": random(H, H, seed=1, scale=0.5),
    "wk": random(H, H, seed=2, scale=0.5),
    "wv": random(H, H, seed=3, scale=0.5),
    "wqkv": random(H, 3 * H, seed=4, scale=0.5),
    "bq": random(H, seed=5),
    "bk": random(H, seed=6),
    "bv": random(H, seed=7),
    "cut": np.array([0, 0, HEADS, D]),
    "merge": np.array([0, 0, H]),
    "scale": np.array(D**-0.5),
    "root": np.array(D**0.5),
    "fourth_root": np.array(D**-0.25),
    "fourth_root_up": np.array(D**0.25),
    "lowest": np.array(LOWEST),
    "minus_inf": np.array(-np.inf),
    "zero": np.array(0.0),
    "one": np.array(1.0),
    "ones12": np.array([1, 2]),
    "rank3": np.array([-1, S, D]),
    "rank4": np.array([B, HEADS, D, S]),
}
PROJECT = """pq = MatMul(x, wq) pk = MatMul(x, wk) pv = MatMul(x, wv) cq = Reshape(pq, cut) ck = Reshape(pk, cut)
    cv = Reshape(pv, cut) q = Transpose<perm=[0,2,1,3]>(cq) v = Transpose<perm=[0,2,1,3]>(cv) """
KEYS = "kt = Transpose<perm=[0,2,3,1]>(ck) "
KEYS_IN_TWO_STEPS = "k = Transpose<perm=[0,2,1,3]>(ck) kt = Transpose<perm=[0,1,3,2]>(k) "
SCORES = "s = MatMul(q, kt) "
SOFTMAX = "p = Softmax<axis=-1>(t) "
VALUES = "o = MatMul(p, v) "
MERGE = "ot = Transpose<perm=[0,2,1,3]>(o) y = Reshape(ot, merge) "
ADDITIVE = """m2 = Unsqueeze(mask, ones12) mf = Cast<to=11>(m2) mi = Sub(one, mf) bias = Mul(mi, lowest) """
BOOLEAN = "m2 = Unsqueeze(mask, ones12) mb = Cast<to=9>(m2) "

SPELLINGS = {
    "scale after, Mul": PROJECT + KEYS + SCORES + "t = Mul(s, scale) " + SOFTMAX + VALUES + MERGE,
    "scale after, Div": PROJECT + KEYS + SCORES + "t = Div(s, root) " + SOFTMAX + VALUES + MERGE,
    "scale on q": PROJECT + KEYS + "qs = Mul(q, scale) t = MatMul(qs, kt) " + SOFTMAX + VALUES + MERGE,
    "scale on q by Div": PROJECT + KEYS + "qs = Div(q, root) t = MatMul(qs, kt) " + SOFTMAX + VALUES + MERGE,
    "scale on k": PROJECT + KEYS + "ks = Mul(kt, scale) t = MatMul(q, ks) " + SOFTMAX + VALUES + MERGE,
    "scale on both": PROJECT + KEYS + "qs = Mul(q, fourth_root) ks = Mul(kt, fourth_root) t = MatMul(qs, ks) "
    + SOFTMAX + VALUES + MERGE,
    "scale on both by Div": PROJECT + KEYS + "qs = Div(q, fourth_root_up) ks = Div(kt, fourth_root_up)"
    " t = MatMul(qs, ks) " + SOFTMAX + VALUES + MERGE,
    "scale on the projection": PROJECT.replace("cq = Reshape(pq", "ps = Mul(pq, scale) cq = Reshape(ps") + KEYS
    + "t = MatMul(q, kt) " + SOFTMAX + VALUES + MERGE,
    "scale on k between two transposes": PROJECT + "k = Transpose<perm=[0,2,1,3]>(ck) ks = Mul(k, scale)"
    " kt = Transpose<perm=[0,1,3,2]>(ks) t = MatMul(q, kt) " + SOFTMAX + VALUES + MERGE,
    "no scale": PROJECT + KEYS + "t = MatMul(q, kt) " + SOFTMAX + VALUES + MERGE,
    "k transposed in two steps": PROJECT + KEYS_IN_TWO_STEPS + SCORES + "t = Mul(s, scale) " + SOFTMAX + VALUES + MERGE,
    "k transposed in rank three": PROJECT + "k = Transpose<perm=[0,2,1,3]>(ck) k3 = Reshape(k, rank3)"
    " t3 = Transpose<perm=[0,2,1]>(k3) kt = Reshape(t3, rank4) qs = Mul(q, fourth_root) ks = Mul(kt, fourth_root)"
    " t = MatMul(qs, ks) " + SOFTMAX + VALUES + MERGE,
    "additive mask": PROJECT + KEYS + ADDITIVE + SCORES + "u = Div(s, root) t = Add(u, bias) " + SOFTMAX + VALUES
    + MERGE,
    "additive mask first": PROJECT + KEYS + ADDITIVE + SCORES + "u = Div(s, root) t = Add(bias, u) " + SOFTMAX + VALUES
    + MERGE,
    "expanded mask": PROJECT + KEYS + "m2 = Unsqueeze(mask, ones12) sh = Shape(s) e0 = Expand(m2, sh)"
    " mf = Cast<to=11>(e0) mi = Sub(one, mf) bias = Mul(mi, lowest) " + SCORES + "u = Mul(s, scale) t = Add(u, bias) "
    + SOFTMAX + VALUES + MERGE,
    "Where with the lowest number": PROJECT + KEYS + BOOLEAN + SCORES + "u = Mul(s, scale) t = Where(mb, u, lowest) "
    + SOFTMAX + VALUES + MERGE,
    "Where with minus infinity": PROJECT + KEYS + BOOLEAN + SCORES + "u = Mul(s, scale) t = Where(mb, u, minus_inf) "
    + SOFTMAX + VALUES + MERGE,
    "Where the other way round": PROJECT + KEYS + BOOLEAN + "mn = Not(mb) " + SCORES + "u = Mul(s, scale)"
    " t = Where(mn, lowest, u) " + SOFTMAX + VALUES + MERGE,
    "bias from Where, added": PROJECT + KEYS + BOOLEAN + "bias = Where(mb, zero, minus_inf) " + SCORES
    + "u = Mul(s, scale) t = Add(u, bias) " + SOFTMAX + VALUES + MERGE,
    "NaN guard": PROJECT + KEYS + BOOLEAN + "bias = Where(mb, zero, minus_inf) " + SCORES + "u = Mul(s, scale)"
    " t = Add(u, bias) r = Softmax<axis=-1>(t) isn = IsNaN(r) p = Where(isn, zero, r) " + VALUES + MERGE,
    "cast around the softmax": PROJECT + KEYS + SCORES + "u = Mul(s, scale) t = Cast<to=11>(u) r = Softmax<axis=-1>(t)"
    " p = Cast<to=11>(r) " + VALUES + MERGE,
    "softmax over axis 3": PROJECT + KEYS + SCORES + "t = Mul(s, scale) p = Softmax<axis=3>(t) " + VALUES + MERGE,
}  # fmt: skip
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def feeds(mask: np.ndarray = MASK) -> Arrays:
    return {"x": random(B, S, H, seed=9), "mask": mask}


def spelled(body: str) -> str:
    # Statements may stand in any order here, not in the text: the shape of the scores is needed after them.
    if "sh = Shape(s)" in body:
        body = body.replace(SCORES, "").replace("m2 = Unsqueeze", SCORES + "m2 = Unsqueeze")
    return f"(double[b,s,{H}] x, int64[b,s] mask) => (double[b,s,{H}] y) {{ {body} }}"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_attention_node(spelling: str) -> None:
    graph = check(model(spelled(SPELLINGS[spelling]), WEIGHTS), feeds())
    counts = kinds(graph)
    assert counts["Attention"] == 1 and counts["Softmax"] == 0
    # The three projections are one product; the mask, where there is one, one point-wise node; nothing else computes.
    assert counts["Gemm"] == 1 and counts["Pointwise"] == ("mask" in _read_inputs(graph)), counts
    op = only(graph, ops.Attention).op
    assert isinstance(op, ops.Attention)
    assert op.scale == pytest.approx(1.0 if spelling == "no scale" else D**-0.5)
    assert only(graph, ops.Attention).output.order == (0, 2, 1, 3)


def _read_inputs(graph: Graph) -> set[str]:
    return {value.name.split("#")[0] for node in graph.nodes for value in node.inputs}


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if "infinity" not in name and "added" not in name])
def test_fully_masked_rows_keep_their_meaning(spelling: str) -> None:
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    check(model(spelled(SPELLINGS[spelling]), WEIGHTS), feeds(mask))


def test_nan_guard_gives_zero_rows() -> None:
    graph = check(model(spelled(SPELLINGS["NaN guard"]), WEIGHTS), feeds(np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])))
    op = only(graph, ops.Attention).op
    assert isinstance(op, ops.Attention) and op.masked_rows_zero


FUSED_QKV = {
    "Split": "f = MatMul(x, wqkv) pq, pk, pv = Split<axis=-1, num_outputs=3>(f) cq = Reshape(pq, cut)"
    " ck = Reshape(pk, cut) cv = Reshape(pv, cut) q = Transpose<perm=[0,2,1,3]>(cq) v = Transpose<perm=[0,2,1,3]>(cv) "
    + KEYS + SCORES + "t = Mul(s, scale) " + SOFTMAX + VALUES + MERGE,
    "Slice": "f = MatMul(x, wqkv) pq = Slice(f, s0, s1, ax) pk = Slice(f, s1, s2, ax) pv = Slice(f, s2, s3, ax)"
    " cq = Reshape(pq, cut) ck = Reshape(pk, cut) cv = Reshape(pv, cut) q = Transpose<perm=[0,2,1,3]>(cq)"
    " v = Transpose<perm=[0,2,1,3]>(cv) " + KEYS + SCORES + "t = Mul(s, scale) " + SOFTMAX + VALUES + MERGE,
    "Gather": "f = MatMul(x, wqkv) g = Reshape(f, five) h = Transpose<perm=[2,0,3,1,4]>(g) q = Gather<axis=0>(h, i0)"
    " k = Gather<axis=0>(h, i1) v = Gather<axis=0>(h, i2) kt = Transpose<perm=[0,1,3,2]>(k) " + SCORES
    + "t = Mul(s, scale) " + SOFTMAX + VALUES + MERGE,
    "Split and Squeeze": "f = MatMul(x, wqkv) g = Reshape(f, five) h = Transpose<perm=[2,0,3,1,4]>(g)"
    " q5, k5, v5 = Split<axis=0, num_outputs=3>(h) q = Squeeze(q5, ax0) k = Squeeze(k5, ax0) v = Squeeze(v5, ax0)"
    " kt = Transpose<perm=[0,1,3,2]>(k) " + SCORES + "t = Mul(s, scale) " + SOFTMAX + VALUES + MERGE,
}  # fmt: skip


@pytest.mark.parametrize("spelling", FUSED_QKV)
def test_fused_projection(spelling: str) -> None:
    extra = {
        "s0": np.array([0]), "s1": np.array([H]), "s2": np.array([2 * H]), "s3": np.array([3 * H]), "ax": np.array([2]),
        "five": np.array([0, 0, 3, HEADS, D]), "i0": np.array(0), "i1": np.array(1), "i2": np.array(2),
        "ax0": np.array([0]),
    }  # fmt: skip
    graph = check(model(spelled(FUSED_QKV[spelling]), WEIGHTS | extra, opset=18), feeds())
    assert kinds(graph) == {"Gemm": 1, "Attention": 1}


def test_rank_three_as_torch_multihead_attention_writes_it() -> None:
    text = f"""(double[s,b,{H}] x) => (double[s,b,{H}] y) {{
        pq = MatMul(x, wq) pk = MatMul(x, wk) pv = MatMul(x, wv) aq = Add(pq, bq) ak = Add(pk, bk) av = Add(pv, bv)
        cq = Reshape(aq, rows) ck = Reshape(ak, rows) cv = Reshape(av, rows)
        q = Transpose<perm=[1,0,2]>(cq) k = Transpose<perm=[1,0,2]>(ck) v = Transpose<perm=[1,0,2]>(cv)
        qs = Mul(q, scale) kt = Transpose<perm=[0,2,1]>(k) t = MatMul(qs, kt) p = Softmax<axis=-1>(t) o = MatMul(p, v)
        ot = Transpose<perm=[1,0,2]>(o) sh = Shape(x) y = Reshape(ot, sh) }}"""
    weights = WEIGHTS | {"rows": np.array([0, -1, D])}
    graph = check(model(text, weights), {"x": random(S, B, H, seed=9)})
    assert kinds(graph) == {"Gemm": 1, "Attention": 1}
    assert only(graph, ops.Attention).output.order == (1, 0, 2)


def test_scores_cut_into_heads_for_the_mask_only() -> None:
    text = f"""(double[2,5,{H}] x, int64[2,5] mask) => (double[2,5,{H}] y) {{ {PROJECT}
        k = Transpose<perm=[0,2,1,3]>(ck) q3 = Reshape(q, flat) k3 = Reshape(k, flat) v3 = Reshape(v, flat)
        kt = Transpose<perm=[0,2,1]>(k3) {ADDITIVE}
        s3 = MatMul(q3, kt) s = Mul(s3, scale) s4 = Reshape(s, cut_scores) t4 = Add(s4, bias)
        t = Reshape(t4, flat_scores)
        {SOFTMAX} o3 = MatMul(p, v3) o = Reshape(o3, cut_result) {MERGE} }}"""
    weights = WEIGHTS | {
        "flat": np.array([B * HEADS, S, D]), "cut_scores": np.array([B, HEADS, S, S]),
        "flat_scores": np.array([B * HEADS, S, S]), "cut_result": np.array([B, HEADS, S, D]),
    }  # fmt: skip
    graph = check(model(text, weights), feeds())
    assert kinds(graph) == {"Gemm": 1, "Attention": 1, "Pointwise": 1}
    assert only(graph, ops.Attention).output.rank == 4


@pytest.mark.parametrize("positions", ["Add(ab, every_head)", "Identity(one_head)"])
@pytest.mark.parametrize("masked", ["t = Add(s4, bias)", "mb = Cast<to=9>(m2) t = Where(mb, s4, lowest)"])
def test_relative_positions_before_scores_are_cut_into_heads(positions: str, masked: str) -> None:
    """As in DeBERTa: terms of batch · heads, or of all alike, and then a mask of [batch, 1, 1, keys]."""
    text = f"""(double[2,5,{H}] x, int64[2,5] mask) => (double[2,5,{H}] y) {{ {PROJECT}
        k = Transpose<perm=[0,2,1,3]>(ck) q3 = Reshape(q, flat) k3 = Reshape(k, flat) v3 = Reshape(v, flat)
        kt = Transpose<perm=[0,2,1]>(k3) {ADDITIVE} ab = MatMul(q3, places) pb = {positions}
        s3 = MatMul(q3, kt) s = Mul(s3, scale) sb = Add(s, pb) s4 = Reshape(sb, cut_scores) {masked}
        {SOFTMAX} p3 = Reshape(p, flat_scores) o3 = MatMul(p3, v3) o = Reshape(o3, cut_result) {MERGE} }}"""
    weights = WEIGHTS | {
        "flat": np.array([B * HEADS, S, D]), "cut_scores": np.array([B, HEADS, S, S]),
        "flat_scores": np.array([B * HEADS, S, S]), "cut_result": np.array([B, HEADS, S, D]),
        "places": random(D, S, seed=21), "every_head": random(B * HEADS, S, S, seed=22),
        "one_head": random(1, S, S, seed=23),
    }  # fmt: skip
    graph = check(model(text, weights), feeds())
    counts = kinds(graph)
    assert counts["Attention"] == 1 and counts["Softmax"] == 0
    assert only(graph, ops.Attention).output.rank == 4


def test_grouped_queries_read_the_heads_before_they_were_repeated() -> None:
    groups, kv = 2, 2
    text = f"""(double[b,s,8] x) => (double[b,s,16] y) {{
        pq = MatMul(x, wq) pk = MatMul(x, wk) pv = MatMul(x, wv)
        cq = Reshape(pq, cut) ck = Reshape(pk, cutk) cv = Reshape(pv, cutk)
        q = Transpose<perm=[0,2,1,3]>(cq) k1 = Transpose<perm=[0,2,1,3]>(ck) v1 = Transpose<perm=[0,2,1,3]>(cv)
        k2 = Unsqueeze(k1, two) v2 = Unsqueeze(v1, two) k3 = Expand(k2, repeat) v3 = Expand(v2, repeat)
        sh = Shape(q) k4 = Reshape(k3, sh) v = Reshape(v3, sh) kt = Transpose<perm=[0,1,3,2]>(k4)
        s = MatMul(q, kt) t = Mul(s, scale) p = Softmax<axis=-1>(t) o = MatMul(p, v) {MERGE} }}"""
    weights = {
        "wq": random(8, 16, seed=1), "wk": random(8, 8, seed=2), "wv": random(8, 8, seed=3), "two": np.array([2]),
        "cut": np.array([0, 0, kv * groups, 4]), "cutk": np.array([0, 0, kv, 4]),
        "repeat": np.array([1, 1, groups, 1, 1]), "scale": np.array(0.5), "merge": np.array([0, 0, 16]),
    }  # fmt: skip
    graph = check(model(text, weights), {"x": random(2, 5, 8)})
    assert kinds(graph) == {"Gemm": 1, "Attention": 1}
    assert only(graph, ops.Attention).inputs[1].shape[1] == kv
    assert not any(isinstance(view, ops.Expand) for view in views(graph))


def test_layers_share_one_mask() -> None:
    layer = PROJECT + KEYS + SCORES + "u = Mul(s, scale) t = Where(mb, u, lowest) " + SOFTMAX + VALUES + MERGE
    names = ["pq", "pk", "pv", "cq", "ck", "cv", "q", "v", "kt", "s", "u", "t", "p", "o", "ot"]
    second = layer
    for name in sorted(names, key=len, reverse=True):
        second = _renamed(second, name, f"{name}_2")
    second = _renamed(_renamed(second, "y", "z"), "x", "y")
    text = f"(double[b,s,{H}] x, int64[b,s] mask) => (double[b,s,{H}] z) {{ {BOOLEAN} {layer} {second} }}"
    graph = check(model(text, WEIGHTS), feeds())
    assert kinds(graph) == {"Gemm": 2, "Attention": 2, "Pointwise": 1}


def _renamed(text: str, old: str, new: str) -> str:
    return re.sub(rf"\b{old}\b", new, text)


PLAIN = PROJECT + KEYS + SCORES + "t = Mul(s, scale) " + SOFTMAX + VALUES + MERGE
NOT_ATTENTION = {
    "softmax over the queries": (PLAIN.replace("Softmax<axis=-1>", "Softmax<axis=2>"), "y"),
    "probabilities are returned": (PLAIN, "p"),
    "scores are returned": (PLAIN, "s"),
    "scores are read elsewhere": (PLAIN + "extra = Relu(s) ", "extra"),
    "something between softmax and values": (PLAIN.replace(VALUES, "pr = Sqrt(p) o = MatMul(pr, v) "), "y"),
    "scores are squared": (PLAIN.replace("t = Mul(s, scale)", "t = Mul(s, s)"), "y"),
    "scale differs by key": (PLAIN.replace("t = Mul(s, scale)", "sc = Cast<to=11>(mask) s2 = Unsqueeze(sc, ones12)"
                                           " t = Mul(s, s2)"), "y"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_ATTENTION)
def test_what_must_not_become_attention(case: str) -> None:
    body, output = NOT_ATTENTION[case]
    second = "" if output == "y" else f", double[b,{HEADS},s,s] {output}"
    text = f"(double[b,s,{H}] x, int64[b,s] mask) => (double[b,s,{H}] y{second}) {{ {body} }}"
    graph = check(model(text, WEIGHTS), feeds())
    assert kinds(graph)["Attention"] == 0 and kinds(graph)["Softmax"] == 1


def test_causal_mask_from_a_constant() -> None:
    text = f"""(double[b,s,{H}] x) => (double[b,s,{H}] y) {{ {PROJECT} {KEYS} {SCORES}
        shape = Shape<start=1, end=2>(x) zeros = Constant<value_ints=[0]>() z2 = Concat<axis=0>(zeros, zeros)
        ends = Concat<axis=0>(shape, shape) axes = Constant<value_ints=[2, 3]>()
        m = Slice(tril, z2, ends, axes) mb = Cast<to=9>(m) u = Mul(s, scale) t = Where(mb, u, lowest)
        {SOFTMAX} {VALUES} {MERGE} }}"""
    weights = WEIGHTS | {"tril": np.tril(np.ones((1, 1, 16, 16), np.uint8))}
    graph = check(model(text, weights), {"x": random(B, S, H, seed=9)})
    assert kinds(graph)["Attention"] == 1


def test_packed_projection_of_torch_multihead_attention() -> None:
    heads = """ {0} = Gather<axis=0>(sq, i{1}) {0}2 = Reshape({0}, rows) {0}3 = Transpose<perm=[1,0,2]>({0}2)
        {0}4 = Reshape({0}3, cut_heads)"""
    text = f"""(double[5,2,{H}] x) => (double[5,2,{H}] y) {{ f = MatMul(x, wqkv) g = Add(f, bqkv) r = Reshape(g, three)
        u = Unsqueeze(r, a0) t = Transpose<perm=[3,1,2,0,4]>(u) sq = Squeeze(t, a3)
        {heads.format("q", 0)} {heads.format("k", 1)} {heads.format("v", 2)} kt = Transpose<perm=[0,1,3,2]>(k4)
        qs = Mul(q4, fourth_root) ks = Mul(kt, fourth_root) s = MatMul(qs, ks) p = Softmax<axis=-1>(s)
        o = MatMul(p, v4) ot = Transpose<perm=[2,0,1,3]>(o) o2 = Reshape(ot, flat) z = Gemm<transB=1>(o2, wq, bq)
        z3 = Reshape(z, back) y = Add(x, z3) }}"""
    weights = WEIGHTS | {
        "three": np.array([5, 2, 3, H]), "a0": np.array([0]), "a3": np.array([3]), "bqkv": random(3 * H, seed=8),
        "i0": np.array(0), "i1": np.array(1), "i2": np.array(2), "rows": np.array([5, 2 * HEADS, D]),
        "cut_heads": np.array([2, HEADS, 5, D]), "flat": np.array([10, H]), "back": np.array([5, 2, H]),
    }  # fmt: skip
    graph = check(model(text, weights), {"x": random(5, 2, H, seed=9)})
    assert kinds(graph) == {"Gemm": 2, "Attention": 1}
    assert only(graph, ops.Attention).output.order == (2, 0, 1, 3)


def test_multihead_attention_of_torch_on_batches_first() -> None:
    """Batch and sequence are swapped before the projection, heads and batch made one axis, and all of it undone."""
    heads = """ {0} = Gather<axis=0>(sq, i{1}) {0}2 = Reshape({0}, rows) {0}3 = Transpose<perm=[1,0,2]>({0}2)
        {0}4 = Reshape({0}3, cut_heads)"""
    text = f"""(double[b,5,{H}] x) => (double[b,5,{H}] y) {{ n = LayerNormalization(x, bq, bk)
        xt = Transpose<perm=[1,0,2]>(n) f = MatMul(xt, wqkv) g = Add(f, bqkv) r = Reshape(g, three)
        u = Unsqueeze(r, a0) t = Transpose<perm=[3,1,2,0,4]>(u) sq = Squeeze(t, a3)
        {heads.format("q", 0)} {heads.format("k", 1)} {heads.format("v", 2)} kt = Transpose<perm=[0,1,3,2]>(k4)
        qs = Mul(q4, fourth_root) ks = Mul(kt, fourth_root) s = MatMul(qs, ks) p = Softmax<axis=-1>(s)
        o = MatMul(p, v4) ot = Transpose<perm=[2,0,1,3]>(o) o2 = Reshape(ot, flat) z = Gemm<transB=1>(o2, wq, bq)
        z3 = Reshape(z, back) zt = Transpose<perm=[1,0,2]>(z3) y = Add(x, zt) }}"""
    weights = WEIGHTS | {
        "three": np.array([5, -1, 3, H]), "a0": np.array([0]), "a3": np.array([3]), "bqkv": random(3 * H, seed=8),
        "i0": np.array(0), "i1": np.array(1), "i2": np.array(2), "rows": np.array([5, -1, D]),
        "cut_heads": np.array([-1, HEADS, 5, D]), "flat": np.array([-1, H]), "back": np.array([5, -1, H]),
    }  # fmt: skip
    graph = check(model(text, weights), {"x": random(3, 5, H, seed=9)})
    assert kinds(graph) == {"Norm": 1, "Gemm": 2, "Attention": 1}
    assert only(graph, ops.Attention).output.order == (0, 2, 1, 3)
    for node in graph.nodes:
        if isinstance(node.op, ops.Gemm):
            assert node.output.shape[1] == 5, "rows come as they lie: batch, then sequence"
    single = {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in weights.items()}
    proto = model(text.replace("double", "float"), single)
    with engine.load(proto.SerializeToString(), device="cpu") as runner:
        assert len(runner.plan({"b": 3}).steps) == 4, "nothing is copied"


def test_block_of_a_causal_language_model() -> None:
    text = f"""(double[b,5,{H}] x) => (double[b,5,{H}] y) {{ n = LayerNormalization(x, bq, bk) n2 = Reshape(n, flat)
        f = Gemm(n2, wqkv, bqkv) f3 = Reshape(f, wide) pq, pk, pv = Split<axis=-1, num_outputs=3>(f3)
        cq = Reshape(pq, cut) ck = Reshape(pk, cut) cv = Reshape(pv, cut) q = Transpose<perm=[0,2,1,3]>(cq)
        v = Transpose<perm=[0,2,1,3]>(cv) {KEYS} {SCORES} u = Div(s, root) t = Where(tril, u, lowest)
        {SOFTMAX} {VALUES} ot = Transpose<perm=[0,2,1,3]>(o) o2 = Reshape(ot, flat) z = Gemm(o2, wq, bq)
        z3 = Reshape(z, back) y = Add(z3, x) }}"""
    weights = WEIGHTS | {
        "flat": np.array([-1, H]), "wide": np.array([-1, 5, 3 * H]), "back": np.array([-1, 5, H]),
        "bqkv": random(3 * H, seed=8), "tril": np.tril(np.ones((1, 1, 5, 5), np.bool_)),
    }  # fmt: skip
    graph = check(model(text, weights), {"x": random(B, 5, H, seed=9)}, tolerance=1e-6)
    assert kinds(graph) == {"Norm": 1, "Gemm": 2, "Attention": 1}
    op = only(graph, ops.Attention).op
    assert isinstance(op, ops.Attention)
    assert op.causal
    assert not op.has_bias
