"""16-bit models on a target without 16-bit arithmetic: fp32 inside, the model's own types at its edges."""

from __future__ import annotations

import numpy as np

from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.graph import Graph
from engine.passes import Traits
from tests.engine import ir_interpreter
from tests.engine.passes.toolkit import load, model, random, rewritten

HALF = Traits(float_types=frozenset({DType.F32, DType.F64, DType.F16}))
TEXT = """(float16[n,6] x) => (float16[n,4] y, float16[n,4] m) { m = MatMul(x, w) a = Add(m, b) f = Cast<to=1>(a)
    e = Exp(f) g = Cast<to=10>(e) y = Relu(g) }"""
WEIGHTS = {"w": random(6, 4).astype(np.float16), "b": random(4).astype(np.float16)}


def inner_types(graph: Graph) -> set[DType]:
    outputs = set(graph.outputs)
    values = {v for node in graph.nodes for v in (*node.outputs, *node.inputs) if v not in graph.inputs}
    return {value.dtype for value in values if value not in outputs}


def test_half_precision_model_is_computed_in_fp32() -> None:
    proto = model(TEXT, WEIGHTS)
    graph = rewritten(proto)
    assert inner_types(graph) == {DType.F32}
    assert [value.dtype for value in (*graph.inputs, *graph.outputs)] == [DType.F16] * 3
    feeds = {"x": random(3, 6).astype(np.float16)}
    before, after = ir_interpreter.run(load(proto), feeds), ir_interpreter.run(graph, feeds)
    for name in before:
        np.testing.assert_allclose(after[name], before[name], rtol=4e-3)  # four roundings to fp16


def test_a_target_with_half_precision_keeps_it() -> None:
    graph = rewritten(model(TEXT, WEIGHTS), traits=HALF)
    gemm = next(node for node in graph.nodes if isinstance(node.op, ops.Gemm))
    assert gemm.inputs[1].dtype is DType.F16


def test_double_stays_double() -> None:
    graph = rewritten(model("(double[n,6] x) => (double[n,4] y) { y = MatMul(x, w) }", {"w": random(6, 4)}))
    assert inner_types(graph) == {DType.F64}


def test_foreign_operators_keep_the_types_of_onnx() -> None:
    text = "(float16[n] x) => (float16[n] y) { a = Exp(x) d = CumSum(a, axis) y = Relu(d) }"
    proto = model(text, {"axis": np.array(0)})
    graph = rewritten(proto)
    feeds = {"x": random(5).astype(np.float16)}
    after = ir_interpreter.run(graph, feeds)["y"]
    assert after.dtype == np.float16
    np.testing.assert_allclose(after, np.cumsum(np.exp(feeds["x"].astype(np.float64))), rtol=4e-3)


def test_layer_norm_with_casts_between_two_types_is_recognised() -> None:
    text = """(float16[n,8] x) => (float16[n,8] y) { f = Cast<to=1>(x) m = ReduceMean(f, axis) d = Sub(f, m)
        q = Pow(d, two) v = ReduceMean(q, axis) e = Add(v, eps) r = Sqrt(e) i = Div(d, r) h = Cast<to=10>(i)
        s = Mul(h, g) y = Add(s, b) }"""
    weights = {
        "axis": np.array([-1]), "two": np.array(2.0, np.float32), "eps": np.array(1e-5, np.float32),
        "g": random(8).astype(np.float16), "b": random(8, seed=1).astype(np.float16),
    }  # fmt: skip
    proto = model(text, weights)
    for traits in (Traits(), HALF):
        graph = rewritten(proto, traits=traits)
        counts = [type(node.op) for node in graph.nodes]
        assert counts.count(ops.Norm) == 1
        assert ops.Reduce not in counts
    feeds = {"x": random(5, 8).astype(np.float16)}
    before, after = ir_interpreter.run(load(proto), feeds)["y"], ir_interpreter.run(graph, feeds)["y"]
    np.testing.assert_allclose(after, before, rtol=4e-3, atol=4e-3)


def test_attention_in_half_precision_is_recognised() -> None:
    text = """(float16[b,s,8] x) => (float16[b,s,8] y) { t = Transpose<perm=[0,2,1]>(x) a = MatMul(x, t) s = Mul(a, c)
        f = Cast<to=1>(s) p = Softmax(f) h = Cast<to=10>(p) y = MatMul(h, x) }"""
    graph = rewritten(model(text, {"c": np.array(0.5, np.float16)}), traits=HALF)
    assert [type(node.op) for node in graph.nodes] == [ops.Attention]
