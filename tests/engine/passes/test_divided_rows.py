"""`divide_rows`: layer norms that only products read become part of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine import frontend, passes
from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.graph import Graph
from engine.passes import Traits
from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.families import traits_of
from tests.engine import ir_interpreter
from tests.engine.passes.toolkit import kinds, load, model, random

FIXTURES = Path(__file__).parents[2] / "fixtures"
TRAITS = {dtype: Traits(storage_type=dtype, permuted_rows=True, divided_rows=True) for dtype in (DType.F16, DType.BF16)}
TOLERANCE = {DType.F16: 2e-3, DType.BF16: 1.5e-2}
"""Relative L2 of results of products that round what they read to 16 bits."""
K, N = 200, 72
W = {
    "g": random(K, seed=1) + 1, "s": random(K, seed=2), "w": random(K, N, seed=3) / np.sqrt(K), "b": random(N, seed=4),
    "v": random(K, N, seed=5) / np.sqrt(K), "u": random(N, K, seed=6) / np.sqrt(N), "tiny": random(K, N, seed=7) * 1e-5,
    "odd": random(K - 1, seed=8), "wo": random(K - 1, N, seed=9) / np.sqrt(K),
    "h0": random(24, K, seed=10) / 5, "ho": random(24, K - 1, seed=11) / 5, "far": np.float32(30),
    "wide": random(N, seed=14) + 1, "square": random(N, N, seed=15) / np.sqrt(N),
    "b2": random(K, seed=13) + 1, "outliers": np.where(np.arange(K) % 67 == 5, random(K, seed=12) * 100, 3),
    "zero": np.array([0]), "one": np.array([1]),
}  # fmt: skip
WEIGHTS = {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in W.items()}
BLOCK = """(float[b,t,24] x) => (float[b,t,72] y) {{ h = MatMul(x, h0) n = {norm} {tail} }}"""
NORM = "LayerNormalization<axis=-1, epsilon=0.00001>(h, g, s)"
TAIL = "m = MatMul(n, w) y = Add(m, b)"


def rewritten(tail: str = TAIL, norm: str = NORM, dtype: DType = DType.F16, far: bool = False) -> Graph:
    """The graph of a model, whose results have been compared with those before the passes."""
    text = BLOCK.format(norm=norm, tail=tail)
    text = text.replace("h0", "ho") if "odd" in norm else text
    text = text.replace("n = ", "f = Slice(h, zero, one, one) n = ") if "(f," in norm else text
    text = text.replace("h = MatMul(x, h0)", "d = MatMul(x, h0) h = Add(d, far)") if far else text
    names = set(re.findall(r"\w+", text))
    proto = model(text, {name: array for name, array in WEIGHTS.items() if name in names})
    graph = passes.run(load(proto), TRAITS[dtype])
    graph.validate()
    x = np.random.default_rng(0).standard_normal((3, 5, 24)).astype(np.float32)
    close(graph, load(proto), {"x": x}, TOLERANCE[dtype] * (30 if far else 1))
    return graph


def close(graph: Graph, before: Graph, feeds: dict[str, np.ndarray], tolerance: float) -> None:
    expected = ir_interpreter.run(before, feeds)
    for name, got in ir_interpreter.run(graph, feeds).items():
        want = expected[name].astype(np.float64)
        assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def divided(graph: Graph) -> list[ops.Gemm]:
    return [node.op for node in graph.nodes if isinstance(node.op, ops.Gemm) and node.op.divided]


@pytest.mark.parametrize("dtype", TRAITS)
def test_a_norm_becomes_part_of_its_product(dtype: DType) -> None:
    graph = rewritten(dtype=dtype)
    assert kinds(graph) == {"Pointwise": 1, "Gemm": 2}
    host, product = graph.nodes[-2:]
    assert host.outputs == (product.inputs[0], product.inputs[2])
    x, weight, factors, *others = product.inputs
    assert isinstance(host.op, ops.Gemm)
    assert host.op.factors == np.float32(1e-5)
    assert (x.dtype, factors.dtype) == (dtype, DType.F32)
    assert factors.shape[-1] == 1
    assert [value.shape for value in others] == [(N,)], "one bias for that of the norm and that of the product"
    assert weight.data is not None
    columns = weight.data.astype(np.float64)
    assert np.abs(columns.sum(axis=0)).max() <= 2.0**-20, "nothing of the mean is left"
    exact = W["g"][:, None] * W["w"].astype(dtype.numpy).astype(np.float64)
    exact = exact - exact.mean(axis=0)
    lost, least = columns - exact, exact.astype(dtype.numpy).astype(np.float64) - exact
    assert np.linalg.norm(lost) <= 1.05 * np.linalg.norm(least), "to the nearest, but for a few"


def test_a_mean_far_from_zero_costs_what_rounding_the_rows_costs() -> None:
    """The rows are rounded to 16 bits where their mean is 30 deviations, which lose 30 times as much."""
    assert len(divided(rewritten(far=True))) == 1


@pytest.mark.parametrize("dtype", TRAITS)
def test_outlying_features_cost_what_they_cost_a_norm(dtype: DType) -> None:
    """As GPT-2 has them: a few of a hundred deviations of the others, which the norm scales down."""
    weights = {**WEIGHTS, "g": np.where(np.arange(K) % 67 == 5, 0.05, WEIGHTS["g"]).astype(np.float32)}
    text = BLOCK.format(norm=NORM, tail=TAIL).replace("h = MatMul(x, h0)", "d = MatMul(x, h0) h = Add(d, outliers)")
    proto = model(text, {name: weights[name] for name in ("h0", "outliers", "g", "s", "w", "b")})
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 5, 24)).astype(np.float32)}
    want = ir_interpreter.run(load(proto), feeds)["y"].astype(np.float64)
    lost = []
    for traits, norms in ((TRAITS[dtype], 0), (replace(TRAITS[dtype], divided_rows=False), 1)):
        graph = passes.run(load(proto), traits)
        assert kinds(graph).get("Norm", 0) == norms
        lost.append(np.linalg.norm(ir_interpreter.run(graph, feeds)["y"] - want))
    assert lost[0] <= 1.2 * lost[1] <= TOLERANCE[dtype] * np.linalg.norm(want)


def test_what_no_product_computes_has_its_factors_from_a_node() -> None:
    text = """(float[b,t,24] x) => (float[b,t,72] y) { a = MatMul(x, h0) s0 = Softmax(a) h = MatMul(s0, q)
        r = Relu(h) p = MatMul(r, q) e = Exp(p) f = Softmax<axis=1>(e) n = LayerNormalization<axis=-1>(f, g, s)
        y = MatMul(n, w) }"""
    weights = {name: WEIGHTS[name] for name in ("h0", "g", "s", "w")} | {"q": random(K, K).astype(np.float32) / 15}
    proto = model(text, weights)
    graph = passes.run(load(proto), TRAITS[DType.F16])
    assert kinds(graph)["RowFactors"] == 1
    assert kinds(graph)["Norm"] == 0
    close(graph, load(proto), {"x": np.ones((2, 3, 24), np.float32)}, 1e-2)


def test_a_product_finds_factors_of_one_epsilon() -> None:
    """Norms of its rows with another one stay."""
    second = "o = LayerNormalization<axis=-1, epsilon={}>(h, g, s) y1 = MatMul(n, w) y2 = MatMul(o, v) y = Add(y1, y2)"
    for epsilon, norms in (("0.00001", 0), ("0.5", 1)):
        graph = rewritten(second.format(epsilon))
        assert kinds(graph)["Norm"] == norms
        assert len(divided(graph)) == 2 - norms


def test_layers_with_one_weight_keep_one() -> None:
    """Where their norms have one scale."""
    norm = NORM.replace("(h, g,", "(r, {},")
    second = f"m1 = MatMul(n, w) r = MatMul(m1, u) o = {norm} y = MatMul(o, w)"
    for scale, count in (("g", 1), ("b2", 2)):
        graph = rewritten(second.format(scale))
        read = [node.inputs[1] for node in graph.nodes if isinstance(node.op, ops.Gemm) and node.op.divided]
        assert (len(read), len(set(map(id, read)))) == (2, count)


def test_a_product_that_divides_rows_does_not_find_factors() -> None:
    """Of its own result they are a node's."""
    norm = NORM.replace("(h, g, s)", "(r, wide, wide)")
    graph = rewritten(f"r = MatMul(n, w) o = {norm} y = MatMul(o, square)")
    assert len(divided(graph)) == 2
    assert kinds(graph)["RowFactors"] == 1
    assert [op.factors is None for op in divided(graph)] == [True, True]


