"""Norms in every spelling that exporters write become one node; what only looks like one does not."""

from __future__ import annotations

import numpy as np
import pytest

from engine.ir import ops
from tests.engine.passes.toolkit import check, kinds, model, only, random

H = 16
WEIGHTS = {
    "g": random(H, seed=1),
    "b": random(H, seed=2),
    "eps": np.array(1e-5),
    "two": np.array(2.0),
    "one": np.array(1.0),
    "axis": np.array([-1]),
    "minus_half": np.array(-0.5),
}
FEEDS = {"x": random(2, 5, H, seed=3)}
HEAD = f"(double[n,s,{H}] x) => (double[n,s,{H}] y) "

LAYER_NORMS = {
    "pow, sqrt, div": "m = ReduceMean(x, axis) d = Sub(x, m) q = Pow(d, two) v = ReduceMean(q, axis) e = Add(v, eps)"
    " r = Sqrt(e) n = Div(d, r) s = Mul(n, g) y = Add(s, b)",
    "mul of d with d": "m = ReduceMean(x, axis) d = Sub(x, m) q = Mul(d, d) v = ReduceMean(q, axis) e = Add(eps, v)"
    " r = Sqrt(e) n = Div(d, r) s = Mul(g, n) y = Add(b, s)",
    "d computed twice": "m = ReduceMean(x, axis) d = Sub(x, m) d2 = Sub(x, m) q = Pow(d2, two) v = ReduceMean(q, axis)"
    " e = Add(v, eps) r = Sqrt(e) n = Div(d, r) s = Mul(n, g) y = Add(s, b)",
    "reciprocal": "m = ReduceMean(x, axis) d = Sub(x, m) q = Pow(d, two) v = ReduceMean(q, axis) e = Add(v, eps)"
    " r = Sqrt(e) i = Reciprocal(r) n = Mul(d, i) s = Mul(n, g) y = Add(s, b)",
    "one over": "m = ReduceMean(x, axis) d = Sub(x, m) q = Pow(d, two) v = ReduceMean(q, axis) e = Add(v, eps)"
    " r = Sqrt(e) i = Div(one, r) n = Mul(i, d) s = Mul(n, g) y = Add(s, b)",
    "power of minus one half": "m = ReduceMean(x, axis) d = Sub(x, m) q = Mul(d, d) v = ReduceMean(q, axis)"
    " e = Add(v, eps) i = Pow(e, minus_half) n = Mul(d, i) s = Mul(n, g) y = Add(s, b)",
    "scale joined with the root": "m = ReduceMean(x, axis) d = Sub(x, m) q = Mul(d, d) v = ReduceMean(q, axis)"
    " e = Add(v, eps) r = Sqrt(e) i = Reciprocal(r) gi = Mul(i, g) s = Mul(d, gi) y = Add(s, b)",
    "x * s + (b - m * s)": "m = ReduceMean(x, axis) d = Sub(x, m) q = Mul(d, d) v = ReduceMean(q, axis)"
    " e = Add(v, eps) r = Sqrt(e) i = Reciprocal(r) gi = Mul(i, g) xs = Mul(x, gi) ms = Mul(m, gi) t = Sub(b, ms)"
    " y = Add(xs, t)",
    "casts around": "xf = Cast<to=11>(x) m = ReduceMean(xf, axis) d = Sub(xf, m) q = Pow(d, two)"
    " v = ReduceMean(q, axis) e = Add(v, eps) r = Sqrt(e) n = Div(d, r) nc = Cast<to=11>(n) s = Mul(nc, g)"
    " y = Add(s, b)",
    "the operator": "y = LayerNormalization<axis=-1, epsilon=1e-5>(x, g, b)",
}


@pytest.mark.parametrize("spelling", LAYER_NORMS)
def test_layer_norm(spelling: str) -> None:
    graph = check(model(HEAD + "{" + LAYER_NORMS[spelling] + "}", WEIGHTS), FEEDS)
    assert kinds(graph) == {"Norm": 1}
    norm = only(graph, ops.Norm).op
    assert isinstance(norm, ops.Norm)
    assert norm.kind is ops.NormKind.LAYER and norm.axes == (2,) and norm.epsilon == pytest.approx(1e-5)


RMS_NORMS = {
    "rsqrt": "q = Mul(x, x) v = ReduceMean(q, axis) e = Add(v, eps) r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i)"
    " y = Mul(n, g)",
    "pow and div": "q = Pow(x, two) v = ReduceMean(q, axis) e = Add(v, eps) r = Sqrt(e) n = Div(x, r) y = Mul(g, n)",
    "scale joined with the root": "q = Pow(x, two) v = ReduceMean(q, axis) e = Add(v, eps) r = Sqrt(e) i = Div(g, r)"
    " y = Mul(x, i)",
}


