"""`fuse_maxima`: a convolution that only a max pool reads stores the maxima, where what follows its sums rises with
them, and no other does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.graph import Graph
from engine.ir.printer import graph_text
from engine.passes import Traits
from tests.engine.passes.toolkit import check, kinds, model, only, random, rewritten

TRAITS = Traits(storage_type=DType.F16, conv_maxima=True)
W = {
    "k": (random(8, 8, 3, 3, seed=1) / 9).astype(np.float32), "b": random(8, seed=2).astype(np.float32),
    "few": (random(8, 3, 3, 3, seed=3) / 5).astype(np.float32), "c": random(1, 8, 1, 1, seed=4).astype(np.float32),
    "deep": (random(8, 4, 3, 3, seed=5) / 6).astype(np.float32),
}  # fmt: skip
IMAGE, PHOTO = {"x": random(3, 8, 9, 11, seed=7).astype(np.float32)}, {"x": random(2, 3, 17, 14, seed=8)}
CONV, POOL = "Conv<pads=[1,1,1,1]>", "MaxPool<kernel_shape=[2,2], strides=[2,2]>"
THREES = "MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>"


def pooled(body: str, traits: Traits = TRAITS, image: dict[str, np.ndarray] = IMAGE) -> Graph:
    """The graph of `body`, from x to y, having compared it with fp32."""
    channels, height, width = next(iter(image.values())).shape[1:]
    text = f"(float[n,{channels},{height},{width}] x) => (float[n,m,h,w] y) {{ {body} }}"
    feeds = {name: array.astype(np.float32) for name, array in image.items()}
    return check(model(text, W), feeds, traits=traits, tolerance=5e-3)


@pytest.mark.parametrize(
    "body",
    [
        f"a = {CONV}(x, k, b) y = {POOL}(a)",
        f"a = {CONV}(x, k, b) r = Relu(a) y = {POOL}(r)",
        f"a = {CONV}(x, k, b) r = Sigmoid(a) y = {POOL}(r)",
        f"a = {CONV}(x, k, b) r = Relu(a) p = {POOL}(r) y = Relu(p)",
        f"a = {CONV}(x, k) p = {POOL}(a) y = Add(p, c)",
        f"a = Conv<pads=[0,1,2,1], strides=[1,2]>(x, k, b) t = Tanh(a) y = {POOL}(t)",
    ],
    ids=["sums", "relu", "sigmoid", "relu on either side", "shift behind the pool", "strides"],
)
@pytest.mark.parametrize("storage", [DType.F16, DType.BF16], ids=["fp16", "bf16"])
def test_what_rises_joins(body: str, storage: DType) -> None:
    proto_tolerance = replace(TRAITS, storage_type=storage)
    if storage is DType.F16:
        assert kinds(pooled(body, proto_tolerance)) == {"ConvMax": 1}
    else:
        text = f"(float[n,8,9,11] x) => (float[n,m,h,w] y) {{ {body} }}"
        assert kinds(rewritten(model(text, W), traits=proto_tolerance)) == {"ConvMax": 1}


@pytest.mark.parametrize(
    "body",
    [
        f"a = {CONV}(x, k, b) r = Relu(a) g = Neg(r) y = {POOL}(g)",
        f"a = {CONV}(x, k, b) s = Sigmoid(a) m = Mul(a, s) y = {POOL}(m)",
        f"a = {CONV}(x, k, b) g = Abs(a) y = {POOL}(g)",
        f"a = {CONV}(x, k, b) r = Add(a, x) y = {POOL}(r)",
        f"a = {CONV}(x, k, b) p = {POOL}(a) q = {POOL}(p) z = GlobalMaxPool(a) y = Add(q, z)",
        f"a = {CONV}(x, k, b) y = MaxPool<kernel_shape=[2,2], strides=[1,1]>(a)",
        f"a = {CONV}(x, k, b) y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(a)",
        f"a = {CONV}(x, k, b) y = MaxPool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(a)",
        f"a = {CONV}(x, k, b) y = MaxPool<kernel_shape=[2,2], strides=[2,2], pads=[1,1,1,1]>(a)",
        f"a = {CONV}(x, k, b) y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(a)",
        f"a = Conv<pads=[1,1,1,1], group=2>(x, deep, b) y = {POOL}(a)",
        f"a = ConvTranspose<pads=[1,1,1,1]>(x, k) y = {POOL}(a)",
        f"y = {POOL}(x)",
    ],
    ids=[
        "falls", "silu", "turns", "residual", "read elsewhere", "overlaps", "3×3 of many channels", "ceil mode", "pads",
        "average", "groups", "transposed", "no convolution",
    ],
)  # fmt: skip
def test_others_stay_apart(body: str) -> None:
    assert "ConvMax" not in kinds(pooled(body))


@pytest.mark.parametrize("pads", ["[1,1,1,1]", "[0,0,0,0]", "[0,1,1,0]"])
def test_a_first_layer_joins_the_pool_of_residual_networks(pads: str) -> None:
    pool = f"MaxPool<kernel_shape=[3,3], strides=[2,2], pads={pads}>"
    graph = pooled(f"a = Conv<pads=[1,1,1,1], strides=[2,1]>(x, few, b) r = Relu(a) y = {pool}(r)", image=PHOTO)
    assert kinds(graph) == {"ConvMax": 1}
    node = only(graph, ops.ConvMax)
    assert node.inputs[0].dtype is DType.F32, "the image is read as it comes"
    (line,) = [line for line in graph_text(graph).splitlines() if "ConvMax" in line]
    assert "max(" in line


def test_a_target_without_such_convolutions_keeps_them_apart() -> None:
    body = f"a = {CONV}(x, k, b) y = {POOL}(a)"
    assert kinds(pooled(body, replace(TRAITS, conv_maxima=False))) == {"Conv": 1, "Pool": 1}
    assert kinds(pooled(body, replace(TRAITS, storage_type=DType.F32))) == {"Conv": 1, "Pool": 1}
