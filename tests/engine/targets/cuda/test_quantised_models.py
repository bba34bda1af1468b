"""Models quantised to 8-bit floats, from the file to the kernels of the CUDA target (conftest.py says on what they
run)."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engine import frontend, passes
from engine.ir.dtype import DType
from engine.ir.graph import Graph
from engine.ir.ops import Conv, Gemm
from engine.plan.build import Constants, build
from engine.plan.plan import Plan
from engine.targets.cuda.kernel import Instruction
from tests.engine.ir_interpreter import run
from tests.engine.targets.cuda.harness import Runner
from tests.engine.targets.cuda.planning import CudaCapabilities, copies, cuda_traits, launches
from tests.engine.targets.cuda.test_packed_models import execute
from tests.engine.test_quantised_models import network

F8 = DType.F8E4M3
TOLERANCE = 2e-2
"""Relative L2. A number beside the middle of two of e4m3 may be rounded the other way, by 1/8 of itself: with storage
in fp16 and sums on wgmma (test_gemm_fp8.py) that is one of some hundred."""


def planned(proto: onnx.ModelProto, sizes: dict[str, int], storage: DType = DType.F16) -> tuple[Graph, Plan]:
    graph = passes.run(frontend.read(proto.SerializeToString()), cuda_traits(storage))
    return graph, build(graph, sizes, CudaCapabilities(), Constants())


def quantised(name: str) -> str:
    return f"q_{name} = QuantizeLinear({name}, s, z) d_{name} = DequantizeLinear(q_{name}, s, z)"


def model(text: str, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g {text}')
    common = {"s": np.array(0.02, np.float32), "z": np.zeros((), F8.numpy)}
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in {**common, **weights}.items()
    )
    return proto


def levels(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return F8.convert(rng.standard_normal(shape).astype(np.float32) * 8)


def check(runner: Runner, proto: onnx.ModelProto, feeds: dict[str, np.ndarray], sizes: dict[str, int]) -> Graph:
    """The kernels beside the frontend's graph."""
    (expected,) = run(frontend.read(proto.SerializeToString()), feeds).values()
    graph: Graph | None = None
    for storage in (DType.F16, DType.F32):
        graph, plan = planned(proto, sizes, storage)
        (got,) = execute(runner, plan, dict(feeds)).values()
        error = float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))
        assert error <= TOLERANCE, f"{storage}: {error:.1e}"
    assert graph is not None
    return graph


def product_types(graph: Graph) -> list[DType]:
    return [v.dtype for node in graph.nodes if isinstance(node.op, Gemm | Conv) for v in node.inputs[:2]]


def test_a_network_runs_as_two_products_of_8_bits(runner: Runner) -> None:
    rng = np.random.default_rng(0)
    graph = check(runner, network(rng), {"x": rng.standard_normal((70, 48)).astype(np.float32)}, {"n": 70})
    assert product_types(graph) == [F8] * 4
    assert len(graph.nodes) == 3, "the input is quantised, the hidden layer by the first product"
    first = next(node for node in graph.nodes if isinstance(node.op, Gemm))
    assert first.output.dtype is F8


def test_its_products_are_of_warpgroups_on_an_h100() -> None:
    rng = np.random.default_rng(0)
    text = f"""(float[n,1024] x) => (float[n,4096] y) {{ {quantised("x")}
        d = DequantizeLinear<axis=1>(w, t) a = MatMul(d_x, d) b = Gelu(a) {quantised("b")}
        e = DequantizeLinear(v, s) y = MatMul(d_b, e) }}"""
    weights = {"w": levels(rng, 1024, 1024), "v": levels(rng, 1024, 4096), "t": np.ones(1024, np.float32)}
    _, plan = planned(model(text, weights), {"n": 4096})
    made = launches(plan)
    assert [launch.kernel.instruction for launch in made] == [
        Instruction.NONE, Instruction.WGMMA_FP8, Instruction.WGMMA_FP8
    ]  # fmt: skip
    assert copies(plan) == []


@pytest.mark.parametrize("channels", [32, 48])
def test_a_pointwise_convolution(runner: Runner, channels: int) -> None:
    rng = np.random.default_rng(1)
    text = f"""(float[n,{channels},5,6] x) => (float[n,24,5,6] y) {{ {quantised("x")}
        d = DequantizeLinear<axis=0>(w, t) a = Conv(d_x, d, b) y = Relu(a) }}"""
    weights = {"w": levels(rng, 24, channels, 1, 1), "t": rng.uniform(0.01, 0.02, 24).astype(np.float32)}
    weights["b"] = rng.standard_normal(24).astype(np.float32)
    feeds = {"x": rng.standard_normal((3, channels, 5, 6)).astype(np.float32)}
    assert product_types(check(runner, model(text, weights), feeds, {"n": 3})) == [F8, F8]