@pytest.mark.parametrize("spelling", RMS_NORMS)
def test_rms_norm(spelling: str) -> None:
    graph = check(model(HEAD + "{" + RMS_NORMS[spelling] + "}", WEIGHTS), FEEDS)
    assert kinds(graph) == {"Norm": 1}
    norm = only(graph, ops.Norm).op
    assert isinstance(norm, ops.Norm) and norm.kind is ops.NormKind.RMS


L2_NORMS = {
    "ReduceL2, Clip, Expand": "r = ReduceL2(x, axis) c = Clip(r, eps) s = Shape(x) f = Expand(c, s) y = Div(x, f)",
    "ReduceL2, Max": "r = ReduceL2(x, axis) c = Max(r, eps) y = Div(x, c)",
    "root of a sum": "q = Mul(x, x) r = ReduceSum(q, axis) t = Sqrt(r) c = Max(t, eps) y = Div(x, c)",
    "root of a floored sum": "q = Mul(x, x) r = ReduceSum(q, axis) c = Max(r, eps) t = Sqrt(c) i = Reciprocal(t)"
    " y = Mul(x, i)",
    "no floor": "r = ReduceL2(x, axis) y = Div(x, r)",
}


@pytest.mark.parametrize("spelling", L2_NORMS)
def test_l2_normalisation(spelling: str) -> None:
    graph = check(model(HEAD + "{" + L2_NORMS[spelling] + "}", WEIGHTS), FEEDS)
    assert kinds(graph) == {"Norm": 1}
    norm = only(graph, ops.Norm).op
    assert isinstance(norm, ops.Norm) and norm.kind is ops.NormKind.L2


def test_instance_norm_over_the_spatial_axes() -> None:
    text = """(double[n,4,h,w] x) => (double[n,4,h,w] y) {
        m = ReduceMean(x, axes) d = Sub(x, m) q = Mul(d, d) v = ReduceMean(q, axes) e = Add(v, eps) r = Sqrt(e)
        n = Div(d, r) s = Mul(n, g) y = Add(s, b) }"""
    weights = {"g": random(4, 1, 1), "b": random(4, 1, 1, seed=1), "axes": np.array([2, 3]), "eps": np.array(1e-5)}
    graph = check(model(text, weights), {"x": random(2, 4, 5, 6)})
    assert kinds(graph) == {"Norm": 1}
    norm = only(graph, ops.Norm).op
    assert isinstance(norm, ops.Norm) and norm.axes == (2, 3)


def test_group_norm_on_a_view() -> None:
    text = """(double[n,6,4,4] x) => (double[n,6,4,4] y) {
        v = Reshape(x, grouped) i = InstanceNormalization<epsilon=1e-5>(v, ones, zeros) s = Shape(x) u = Reshape(i, s)
        k = Mul(u, g) y = Add(k, b) }"""
    weights = {
        "g": random(6, 1, 1), "b": random(6, 1, 1, seed=1), "grouped": np.array([0, 2, -1]),
        "ones": np.ones(2), "zeros": np.zeros(2),
    }  # fmt: skip
    graph = check(model(text, weights), {"x": random(2, 6, 4, 4)})
    assert kinds(graph)["Norm"] == 1 and kinds(graph)["Reduce"] == 0


NOT_NORMS = {
    "means over different axes": "m = ReduceMean(x, first) d = Sub(x, m) q = Mul(d, d) v = ReduceMean(q, axis)"
    " e = Add(v, eps) r = Sqrt(e) y = Div(d, r)",
    "variance of something else": "m = ReduceMean(x, axis) d = Sub(x, m) z = Abs(x) q = Mul(z, x)"
    " v = ReduceMean(q, axis) e = Add(v, eps) r = Sqrt(e) y = Div(d, r)",
    "a maximum for the mean": "m = ReduceMax(x, axis) d = Sub(x, m) q = Mul(d, x) v = ReduceMean(q, axis)"
    " e = Abs(v) f = Add(e, eps) r = Sqrt(f) y = Div(d, r)",
}


@pytest.mark.parametrize("spelling", NOT_NORMS)
def test_what_is_no_layer_norm_stays(spelling: str) -> None:
    weights = {**WEIGHTS, "first": np.array([1])}
    graph = check(model(HEAD + "{" + NOT_NORMS[spelling] + "}", weights), FEEDS)
    assert not any(isinstance(n.op, ops.Norm) and n.op.kind is ops.NormKind.LAYER for n in graph.nodes)


def test_a_mean_that_is_read_elsewhere_is_still_there() -> None:
    text = f"""(double[n,s,{H}] x) => (double[n,s,{H}] y, double[n,s,1] m) {{
        m = ReduceMean(x, axis) d = Sub(x, m) q = Mul(d, d) v = ReduceMean(q, axis) e = Add(v, eps) r = Sqrt(e)
        y = Div(d, r) }}"""
    graph = check(model(text, WEIGHTS), FEEDS)
    assert kinds(graph) == {"Norm": 1, "Reduce": 1}
