"""`fuse_means`: the mean over all pixels joins the depthwise convolution before it, and nothing else does;
`fuse_excitations`: the layers of a squeeze-and-excite block are one, and join the convolution, too."""

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
from tests.engine.passes.toolkit import check, kinds, load, model, only, random, rewritten

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
    return check(model(EXCITED.format(conv=conv, mean=mean, k=k), W), IMAGE, traits=traits, tolerance=5e-3)


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


EXCITING = replace(TRAITS, excitations=True)


def test_the_layers_join_the_convolution() -> None:
    graph = excited(traits=EXCITING)
    assert kinds(graph) == {"Conv": 2, "ConvExcitation": 1, "Pointwise": 1}
    node = only(graph, ops.ConvExcitation)
    assert [value.shape[1:] for value in node.outputs] == [(8, 9, 11), (8, 1, 1)]
    assert [value.name for value in node.inputs[node.op.given :]] == ["fc1", "fc2"]
    (line,) = [line for line in graph_text(graph).splitlines() if "ConvExcitation" in line]
    assert "groups=8, given=3} : max(acc, 0) -> " in line
    assert line.endswith("; f16(sigmoid(acc))")


def test_the_layers_of_any_pool_are_one() -> None:
    apart = excited(traits=replace(EXCITING, conv_means=False))
    assert kinds(apart) == {"Conv": 3, "Reduce": 1, "Excitation": 1, "Pointwise": 1}
    full = excited("Conv<pads=[1,1,1,1]>", k="full", traits=EXCITING)
    assert kinds(full) == {"Conv": 3, "Reduce": 1, "Excitation": 1, "Pointwise": 1}


def test_layers_that_read_an_input_of_the_model_stay() -> None:
    """It is fp32."""
    text = "(float[n,8,1,1] x) => (float[n,8,1,1] y) { f = Conv(x, fc1) r = Relu(f) y = Conv(r, fc2, b) }"
    assert kinds(rewritten(model(text, W), traits=EXCITING)) == {"Conv": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("r = Relu(f) g = Conv(r, fc2, b) y = Sigmoid(g)", 1),
        ("r = Relu(f) g = Conv(r, fc2, b) s = Sigmoid(g) m = ReduceMean<axes=[1], keepdims=1>(r) y = Mul(s, m)", 0),
        ("r = Relu(f) g = Conv(r, odd) y = Sigmoid(g)", 0),
        ("r = Relu(f) g = Conv<pads=[1,1,1,1]>(r, fc3) y = Sigmoid(g)", 0),
        ("r = Mul(f, a) g = Conv(r, fc2, b) y = Sigmoid(g)", 0),
    ],
    ids=[
        "as it should be",
        "the hidden layer is read elsewhere",
        "six outputs",
        "3×3",
        "its tail reads what is computed",
    ],
)
def test_which_layers_are_joined(text: str, expected: int) -> None:
    more = {
        "odd": random(6, 4, 1, 1, seed=9).astype(np.float32), "fc3": random(8, 4, 3, 3, seed=9).astype(np.float32),
        "half": random(4, 8, 1, 1, seed=11).astype(np.float32),
    }  # fmt: skip
    head = (
        "(float[n,8,9,11] x) => (float[n,k,i,j] y) { m0 = GlobalAveragePool(x) p0 = Conv(m0, p, b) a = Conv(p0, half) "
    )
    proto = model(f"{head} f = Conv(p0, fc1) {text} }}", W | more, opset=17)
    graph = rewritten(proto, traits=EXCITING)
    joined = [node for node in graph.nodes if isinstance(node.op, ops.Excitation) and node.inputs[1].name == "fc1"]
    assert len(joined) == expected
    (got,), (wanted,) = (ir_interpreter.run(one, IMAGE).values() for one in (graph, load(proto)))
    assert np.linalg.norm(got - wanted) <= 5e-3 * np.linalg.norm(wanted)


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