@pytest.mark.parametrize(
    "tail",
    [
        "y = MatMul(n, w)",
        "m = MatMul(n, w) a = Add(m, b) y = Relu(a)",
        "m = MatMul(n, w) y = Sigmoid(m)",
        "m = MatMul(n, w) o = MatMul(n, v) t1 = Tanh(o) y = Mul(m, t1)",
        "m = MatMul(n, tiny) y = Add(m, b)",
    ],
)
def test_products_with_other_tails(tail: str) -> None:
    graph = rewritten(tail)
    assert divided(graph)
    assert not any(isinstance(node.op, ops.Norm) for node in graph.nodes)


def test_small_weights_keep_their_bits() -> None:
    """γ ⊙ W of 1e-5 would be below what fp16 has whole."""
    graph = rewritten("y = MatMul(n, tiny)")
    weight = graph.nodes[-1].inputs[1].data
    assert weight is not None
    assert 0.5 <= np.abs(weight).max() <= 1


@pytest.mark.parametrize(
    ("tail", "norm"),
    [
        ("m = MatMul(n, w) r = MatMul(m, u) t1 = Tanh(r) q = Add(t1, n) y = MatMul(q, v)", NORM),
        ("t1 = Tanh(n) y = MatMul(t1, w)", NORM),
        ("y = MatMul(n, w)", "LayerNormalization<axis=-1, epsilon=0.00001>(f, g, s)"),
        ("y = MatMul(n, wo)", "LayerNormalization<axis=-1, epsilon=0.00001>(h, odd)"),
    ],
    ids=[
        "a residual of what is no sum reads it",
        "no product reads it",
        "the first of several rows",
        "features that are no multiple of 8",
    ],
)
def test_what_stays_a_norm(tail: str, norm: str) -> None:
    graph = rewritten(tail, norm)
    assert not divided(graph)
    assert any(isinstance(node.op, ops.Norm) for node in graph.nodes)


