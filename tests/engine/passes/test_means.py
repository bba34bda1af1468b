"""`fuse_means`: the mean over all pixels joins the depthwise convolution before it, and nothing else does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.graph import Graph
from engine.ir.printer import graph_text
from engine.passes import Traits
from tests.engine import ir_interpreter
from tests.engine.passes.toolkit import kinds, load, model, only, random, rewritten

TRAITS = Traits(storage_type=DType.F16, conv_means=True)
W = {
    "k": (random(8, 1, 3, 3, seed=1) / 3).astype(np.float32), "b": random(8, seed=2).astype(np.float32),
    "full": (random(8, 8, 3, 3, seed=3) / 9).astype(np.float32), "p": (random(8, 8, 1, 1, seed=4)).astype(np.float32),
    "fc1": random(4, 8, 1, 1, seed=5).astype(np.float32), "fc2": random(8, 4, 1, 1, seed=6).astype(np.float32),
}  # fmt: skip
IMAGE = {"x": random(3, 8, 9, 11, seed=7).astype(np.float32)}
EXCITED = """(float[n,8,9,11] x) => (float[n,8,9,11] y) {{ e = Conv(x, p) d = {conv}(e, {k}, b) s = Sigmoid(d)
    a = Mul(d, s) m = {mean} f = Conv(m, fc1) r = Relu(f) g = Conv(r, fc2) h = Sigmoid(g) z = Mul(a, h)
    y = Conv(z, p) }}"""
DEPTHWISE = "Conv<pads=[1,1,1,1], group=8>"


def excited(conv: str = DEPTHWISE, mean: str = "GlobalAveragePool(a)", k: str = "k", traits: Traits = TRAITS) -> Graph:
    """The graph of a squeeze-and-excite block, having compared it with fp32."""
    proto = model(EXCITED.format(conv=conv, mean=mean, k=k), W)
    graph = rewritten(proto, traits=traits)
    (got,), (expected,) = (ir_interpreter.run(one, IMAGE).values() for one in (graph, load(proto)))
    assert np.linalg.norm(got - expected) <= 5e-3 * np.linalg.norm(expected)
    return graph


@pytest.mark.parametrize("mean", ["GlobalAveragePool(a)", "ReduceMean<axes=[2,3], keepdims=1>(a)"])
@pytest.mark.parametrize("storage", [DType.F16, DType.BF16], ids=["fp16", "bf16"])
def test_squeeze_and_excite(mean: str, storage: DType) -> None:
    traits = replace(TRAITS, storage_type=storage)
    proto = model(EXCITED.format(conv=DEPTHWISE, mean=mean, k="k"), W, opset=17)
    graph = rewritten(proto, traits=traits)
    assert kinds(graph) == {"Conv": 4, "ConvMean": 1, "Pointwise": 1}
    node = only(graph, ops.ConvMean)
    assert [value.shape[1:] for value in node.outputs] == [(8, 9, 11), (8, 1, 1)]
    assert {value.dtype for value in node.outputs} == {storage}
    (got,), (expected,) = (ir_interpreter.run(one, IMAGE).values() for one in (graph, load(proto)))
    assert np.linalg.norm(got - expected) <= (5e-3 if storage is DType.F16 else 4e-2) * np.linalg.norm(expected)


def test_a_target_without_such_convolutions_keeps_them_apart() -> None:
    assert kinds(excited(traits=replace(TRAITS, conv_means=False)))["Reduce"] == 1
    assert kinds(excited(traits=replace(TRAITS, storage_type=DType.F32)))["Reduce"] == 1


def test_of_a_full_convolution_the_mean_stays_apart() -> None:
    assert kinds(excited("Conv<pads=[1,1,1,1]>", k="full")) == {"Conv": 5, "Reduce": 1, "Pointwise": 1}


@pytest.mark.parametrize(
    "mean",
    [
        "ReduceMax<axes=[2,3], keepdims=1>(a)",
        "ReduceMean<axes=[1], keepdims=1>(a)",  # over channels
        "ReduceMean<axes=[3], keepdims=1>(a)",  # over columns only
    ],
)
def test_other_reductions_stay(mean: str) -> None:
    text = f"""(float[n,8,9,11] x) => (float[n,8,9,11] y) {{ a = {DEPTHWISE}(x, k, b) m = {mean} y = Sub(a, m) }}"""
    graph = rewritten(model(text, W, opset=17), traits=TRAITS)
    assert ops.ConvMean not in {type(node.op) for node in graph.nodes}
    assert sum(isinstance(node.op, ops.Reduce) for node in graph.nodes) == 1


def test_it_is_printed_as_a_convolution_with_two_results() -> None:
    (line,) = [line for line in graph_text(excited()).splitlines() if "ConvMean" in line]
    assert "ConvMean(" in line and "groups=8} :" in line
    assert line.endswith("; f16(acc)")
    assert "mean=" not in line


def test_flops_and_bytes_are_those_of_both() -> None:
    """The result is written once and not read again; the mean is written, too."""
    x, w, y, mean = (_Sized(shape) for shape in ((2, 8, 9, 11), (8, 1, 3, 3), (2, 8, 9, 11), (2, 8, 1, 1)))
    conv = ops.Conv((1, 1), ((1, 1), (1, 1)), (1, 1), 8)
    both = ops.ConvMean(conv, only(excited(), ops.ConvMean).op.mean)
    assert both.bytes((x, w), (y, mean)) == conv.bytes((x, w), (y,)) + mean.nbytes
    assert both.flops((x, w), (y, mean)) == conv.flops((x, w), (y,)) + y.elements


class _Sized:
    """A tensor of fp16."""

    dtype = DType.F16

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.elements = int(np.prod(shape))
        self.nbytes = 2 * self.elements
