"""`divide_rows` where a product adds what a layer norm makes: the residual is normalised there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine import frontend, passes
from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node
from engine.passes import Traits
from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.families import traits_of
from tests.engine.passes.test_divided_rows import FIXTURES, TOLERANCE, TRAITS, close
from tests.engine.passes.toolkit import kinds, load, model, random

K, N = 72, 96
W = {
    "h0": random(24, K, seed=1) / 5, "hb": random(K, seed=2) * 3, "far": np.float32(30),
    "wo": random(K, K, seed=3) / np.sqrt(K), "bo": random(K, seed=4), "g1": random(K, seed=5) + 1,
    "s1": random(K, seed=6), "w1": random(K, N, seed=7) / np.sqrt(K), "b1": random(N, seed=8),
    "w2": random(N, K, seed=9) / np.sqrt(N), "b2": random(K, seed=10), "g2": random(K, seed=11) + 1,
    "s2": random(K, seed=12), "w3": random(K, N, seed=13) / np.sqrt(K), "w4": random(N, K, seed=14) / np.sqrt(N),
    "two": np.float32(2),
}  # fmt: skip
WEIGHTS = {name: array.astype(np.float32) for name, array in W.items()}
NORM = "LayerNormalization<axis=-1, epsilon=0.00001>"
HALVES = f"""(float[b,t,24] x) => (float[b,t,72] y) {{
    d = MatMul(x, h0) h = Add(d, hb) n1 = {NORM}(h, g1, s1)
    m1 = MatMul(n1, w1) a1 = Add(m1, b1) r1 = Relu(a1) m2 = MatMul(r1, w2) a2 = Add(m2, b2) u = Add(a2, n1)
    n2 = {NORM}(u, g2, s2)
    m3 = MatMul(n2, w3) r3 = Relu(m3) m4 = MatMul(r3, w4) y = Add(m4, n2) }}"""
"""Two half-layers, each a norm that a product reads and another one adds; the second has no biases."""

POST_NORM = [
    "bert_legacy", "bert-eager-legacy-17-ort_level_2", "distilbert_dynamo", "albert-sdpa-legacy-14", "roberta_dynamo",
    "mpnet-eager-legacy-14", "torch_encoder-eager-dynamo-18",
]  # fmt: skip


def rewritten(text: str = HALVES, dtype: DType = DType.F16, tolerance: float = 1.0) -> Graph:
    """The graph of a model, whose results have been compared with those before the passes."""
    proto = model(text, {name: array for name, array in WEIGHTS.items() if f" {name})" in text or f" {name}," in text})
    graph = passes.run(load(proto), TRAITS[dtype])
    graph.validate()
    x = np.random.default_rng(0).standard_normal((3, 5, 24)).astype(np.float32)
    close(graph, load(proto), {"x": x}, TOLERANCE[dtype] * tolerance)
    return graph


def products(graph: Graph) -> list[tuple[Node, ops.Gemm]]:
    return [(node, node.op) for node in graph.nodes if isinstance(node.op, ops.Gemm)]


@pytest.mark.parametrize("dtype", TRAITS)
def test_a_chain_of_half_layers_has_no_norms(dtype: DType) -> None:
    """The product that makes a sum leaves factors and offsets of its rows; the next but one normalises it."""
    graph = rewritten(dtype=dtype)
    assert kinds(graph) == {"Pointwise": 1, "Gemm": 5}
    (h, op0), (_, op1), (u, op2), (_, op3), (y, op4) = products(graph)
    assert [op.divided for op in (op0, op1, op2, op3, op4)] == [False, True, False, True, False]
    assert [op.offsets for op in (op0, op1, op2, op3, op4)] == [True, False, True, False, False]
    for adds, made in ((u, h), (y, u)):
        assert adds.inputs[2:5] == made.outputs
        scale = adds.inputs[5]
        assert (scale.dtype, scale.shape) == (DType.F32, (K,))
    assert len(u.inputs) == 7 and len(y.inputs) == 7, "one bias for those of the norm and of the product"
    assert np.allclose(u.inputs[6].data, W["b2"] + W["s1"], atol=1e-6)
    assert np.allclose(y.inputs[6].data, W["s2"], atol=1e-6)


def test_a_norm_without_a_shift_needs_no_bias() -> None:
    text = HALVES.replace("(u, g2, s2)", "(u, g2)")
    assert len(rewritten(text).nodes[-1].inputs) == 6


def test_a_mean_far_from_zero_costs_what_rounding_the_rows_costs() -> None:
    text = HALVES.replace("h = Add(d, hb)", "e = Add(d, hb) h = Add(e, far)")
    assert "Norm" not in kinds(rewritten(text, tolerance=30))


def test_rows_that_no_product_computes_have_factors_and_offsets_of_a_node() -> None:
    text = HALVES.replace("h = Add(d, hb)", "e = Add(d, hb) f = Softmax(e) h = Mul(f, two)")
    graph = rewritten(text)
    factors = [node for node in graph.nodes if isinstance(node.op, ops.RowFactors)]
    assert [node.op for node in factors] == [ops.RowFactors(float(np.float32(1e-5)), offsets=True)]
    assert "Norm" not in kinds(graph)


def test_a_product_that_is_asked_again_leaves_offsets_too() -> None:
    """Two norms of one sum, of which the second one only is added."""
    text = HALVES.replace("m3 = MatMul(n2, w3)", f"n3 = {NORM}(u, g1, s1) m5 = MatMul(n3, w3) m3 = Neg(m5)")
    text = text.replace("n2 = ", "n9 = ").replace("(m4, n2)", "(m4, n3)").replace(
        "n3 = ", f"n0 = {NORM}(u, g2, s2) m0 = MatMul(n0, w1) n3 = "
    ).replace("r3 = Relu(m3)", "r0 = Add(m3, m0) r3 = Relu(r0)")  # fmt: skip
    graph = rewritten(text)
    assert "Norm" not in kinds(graph)
    assert [op.offsets for _, op in products(graph) if op.factors is not None] == [True, True]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("y = Add(m4, n2)", "t4 = Tanh(m4) y = Add(t4, n2)"),
        ("y = Add(m4, n2)", "t4 = Mul(n2, two) y = Add(m4, t4)"),
        ("y = Add(m4, n2)", "t4 = Add(m4, u) y = Add(t4, n2)"),
        ("y = Add(m4, n2)", "t4 = Relu(n2) y = Add(m4, t4)"),
        ("m3 = MatMul(n2, w3)", f"o2 = {NORM}(n2, g1, s1) m3 = MatMul(o2, w3)"),
        ("r3 = Relu(m3) m4 = MatMul(r3, w4)", "m4 = MatMul(n2, wo)"),
    ],
    ids=["what is no sum", "scaled", "beside another", "clamped", "another norm reads it", "a product of itself"],
)
def test_what_stays_a_norm(old: str, new: str) -> None:
    """What is not proved to be a sum of products, constants and the residual, or has another reader."""
    assert old in HALVES
    graph = rewritten(HALVES.replace(old, new))
    assert kinds(graph)["Norm"] >= 1
    assert [op.offsets for _, op in products(graph)].count(True) <= 1


def test_a_product_does_not_divide_rows_beside_a_residual_that_it_normalises() -> None:
    """Whichever of its two norms comes first: one stays."""
    text = """(float[b,t,24] x) => (float[b,t,72] y) {
        d = MatMul(x, h0) h = Add(d, hb) n1 = NORM(h, g1, s1)
        m1 = MatMul(n1, w1) r1 = Relu(m1) m2 = MatMul(r1, w4) u = Add(m2, b2) n2 = NORM(u, g2, s2)
        m3 = MatMul(FIRST, wo) y = Add(m3, SECOND) }""".replace("NORM", NORM)
    for first, second in (("n1", "n2"), ("n2", "n1")):
        graph = rewritten(text.replace("FIRST", first).replace("SECOND", second))
        assert kinds(graph)["Norm"] == 1
        of_rows = {op.divided: sum(value.shape[-1] == 1 for value in node.inputs) for node, op in products(graph)[2:]}
        assert of_rows[first == "n1"] == (1 if first == "n1" else 2), "a factor, or a factor and an offset"


@pytest.mark.parametrize("name", POST_NORM)
@pytest.mark.parametrize("dtype", TRAITS)
def test_post_norm_transformers_keep_the_norms_at_their_ends(name: str, dtype: DType) -> None:
    """The first one, where it sums embeddings, and the last, which is the result; the three between go."""
    path = FIXTURES / f"{name}.onnx"
    graph = passes.run(frontend.read(path), replace(traits_of(SM_90A), storage_type=dtype))
    graph.validate()
    assert kinds(graph)["Norm"] == (1 if name.startswith("torch") else 2)
    assert kinds(graph)["RowFactors"] == 0
    assert [sum(op.offsets for _, op in products(graph)), sum(op.divided for _, op in products(graph))] == [3, 3]
    data = np.load(path.with_suffix(".npz"))
    feeds = {value.name: data[f"in_{value.name}"] for value in graph.inputs}
    close(graph, frontend.read(path), feeds, TOLERANCE[dtype] * 2)


def test_other_targets_and_types_keep_their_norms() -> None:
    path = Path(FIXTURES / "bert_legacy.onnx")
    for traits in (Traits(), traits_of(SM_80), replace(traits_of(SM_90A), storage_type=DType.F32)):
        graph = passes.run(frontend.read(path), traits)
        assert kinds(graph)["Norm"] == 5
        assert not any(op.divided or op.offsets for _, op in products(graph))
