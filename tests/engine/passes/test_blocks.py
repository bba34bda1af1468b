"""`fuse_blocks`: a 1×1 convolution, a depthwise one and a 1×1 one become a block, where nobody else reads what lies
between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.graph import Graph
from engine.passes import Traits
from engine.passes.traits import ConvBlocks
from tests.engine.passes.toolkit import check, kinds, model, only, random

LIMITS = ConvBlocks(least=3, most=5, stride=2, multiple=8, channels=160, results=192)
TRAITS = Traits(storage_type=DType.F16, conv_blocks=LIMITS)
W = {
    "e": random(24, 8, 1, 1, seed=1) / 3, "eb": random(24, seed=2), "d": random(24, 1, 3, 3, seed=3) / 3,
    "db": random(24, seed=4), "p": random(8, 24, 1, 1, seed=5) / 5, "pb": random(8, seed=6),
    "six": np.array(6.0), "zero": np.array(0.0), "pixels": random(1, 24, 9, 11, seed=7),
    "first": random(8, 8, 3, 3, seed=11) / 6,
    "seven": random(24, 1, 7, 7, seed=12) / 7, "column": random(24, 1, 3, 1, seed=13) / 2,
    "shift": random(24, 1, 1, seed=14), "slopes": random(24, 1, 1, seed=15), "wide": random(200, 24, 1, 1, seed=16) / 5,
    "odd": random(20, 8, 1, 1, seed=17) / 3, "filters": random(20, 1, 3, 3, seed=18) / 3,
    "back": random(8, 20, 1, 1, seed=19) / 5,
    "full": random(24, 24, 3, 3, seed=8) / 15, "three": random(8, 24, 3, 3, seed=9) / 15,
}  # fmt: skip
W = {name: array.astype(np.float32) for name, array in W.items()}
FIRST = "i = Conv<pads=[1,1,1,1]>(x, first)"  # the graph's own image is in fp32
EXPAND = "a = Conv(i, e, eb) b = Clip(a, zero, six)"
FILTER = "c = Conv<pads=[1,1,1,1], group=24>(b, d, db) f = Clip(c, zero, six)"
PROJECT = "g = Conv(f, p, pb)"


def graph_of(body: str, traits: Traits = TRAITS) -> Graph:
    """The graph of `body`, from x to y, having compared it with fp32."""
    proto = model(f"(float[n,8,9,11] x) => (float[n,m,h,w] y) {{ {FIRST} {body} }}", W)
    return check(proto, {"x": random(3, 8, 9, 11, seed=10).astype(np.float32)}, traits=traits, tolerance=1e-2)


@pytest.mark.parametrize(
    "body",
    [
        f"{EXPAND} {FILTER} {PROJECT} y = Identity(g)",
        f"{EXPAND} {FILTER} {PROJECT} y = Add(g, i)",
        f"a = Conv(i, e) s = Sigmoid(a) b = Mul(a, s) {FILTER} y = Conv(f, p)",
        f"{EXPAND} f = Conv<pads=[0,1,2,1], strides=[2,2], group=24>(b, d) {PROJECT} y = Relu(g)",
    ],
    ids=["clamped", "residual", "SiLU, no biases", "stride, no function of the filtered"],
)
def test_a_block_is_one_operator(body: str) -> None:
    graph = graph_of(body)
    assert kinds(graph) == {"Conv": 1, "ConvBlock": 1}
    block = only(graph, ops.ConvBlock)
    assert isinstance(block.op, ops.ConvBlock)
    assert block.op.depthwise.groups == 24 and block.op.expand.is_pointwise
    assert "ConvBlock" not in kinds(graph_of(body, replace(TRAITS, conv_blocks=None)))


@pytest.mark.parametrize(
    "body",
    [
        f"{EXPAND} {FILTER} {PROJECT} m = GlobalAveragePool(b) q = Conv(m, p) y = Add(g, q)",
        f"{EXPAND} {FILTER} {PROJECT} m = GlobalAveragePool(f) q = Conv(m, p) y = Add(g, q)",
        f"{EXPAND} c = Conv<pads=[1,1,1,1], group=24>(b, d, db) f = Add(c, pixels) {PROJECT} y = Identity(g)",
        f"{EXPAND} f = Conv<pads=[1,1,1,1]>(b, full) {PROJECT} y = Identity(g)",
        f"{EXPAND} {FILTER} y = Conv<pads=[1,1,1,1]>(f, three)",
        f"{EXPAND} f = Conv<pads=[3,3,3,3], group=24>(b, seven) {PROJECT} y = Identity(g)",
        f"{EXPAND} f = Conv<pads=[1,0,1,0], group=24>(b, column) {PROJECT} y = Identity(g)",
        f"{EXPAND} f = Conv<pads=[1,1,1,1], strides=[1,2], group=24>(b, d) {PROJECT} y = Identity(g)",
        f"{EXPAND} f = Conv<pads=[2,2,2,2], dilations=[2,2], group=24>(b, d) {PROJECT} y = Identity(g)",
        f"{EXPAND} {FILTER} s = Add(f, shift) y = Conv(s, p)",
        f"a = Conv(i, e) b = PRelu(a, slopes) {FILTER} {PROJECT} y = Identity(g)",
        f"{EXPAND} {FILTER} y = Conv(f, wide)",
        "b = Conv(i, odd) f = Conv<pads=[1,1,1,1], group=20>(b, filters) y = Conv(f, back)",
    ],
    ids=[
        "expanded is read twice", "filtered is read twice", "added to pixels", "not depthwise", "not 1×1", "7×7", "3×1",
        "unequal strides", "dilated", "a shift behind the clamp", "slopes of channels", "too many results",
        "20 channels",
    ],
)  # fmt: skip
def test_others_stay_apart(body: str) -> None:
    assert "ConvBlock" not in kinds(graph_of(body))


def test_fp32_stays_apart() -> None:
    assert "ConvBlock" not in kinds(graph_of(f"{EXPAND} {FILTER} {PROJECT} y = Add(g, i)", Traits(conv_blocks=LIMITS)))
