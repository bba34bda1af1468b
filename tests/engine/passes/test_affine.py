"""Scales and shifts per channel go into the weights of the product beside them, and only where that is exact."""

from __future__ import annotations

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir import ops
from engine.passes.operands import stores_of
from tests.engine.passes.toolkit import check, kinds, model, only, random

IMAGE = {"x": random(2, 4, 6, 6, seed=8)}


def weights(channels: int, inputs: int = 4) -> dict[str, np.ndarray]:
    return {
        "k": random(channels, inputs, 3, 3, seed=1), "kb": random(channels, seed=2), "scale": random(channels, seed=3),
        "shift": random(channels, seed=4), "mean": random(channels, seed=5), "var": random(channels, seed=6) ** 2 + 0.1,
        "c": random(channels, 1, 1, seed=7), "d": random(channels, 1, 1, seed=8), "two": np.array(2.0),
    }  # fmt: skip


AFTER = {
    "batch norm": "a = Conv<pads=[1,1,1,1]>(x, k) y = BatchNormalization(a, scale, shift, mean, var)",
    "bias and batch norm": "a = Conv(x, k, kb) y = BatchNormalization(a, scale, shift, mean, var)",
    "two batch norms": "a = Conv(x, k, kb) e = BatchNormalization(a, scale, shift, mean, var)"
    " y = BatchNormalization(e, scale, shift, mean, var)",
    "Mul and Add": "a = Conv(x, k) e = Mul(a, c) y = Add(d, e)",
    "Sub and Div": "a = Conv(x, k, kb) e = Sub(c, a) y = Div(e, two)",
    "batch norm and relu": "a = Conv<strides=[2,2]>(x, k) e = BatchNormalization(a, scale, shift, mean, var)"
    " y = Relu(e)",
}


@pytest.mark.parametrize("spelling", AFTER)
def test_affine_after_a_convolution(spelling: str) -> None:
    proto = model(f"(double[n,4,6,6] x) => (double[n,5,h,w] y) {{ {AFTER[spelling]} }}", weights(5))
    graph = check(proto, IMAGE, tolerance=1e-6 if "batch" in spelling else 1e-11)
    assert kinds(graph) == {"Conv": 1}
    assert ex.to_text(stores_of(only(graph, ops.Conv).op)[0]) in ("(acc + %2)", "max((acc + %2), 0)")


def test_grouped_and_transposed_convolutions() -> None:
    values = weights(6, 2) | {"kt": random(4, 3, 3, 3, seed=9)}
    text = """(double[n,4,6,6] x) => (double[n,6,h,w] y) {
        a = Conv<group=2>(x, k) e = Mul(a, c) f = ConvTranspose<group=2>(x, kt) g = Mul(f, c) p = Add(g, d)
        q = MaxPool<kernel_shape=[5,5]>(p) y = Add(q, e) }"""
    # onnx.reference has no grouped ConvTranspose.
    graph = check(model(text, values), IMAGE, reference=False)
    assert kinds(graph) == {"Conv": 2, "Pool": 1}
    assert {ex.flops(*stores_of(node.op)) for node in graph.nodes if isinstance(node.op, ops.Conv)} <= {0, 1}


def test_affine_after_a_gemm() -> None:
    values = {"w": random(4, 5), "b": random(5), "c": random(5, seed=1), "d": random(1, 1, 5, seed=2)}
    text = "(double[n,3,4] x) => (double[n,3,5] y) { m = MatMul(x, w) a = Add(m, b) e = Mul(a, c) y = Sub(e, d) }"
    graph = check(model(text, values), {"x": random(2, 3, 4)})
    assert ex.to_text(stores_of(only(graph, ops.Gemm).op)[0]) == "(acc + %2)"


def test_input_normalisation_before_a_convolution_without_padding() -> None:
    values = weights(5) | {"m": random(1, 4, 1, 1, seed=1), "s": random(1, 4, 1, 1, seed=2)}
    text = "(double[n,4,6,6] x) => (double[n,5,h,w] y) { a = Sub(x, m) e = Div(a, s) y = Conv(e, k, kb) }"
    graph = check(model(text, values), IMAGE)
    assert kinds(graph) == {"Conv": 1}


def test_scale_but_no_shift_passes_a_padded_convolution() -> None:
    values = weights(5) | {"m": random(1, 4, 1, 1, seed=1), "s": random(1, 4, 1, 1, seed=2)}
    scaled = "(double[n,4,6,6] x) => (double[n,5,h,w] y) { e = Mul(x, s) y = Conv<pads=[1,1,1,1]>(e, k) }"
    assert kinds(check(model(scaled, values), IMAGE)) == {"Conv": 1}
    shifted = "(double[n,4,6,6] x) => (double[n,5,h,w] y) { e = Add(x, m) y = Conv<pads=[1,1,1,1]>(e, k) }"
    assert kinds(check(model(shifted, values), IMAGE)) == {"Conv": 1, "Pointwise": 1}


def test_affine_before_a_gemm_and_a_grouped_convolution() -> None:
    values = {"w": random(4, 5), "c": random(4, seed=1), "d": random(4, seed=2)}
    text = "(double[n,3,4] x) => (double[n,3,5] y) { a = Mul(x, c) e = Add(a, d) y = MatMul(e, w) }"
    assert kinds(check(model(text, values), {"x": random(2, 3, 4)})) == {"Gemm": 1}
    values = weights(6, 2) | {"s": random(1, 4, 1, 1, seed=2), "m": random(1, 4, 1, 1, seed=3)}
    text = "(double[n,4,6,6] x) => (double[n,6,h,w] y) { a = Mul(x, s) e = Add(a, m) y = Conv<group=2>(e, k) }"
    assert kinds(check(model(text, values), IMAGE)) == {"Conv": 1}