@pytest.mark.parametrize("name", ["gpt2-eager-legacy-13", "gpt2_legacy", "vit-eager-legacy-11", "vit_dynamo"])
@pytest.mark.parametrize("dtype", TRAITS)
def test_pre_norm_transformers_keep_their_first_and_last_norm(name: str, dtype: DType) -> None:
    """The first one computes what it normalises, the last one is the result; of the four of two blocks three go."""
    path = FIXTURES / f"{name}.onnx"
    graph = passes.run(frontend.read(path), replace(traits_of(SM_90A), storage_type=dtype))
    graph.validate()
    assert kinds(graph)["Norm"] == 2
    assert len(divided(graph)) == 3
    assert sum(isinstance(node.op, ops.Gemm) and node.op.factors is not None for node in graph.nodes) == 3
    assert kinds(graph)["RowFactors"] == 0
    data = np.load(FIXTURES / f"{name}.npz")
    feeds = {value.name: data[f"in_{value.name}"] for value in graph.inputs}
    close(graph, frontend.read(path), feeds, TOLERANCE[dtype] * 2)


def test_other_targets_and_types_keep_their_norms() -> None:
    path = FIXTURES / "gpt2_legacy.onnx"
    for traits in (Traits(), traits_of(SM_80), replace(traits_of(SM_90A), storage_type=DType.F32)):
        graph = passes.run(frontend.read(path), traits)
        assert kinds(graph)["Norm"] == 5
        assert "RowFactors" not in kinds(graph)
