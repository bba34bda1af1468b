"""`scale_weights`: gates that scale an image move into the weights of the 1×1 convolution behind it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.graph import Graph
from engine.passes import Traits
from tests.engine import ir_interpreter
from tests.engine.passes.toolkit import check, kinds, load, model, only, random, rewritten

DOUBLE = Traits(scaled_weights=True, permuted_rows=True)
NARROW = Traits(storage_type=DType.F16, scaled_weights=True)
W = {"w": random(6, 8, 1, 1, seed=1), "b": random(6, seed=2), "k": random(8, 8, 3, 3, seed=3), "s": random(8, 8, 1, 1)}
IMAGE = {"x": random(3, 8, 9, 11, seed=4)}
GATED = """(double[n,8,9,11] x) => (double[n,6,9,11] y) {{ a = Conv<pads=[1,1,1,1]>(x, k) r = Relu(a)
    m = GlobalAveragePool(r) g = Conv(m, s) h = Sigmoid(g) z = {mul} {tail} }}"""
PLAIN = "y = Conv(z, w, b)"


def gated(tail: str = PLAIN, mul: str = "Mul(r, h)", traits: Traits = DOUBLE) -> Graph:
    return check(model(GATED.format(mul=mul, tail=tail), W), IMAGE, traits=traits)


def products(graph: Graph) -> int:
    return sum(isinstance(node.op, ops.Gemm) for node in graph.nodes)


@pytest.mark.parametrize("mul", ["Mul(r, h)", "Mul(h, r)"])
def test_gates_scale_weights(mul: str) -> None:
    graph = gated(mul=mul)
    assert kinds(graph) == {"Conv": 2, "Reduce": 1, "Pointwise": 1, "Gemm": 1}
    product, scaled = only(graph, ops.Gemm), only(graph, ops.Pointwise)
    assert [value.shape[-2:] for value in product.inputs] == [(99, 8), (8, 6), (6,)]
    assert scaled.output.shape[1:] == (6, 8), "channels lie together, as the product adds them up"


def test_an_activation_and_a_residual_stay_in_the_epilogue() -> None:
    graph = gated("q = Conv(x, w) p = Conv(z, w, b) t = Add(p, q) y = Relu(t)")
    assert products(graph) == 1
    product = only(graph, ops.Gemm)
    assert {value.shape[-2:] for value in product.inputs[2:]} == {(6,), (99, 6)}
    assert kinds(graph) == {"Conv": 3, "Reduce": 1, "Pointwise": 1, "Gemm": 1}


@pytest.mark.parametrize(
    ("tail", "mul"),
    [
        ("y = Conv(z, w, b)", "Mul(r, r)"),
        ("y = Conv(z, w, b)", "Add(r, h)"),
        ("t = Conv(z, w, b) u = ReduceMean<axes=[1,2,3], keepdims=1>(z) y = Mul(t, u)", "Mul(r, h)"),
        ("y = Conv<pads=[1,1,1,1]>(z, w3)", "Mul(r, h)"),
        ("y = Conv<group=2>(z, wg)", "Mul(r, h)"),
        ("t = Conv(z, w, b) y = Mul(t, v)", "Mul(r, h)"),
        ("t = Conv(z, s) y = Add(t, z)", "Mul(r, h)"),
        ("y = Conv(z, w, b)", "Mul(r, g)"),
    ],
    ids=[
        "no gate",
        "no product",
        "the scaled image is read elsewhere",
        "3×3",
        "groups",
        "a row of numbers in the tail",
        "the scaled image is the residual",
        "a gate of any size",
    ],
)
def test_what_stays_a_convolution(tail: str, mul: str) -> None:
    more = {"w3": random(6, 8, 3, 3, seed=5), "wg": random(6, 4, 1, 1, seed=6), "v": random(11, seed=7)}
    graph = check(model(GATED.format(mul=mul, tail=tail), W | more, opset=17), IMAGE, traits=DOUBLE)
    assert products(graph) == 0


def test_of_few_pixels_the_image_is_scaled() -> None:
    text = GATED.replace("9,11", "5,9").format(mul="Mul(r, h)", tail=PLAIN)  # 45 pixels, 6 outputs
    small = {"x": random(3, 8, 5, 9, seed=4)}
    assert products(check(model(text, W), small, traits=DOUBLE)) == 0
    assert products(check(model(text.replace("5,9", "6,8"), W), {"x": random(3, 8, 6, 8)}, traits=DOUBLE)) == 1


def test_it_is_left_to_targets_that_want_it() -> None:
    assert products(gated(traits=replace(DOUBLE, scaled_weights=False))) == 0


def test_weights_are_scaled_in_fp32_and_stored_narrow() -> None:
    text = GATED.format(mul="Mul(r, h)", tail=PLAIN).replace("double", "float")
    feeds = {"x": IMAGE["x"].astype(np.float32)}
    proto = model(text, {name: (array / 4).astype(np.float32) for name, array in W.items()})
    graph = rewritten(proto, traits=NARROW)
    scaled = only(graph, ops.Pointwise)
    assert scaled.output.dtype is DType.F16
    assert {value.dtype for value in scaled.inputs} == {DType.F16}
    (got,), (expected,) = (ir_interpreter.run(one, feeds).values() for one in (graph, load(proto)))
    assert np.linalg.norm(got - expected) <= 5e-3 * np.linalg.norm(expected)


def test_gates_by_a_clip_scale_weights_too() -> None:
    tail = "t = Add(g, three) c = Clip(t, zero, six) h = Div(c, six) z = Mul(r, h) y = Conv(z, w, b) }"
    text = GATED.format(mul="", tail="").split("h = Sigmoid")[0] + tail
    more = {name: np.array(value, np.float64) for name, value in (("zero", 0), ("three", 3), ("six", 6))}
    assert products(check(model(text, W | more), IMAGE, traits=DOUBLE)) == 1


@pytest.mark.parametrize("size", [1e-3, 1.0, 1000.0])
@pytest.mark.parametrize("bias", [-7.0, 0.0])
def test_fp16_holds_scaled_weights_of_any_size(size: float, bias: float) -> None:
    """Gates of a thousandth, small weights: their product is below the normal numbers of fp16."""
    text = """(float[n,16,32,32] x) => (float[n,8,32,32] y) { r = Relu(x) m = GlobalAveragePool(r)
        g = Conv(m, s, c) h = Sigmoid(g) z = Mul(r, h) y = Conv(z, w) }"""
    weights = {
        "s": random(16, 16, 1, 1, seed=1).astype(np.float32), "c": np.full(16, bias, np.float32),
        "w": (size * random(8, 16, 1, 1, seed=2)).astype(np.float32),
    }  # fmt: skip
    image = (
        {"x": (random(2, 16, 32, 32, seed=3) / size).astype(np.float32)}
        if size > 1
        else {"x": random(2, 16, 32, 32, seed=3).astype(np.float32)}
    )
    before, after = load(model(text, weights)), rewritten(model(text, weights), traits=NARROW)
    assert products(after) == 1
    (expected,), (found,) = (ir_interpreter.run(graph, image).values() for graph in (before, after))
    error = np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)
    assert error < 4 * 2.0**-11