def test_heads_and_what_lies_between_them(runner: Runner) -> None:
    """Queries by keys and probabilities by values, all quantised: k is not innermost in values as they come."""
    rng = np.random.default_rng(2)
    text = f"""(float[n,20,64] q, float[n,20,64] k, float[n,20,64] v) => (float[n,4,20,16] y) {{
        {quantised("q")} {quantised("k")} {quantised("v")}
        a = Reshape(d_q, heads) b = Transpose<perm=[0,2,1,3]>(a)
        c = Reshape(d_k, heads) e = Transpose<perm=[0,2,3,1]>(c) f = MatMul(b, e) p = Softmax<axis=-1>(f)
        {quantised("p")} g = Reshape(d_v, heads) h = Transpose<perm=[0,2,1,3]>(g) y = MatMul(d_p, h) }}"""
    feeds = {name: rng.standard_normal((2, 20, 64)).astype(np.float32) for name in "qkv"}
    graph = check(runner, model(text, {"heads": np.array([0, 0, 4, 16])}), feeds, {"n": 2})
    assert product_types(graph) == [F8] * 4


def test_what_is_quantised_for_nobody_is_still_rounded(runner: Runner) -> None:
    """Through 8 bits and back in one expression, as in front of what is no product."""
    rng = np.random.default_rng(3)
    text = f"(float[n,40] x) => (float[n,40] y) {{ {quantised('x')} y = Mul(d_x, d_x) }}"
    feeds = {"x": rng.standard_normal((7, 40)).astype(np.float32)}
    proto = model(text, {})
    (expected,) = run(frontend.read(proto.SerializeToString()), feeds).values()
    _, plan = planned(proto, {"n": 7}, DType.F32)
    (got,) = execute(runner, plan, dict(feeds)).values()
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert len(np.unique(np.abs(got))) < 100


def test_scales_along_k_are_products_of_floats(runner: Runner) -> None:
    rng = np.random.default_rng(4)
    text = f"""(float[n,64] x) => (float[n,24] y) {{ {quantised("x")}
        d = DequantizeLinear<axis=0>(w, t) y = MatMul(d_x, d) }}"""
    weights = {"w": levels(rng, 64, 24), "t": rng.uniform(0.01, 0.02, 64).astype(np.float32)}
    feeds = {"x": rng.standard_normal((9, 64)).astype(np.float32)}
    assert F8 not in product_types(check(runner, model(text, weights), feeds, {"n": 9}))


@pytest.mark.parametrize("zero", [np.int8(0), np.int8(-20), np.uint8(140)], ids=lambda zero: f"{zero.dtype} {zero}")
def test_a_network_of_integers(runner: Runner, zero: np.integer) -> None:
    """As the usual tools write it: activations with a zero point, weights per column without. The first product stores
    what the second one multiplies."""
    rng = np.random.default_rng(5)
    text = """(float[n,48] x) => (float[n,16] y) {
        qx = QuantizeLinear(x, s, z) dx = DequantizeLinear(qx, s, z) dw = DequantizeLinear<axis=1>(w, sw, zw)
        a = MatMul(dx, dw) b = Add(a, bias) h = Relu(b)
        qh = QuantizeLinear(h, sh, z) dh = DequantizeLinear(qh, sh, z) dv = DequantizeLinear<axis=0>(v, sv)
        y = Gemm<transB=1>(dh, dv) }"""
    weights = {
        "z": np.array(zero), "zw": np.zeros(32, np.int8), "w": rng.integers(-127, 128, (48, 32)).astype(np.int8),
        "v": rng.integers(-127, 128, (16, 32)).astype(np.int8), "bias": rng.standard_normal(32).astype(np.float32),
        "sw": rng.uniform(0.001, 0.002, 32).astype(np.float32), "sv": rng.uniform(0.001, 0.002, 16).astype(np.float32),
        "sh": np.array(0.03, np.float32),
    }  # fmt: skip
    proto = model(text, {})
    kept = [one for one in proto.graph.initializer if one.name not in weights]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend([*kept, *(numpy_helper.from_array(array, name) for name, array in weights.items())])
    graph = check(runner, proto, {"x": rng.standard_normal((70, 48)).astype(np.float32)}, {"n": 70})
    assert product_types(graph) == [DType.I8] * 4

    assert len(graph.nodes) == 3, "one quantises the input; unsigned levels are made signed where they are made"