NOT_AFTER = {
    "a constant that differs by pixel": ("a = Conv<pads=[1,1,1,1]>(x, k) y = Mul(a, full)", "* %2"),
    "a relu in between": ("a = Conv<pads=[1,1,1,1]>(x, k) e = Relu(a) y = Mul(e, c)", "max(acc, 0)"),
    "a residual in between": ("a = Conv<pads=[1,1,1,1]>(x, k) r = Conv<pads=[1,1,1,1]>(x, k, kb) e = Add(a, r)"
                              " y = Mul(e, c)", "*"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_AFTER)
def test_what_must_not_fold(case: str) -> None:
    body, kept = NOT_AFTER[case]
    proto = model(f"(double[n,4,6,6] x) => (double[n,5,6,6] y) {{ {body} }}", weights(5) | {"full": random(1, 5, 6, 6)})
    graph = check(proto, IMAGE)
    assert any(kept in ex.to_text(store) for node in graph.nodes for store in stores_of(node.op))


def test_weight_that_another_node_reads_is_not_changed_for_it() -> None:
    text = """(double[n,4,6,6] x) => (double[n,5,4,4] y, double[n,5,4,4] z) {
        a = Conv(x, k) y = Mul(a, c) z = Conv(x, k) }"""
    check(model(text, weights(5)), IMAGE)


def test_padding_node_becomes_the_padding() -> None:
    values = weights(5) | {"pads": np.array([0, 0, 1, 2, 0, 0, 2, 1]), "zero": np.array(0.0),
                           "low": np.array(-np.inf)}  # fmt: skip
    conv = "(double[n,4,6,6] x) => (double[n,5,h,w] y) { p = Pad(x, pads, zero) y = Conv<pads=[1,0,0,1]>(p, k) }"
    graph = check(model(conv, values), IMAGE)
    assert kinds(graph) == {"Conv": 1}
    assert only(graph, ops.Conv).op.pads == ((2, 2), (2, 2))  # type: ignore[attr-defined]
    pool = conv.replace("5,h,w", "4,h,w").replace("Conv<pads=[1,0,0,1]>(p, k)", "AveragePool<kernel_shape=[3,3]>(p)")
    assert kinds(check(model(pool, values), IMAGE)) == {"Pool": 1}
    largest = pool.replace("Average", "Max").replace("zero", "low")
    assert kinds(check(model(largest, values), IMAGE)) == {"Pool": 1}
    positive = largest.replace("p = Pad(x, pads, low)", "r = Relu(x) p = Pad(r, pads, zero)")
    assert kinds(check(model(positive, values), IMAGE)) == {"Pool": 1, "Pointwise": 1}


def test_padding_of_a_channels_last_image_becomes_the_padding() -> None:
    """Also where a second reader needs it padded in another way, and stays with the node."""
    values = weights(5) | {"pads": np.array([0, 1, 2, 0, 0, 2, 1, 0]), "zero": np.array(0.0)}
    text = """(double[n,6,6,4] x) => (double[n,h,w,5] y) { p = Pad(x, pads, zero) t = Transpose<perm=[0,3,1,2]>(p)
        v = Conv<pads=[1,0,0,1]>(t, k) y = Transpose<perm=[0,2,3,1]>(v) }"""
    graph = check(model(text, values), {"x": random(2, 6, 6, 4)})
    assert kinds(graph) == {"Conv": 1}
    assert only(graph, ops.Conv).op.pads == ((2, 2), (2, 2))  # type: ignore[attr-defined]
    both = text.replace("(double[n,h,w,5] y)", "(double[n,h,w,5] y, double[n,i,j,4] z)").replace(
        "v = Conv", "m = MaxPool<kernel_shape=[2,2]>(t) z = Transpose<perm=[0,2,3,1]>(m) v = Conv"
    )
    assert kinds(check(model(both, values), {"x": random(2, 6, 6, 4)})) == {"Pad": 1, "Conv": 1, "Pool": 1}


@pytest.mark.parametrize("pad", ["Pad(x, pads, one)", "Pad(x, channels, zero)", 'Pad<mode="edge">(x, pads)'])
def test_other_paddings_stay(pad: str) -> None:
    values = weights(5) | {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "zero": np.array(0.0), "one": np.array(1.0),
                           "channels": np.array([0, 1, 0, 0, 0, 0, 0, 0])}  # fmt: skip
    channels = 5 if "channels" in pad else 4
    values["k"] = random(5, channels, 3, 3)
    graph = check(model(f"(double[n,4,6,6] x) => (double[n,5,h,w] y) {{ p = {pad} y = Conv(p, k) }}", values), IMAGE)
    assert kinds(graph) == {"Pad": 1, "Conv": 1}


def test_zero_padding_before_a_maximum_of_signed_numbers_stays() -> None:
    values = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "zero": np.array(0.0)}
    text = """(double[n,4,6,6] x) => (double[n,4,h,w] y) {
        p = Pad(x, pads, zero) y = MaxPool<kernel_shape=[3,3]>(p) }"""
    assert kinds(check(model(text, values), {"x": -np.abs(random(2, 4, 6, 6))})) == {"Pad": 1, "Pool": 1}
