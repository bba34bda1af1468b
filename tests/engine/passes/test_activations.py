"""GELU, SiLU, hard-swish: every spelling is one point-wise node with the same, short expression."""

from __future__ import annotations

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.graph import Graph
from tests.engine.passes.toolkit import check, kinds, model, only, random

CONSTANTS = {
    "half": np.array(0.5), "one": np.array(1.0), "two": np.array(2.0), "three": np.array(3.0), "six": np.array(6.0),
    "zero": np.array(0.0), "sqrt2": np.array(2**0.5), "rsqrt2": np.array(0.5**0.5), "c": np.array(0.044715),
    "k": np.array((2 / np.pi) ** 0.5), "quick": np.array(1.702), "sixth": np.array(1 / 6),
}  # fmt: skip
FEEDS = {"x": np.concatenate([random(3, 17, scale=3), np.linspace(-8, 8, 17)[None]])}


TOLERANCE = 1e-7  # attributes of operators are fp32, and so is onnx.reference's erf


def only_expression(graph: Graph) -> ex.Expr:
    assert kinds(graph) == {"Pointwise": 1}
    op = only(graph, ops.Pointwise).op
    assert isinstance(op, ops.Pointwise)
    (store,) = op.stores
    return store


def run(body: str, opset: int = 20) -> ex.Expr:
    proto = model(f"(double[n,17] x) => (double[n,17] y) {{ {body} }}", CONSTANTS, opset)
    return only_expression(check(proto, FEEDS, tolerance=TOLERANCE))


GELU_ERF = {
    "half last": "a = Div(x, sqrt2) e = Erf(a) f = Add(e, one) g = Mul(x, f) y = Mul(g, half)",
    "half first": "h = Mul(x, half) a = Div(x, sqrt2) e = Erf(a) f = Add(e, one) y = Mul(h, f)",
    "half on the bracket": "a = Mul(x, rsqrt2) e = Erf(a) f = Add(one, e) h = Mul(half, f) y = Mul(x, h)",
    "half inside": "a = Mul(x, rsqrt2) e = Erf(a) h = Mul(e, half) f = Add(h, half) y = Mul(f, x)",
    "the operator": "y = Gelu(x)",
}
GELU_TANH = {
    "Pow": "p = Pow(x, three) q = Mul(p, c) r = Add(x, q) s = Mul(r, k) t = Tanh(s) u = Add(t, one) v = Mul(x, u)"
    " y = Mul(v, half)",
    "products": "xx = Mul(x, x) p = Mul(xx, x) q = Mul(c, p) r = Add(q, x) s = Mul(k, r) t = Tanh(s) u = Add(one, t)"
    " h = Mul(half, x) y = Mul(h, u)",
    "x factored out": "xx = Mul(x, x) q = Mul(xx, c) r = Add(q, one) kx = Mul(x, k) s = Mul(kx, r) t = Tanh(s)"
    " u = Add(t, one) h = Mul(half, u) y = Mul(x, h)",
    "the operator": "y = Gelu<approximate='tanh'>(x)",
}
SILU = {
    "Sigmoid": "s = Sigmoid(x) y = Mul(x, s)",
    "exp": "n = Neg(x) e = Exp(n) a = Add(e, one) y = Div(x, a)",
    "reciprocal": "n = Neg(x) e = Exp(n) a = Add(one, e) s = Div(one, a) y = Mul(s, x)",
}
QUICK_GELU = {
    "Sigmoid": "q = Mul(x, quick) s = Sigmoid(q) y = Mul(x, s)",
    "Sigmoid first": "q = Mul(quick, x) s = Sigmoid(q) y = Mul(s, x)",
}
HARD_SWISH = {
    "Clip and Div": "a = Add(x, three) r = Clip(a, zero, six) m = Mul(x, r) y = Div(m, six)",
    "Clip, Div first": "a = Add(x, three) r = Clip(a, zero, six) m = Div(r, six) y = Mul(x, m)",
    "Min and Max": "a = Add(three, x) l = Max(a, zero) r = Min(l, six) m = Mul(r, sixth) y = Mul(m, x)",
    "HardSigmoid": "s = HardSigmoid<alpha=0.16666667, beta=0.5>(x) y = Mul(x, s)",
    "the operator": "y = HardSwish(x)",
}


@pytest.mark.parametrize("spelling", GELU_ERF)
def test_gelu_with_erf(spelling: str) -> None:
    store = run(GELU_ERF[spelling].replace("'", '"'))
    assert ex.to_text(store) == "((%0 * 0.5) * (erf((%0 * 0.707107)) + 1))"


@pytest.mark.parametrize("spelling", GELU_TANH)
def test_gelu_with_tanh(spelling: str) -> None:
    store = run(GELU_TANH[spelling].replace("'", '"'))
    assert ex.to_text(store) == "(%0 * sigmoid((%0 * (((%0 * %0) * 0.0713548) + 1.59577))))"


@pytest.mark.parametrize("spelling", SILU)
def test_silu(spelling: str) -> None:
    assert ex.to_text(run(SILU[spelling])) in ("(%0 * sigmoid(%0))", "(sigmoid(%0) * %0)")


@pytest.mark.parametrize("spelling", QUICK_GELU)
def test_quick_gelu(spelling: str) -> None:
    assert ex.flops(run(QUICK_GELU[spelling])) == 3


@pytest.mark.parametrize("spelling", HARD_SWISH)
def test_hard_swish(spelling: str) -> None:
    assert ex.flops(run(HARD_SWISH[spelling])) == 5


def test_relu6_is_a_clamp() -> None:
    assert ex.to_text(run("r = Relu(x) y = Clip(r, zero, six)")) == "min(max(%0, 0), 6)"


def test_a_product_with_another_factor_keeps_it() -> None:
    text = (
        "(double[n,17] x, double[n,17] w) => (double[n,17] y) { a = Mul(x, rsqrt2) e = Erf(a) f = Add(e, one)"
        " y = Mul(w, f) }"
    )
    graph = check(model(text, CONSTANTS), {**FEEDS, "w": random(4, 17, seed=5)}, tolerance=TOLERANCE)
    assert kinds(graph) == {"Pointwise": 1}
