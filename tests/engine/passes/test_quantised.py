"""Products of dequantised tensors: which become products of 8-bit floats or integers, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engine.frontend import read
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.graph import Graph
from engine.passes import PASSES, Traits
from tests.engine import ir_interpreter
from tests.engine.passes.toolkit import kinds, only, random, views

F8, I8 = DType.F8E4M3, DType.I8
NATIVE = Traits(product_types=frozenset({F8, I8}), permuted_rows=True)
PLAIN = Traits(permuted_rows=True)


def levels(*shape: int, seed: int = 0) -> np.ndarray:
    return F8.convert(random(*shape, seed=seed).astype(np.float32))


def scales(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 2, shape).astype(np.float32)


def model(nodes: str, inputs: dict[str, tuple[int | str, ...]], weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A model of fp32 inputs and the output y, its nodes as ONNX text."""
    text = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in inputs.items())
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> test ({text}) => (y) {{ {nodes} }}')
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def quantised(name: str, scale: str = "sx", zero: str = "z", axis: str = "") -> str:
    """`name` through 8 bits and back, as d_name."""
    return (
        f"q_{name} = QuantizeLinear{axis}({name}, {scale}, {zero}) "
        f"d_{name} = DequantizeLinear{axis}(q_{name}, {scale}, {zero})"
    )


SX, SY, ZERO = np.float32(0.05), np.float32(0.1), np.zeros((), F8.numpy)
COMMON: dict[str, np.ndarray] = {"sx": np.array(SX), "sy": np.array(SY), "z": ZERO}


def check(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], traits: Traits = NATIVE) -> Graph:
    """The graph after the passes, whose outputs are those of the frontend's graph, in fp32. A sum in another order may
    round to the next of the 8-bit numbers; a handful may."""
    graph = read(proto.SerializeToString())
    (expected,) = ir_interpreter.run(graph, feeds).values()
    for rewrite in PASSES:
        rewrite(graph, traits)
        graph.validate()
    (got,) = ir_interpreter.run(graph, feeds).values()
    assert got.dtype == expected.dtype and got.shape == expected.shape
    off = np.abs(got.astype(np.float64) - expected)
    assert (
        np.linalg.norm(off) <= 1e-6 * np.linalg.norm(expected) or np.count_nonzero(off > 1e-5) <= expected.size // 200
    )
    return graph


def operands(graph: Graph) -> list[DType]:
    return [value.dtype for value in only(graph, ops.Gemm).inputs[:2]]


DENSE = f"{quantised('x')} d_w = DequantizeLinear<axis=1>(w, sw) p = MatMul(d_x, d_w) y = Add(p, b)"
DENSE_WEIGHTS = {**COMMON, "w": levels(64, 24), "sw": scales(24), "b": scales(24, seed=1)}
X = {"x": random(5, 7, 64).astype(np.float32)}


def test_a_dense_layer_multiplies_8_bits_with_its_scales_behind_the_sum() -> None:
    graph = check(model(DENSE, {"x": ("n", 7, 64)}, DENSE_WEIGHTS), X)
    product = only(graph, ops.Gemm)
    assert operands(graph) == [F8, F8]
    assert product.inputs[1].data is not None and product.inputs[1].data.nbytes == 64 * 24
    assert kinds(graph) == {"Pointwise": 1, "Gemm": 1}  # what quantises x, and the product
    (combined,) = [value for value in product.inputs[2:] if value.data is not None and value.name.endswith("scale")]
    assert combined.data is not None
    np.testing.assert_allclose(combined.data.reshape(-1), SX * DENSE_WEIGHTS["sw"], rtol=1e-6)


def test_what_quantises_the_result_is_its_store() -> None:
    text = DENSE.replace("y = Add(p, b)", "r = Add(p, b) t = Relu(r) q = QuantizeLinear(t, sy, z)")
    text += " d_v = DequantizeLinear(v, sx) d_q = DequantizeLinear(q, sy, z) y = MatMul(d_q, d_v)"
    weights = {**DENSE_WEIGHTS, "v": levels(24, 16, seed=3)}
    graph = check(model(text, {"x": ("n", 7, 64)}, weights), X)
    assert kinds(graph) == {"Pointwise": 1, "Gemm": 2}
    first, second = (node for node in graph.nodes if isinstance(node.op, ops.Gemm))
    assert first.output.dtype is F8 and second.inputs[0] is first.output


def test_targets_without_such_products_multiply_floats() -> None:
    graph = check(model(DENSE, {"x": ("n", 7, 64)}, DENSE_WEIGHTS), X, PLAIN)
    assert operands(graph) == [DType.F32, DType.F32]
    # Rounding to 8 bits and back is left, though nobody reads the 8 bits.
    casts = [e.dtype for node in graph.nodes for store in node.op.stores for e in ex.walk(store)]
    assert F8 in casts


def test_a_scale_of_fp16_and_rows_with_scales_of_their_own() -> None:
    text = """q = QuantizeLinear<axis=0>(x, sr, z) d = DequantizeLinear<axis=0>(q, sr, z)
        w1 = DequantizeLinear<axis=0>(w, sw) t = Transpose<perm=[1,0]>(w1) y = MatMul(d, t)"""
    weights = {**COMMON, "w": levels(24, 64), "sw": scales(24), "sr": scales(6, seed=2)}
    graph = check(model(text, {"x": (6, 64)}, weights), {"x": random(6, 64).astype(np.float32)})
    assert operands(graph) == [F8, F8]
    half = f"{quantised('x')} h = DequantizeLinear(w, sh) f = Cast<to=1>(h) y = MatMul(d_x, f)"
    weights = {**COMMON, "w": levels(64, 24), "sh": np.array(0.5, np.float16)}
    assert operands(check(model(half, {"x": ("n", 7, 64)}, weights), X)) == [F8, F8]


def test_gemm_with_transposed_weight_and_bias() -> None:
    text = f"{quantised('x')} d_w = DequantizeLinear<axis=0>(w, sw) y = Gemm<transB=1, alpha=0.5>(d_x, d_w, b)"
    weights = {**COMMON, "w": levels(24, 64), "sw": scales(24), "b": scales(24, seed=1)}
    graph = check(model(text, {"x": ("n", 64)}, weights), {"x": random(9, 64).astype(np.float32)})
    assert operands(graph) == [F8, F8]


def test_products_of_activations_and_heads() -> None:
    """Queries by keys, dequantised before they become heads."""
    text = f"""{quantised("x")} {quantised("k")}
        a = Reshape(d_x, heads) q = Transpose<perm=[0,2,1,3]>(a)
        c = Reshape(d_k, heads) e = Transpose<perm=[0,2,3,1]>(c) y = MatMul(q, e)"""
    weights = {**COMMON, "heads": np.array([0, 0, 4, 16])}
    feeds = {name: random(2, 7, 64, seed=i).astype(np.float32) for i, name in enumerate("xk")}
    graph = check(model(text, {"x": ("n", 7, 64), "k": ("n", 7, 64)}, weights), feeds)
    assert operands(graph) == [F8, F8]
    assert len(views(graph)) == 4


def test_others_that_read_what_is_dequantised_keep_it() -> None:
    text = DENSE.replace("y = Add(p, b)", "r = Add(p, b) s = ReduceMean<keepdims=1>(d_x, last) y = Mul(r, s)")
    graph = check(model(text, {"x": ("n", 7, 64)}, {**DENSE_WEIGHTS, "last": np.array([-1])}), X)
    assert operands(graph) == [F8, F8]


def test_a_weight_that_the_model_quantises_itself() -> None:
    text = f"{quantised('x')} {quantised('w', 'sx')} y = MatMul(d_x, d_w)"
    graph = check(model(text, {"x": ("n", 7, 64)}, {**COMMON, "w": random(64, 24).astype(np.float32)}), X)
    assert operands(graph) == [F8, F8]
    assert only(graph, ops.Gemm).inputs[1].is_constant


def test_a_computed_scale_for_all() -> None:
    text = """a = Abs(x) m = ReduceMax<keepdims=0>(a) s = Div(m, largest) q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z) d_w = DequantizeLinear(w, sx) y = MatMul(d, d_w)"""
    weights = {**COMMON, "w": levels(64, 24), "largest": np.array(448, np.float32)}
    graph = check(model(text, {"x": ("n", 7, 64)}, weights), X)
    assert operands(graph) == [F8, F8]


NOT_REWRITTEN = {
    "scales along k": f"{quantised('x')} d_w = DequantizeLinear<axis=0>(w, sk) y = MatMul(d_x, d_w)",
    "blocks along k": f"{quantised('x')} d_w = DequantizeLinear<axis=0, block_size=16>(w, sb) y = MatMul(d_x, d_w)",
    "one operand is not quantised": "d_w = DequantizeLinear<axis=1>(w, sw) y = MatMul(x, d_w)",
    "something comes in between": f"{quantised('x')} d_w = DequantizeLinear(w, sx) e = Relu(d_x) y = MatMul(e, d_w)",
}


@pytest.mark.parametrize("case", NOT_REWRITTEN)
def test_what_stays_a_product_of_floats(case: str) -> None:
    weights = {**DENSE_WEIGHTS, "sk": scales(64), "sb": scales(4, 24)}
    graph = check(model(NOT_REWRITTEN[case], {"x": ("n", 7, 64)}, weights), X)
    assert operands(graph) == [DType.F32, DType.F32]


def test_a_pointwise_convolution_is_a_product_and_others_are_not() -> None:
    for kernel, native in ((1, True), (3, False)):
        text = f"{quantised('x')} d_w = DequantizeLinear<axis=0>(w, sw) y = Conv(d_x, d_w, b)"
        weights = {**COMMON, "w": levels(24, 32, kernel, kernel), "sw": scales(24), "b": scales(24, seed=1)}
        graph = check(model(text, {"x": ("n", 32, 6, 5)}, weights), {"x": random(2, 32, 6, 5).astype(np.float32)})
        assert [value.dtype is F8 for value in only(graph, ops.Conv).inputs[:2]] == [native, native]
    ragged = {**COMMON, "w": levels(24, 20, 1, 1), "sw": scales(24), "b": scales(24, seed=1)}
    graph = check(model(text, {"x": ("n", 20, 6, 5)}, ragged), {"x": random(2, 20, 6, 5).astype(np.float32)})
    assert only(graph, ops.Conv).inputs[0].dtype is DType.F32


def test_scales_do_not_go_into_weights_of_8_bits() -> None:
    """As those of a normalisation go into weights of floats."""
    text = DENSE.replace("y = Add(p, b)", "r = Mul(p, b) y = Relu(r)")
    graph = check(model(text, {"x": ("n", 7, 64)}, DENSE_WEIGHTS), X)
    weight = only(graph, ops.Gemm).inputs[1].data
    assert weight is not None and np.array_equal(weight.view(np.uint8), DENSE_WEIGHTS["w"].view(np.uint8))


def test_siblings_of_8_bits_merge() -> None:
    text = f"""{quantised("x")} d_w = DequantizeLinear<axis=1>(w, sw) d_v = DequantizeLinear<axis=1>(v, sv)
        p = MatMul(d_x, d_w) q = MatMul(d_x, d_v) s = Softmax(p) t = Softmax(q) y = Mul(s, t)"""
    weights = {**COMMON, "w": levels(64, 24), "v": levels(64, 24, seed=5), "sw": scales(24), "sv": scales(24, seed=5)}
    graph = check(model(text, {"x": ("n", 7, 64)}, weights), X)
    assert only(graph, ops.Gemm).inputs[1].shape == (64, 48) and operands(graph) == [F8, F8]


def test_the_narrow_storage_of_a_target_leaves_8_bits_alone() -> None:
    traits = replace(NATIVE, storage_type=DType.F16, float_types=frozenset({DType.F32, DType.F64}))
    graph = read(model(DENSE, {"x": ("n", 7, 64)}, DENSE_WEIGHTS).SerializeToString())
    for rewrite in PASSES:
        rewrite(graph, traits)
        graph.validate()
    assert operands(graph) == [F8, F8]


def test_a_zero_point_other_than_zero_is_refused() -> None:
    from engine.errors import ModelError

    weights = {**COMMON, "z": np.ones((), F8.numpy)}
    with pytest.raises(ModelError, match="no zero point but 0"):
        read(model(f"{quantised('x')} y = Relu(d_x)", {"x": (3,)}, weights).SerializeToString())


def integers(dtype: type, *shape: int, seed: int = 0) -> np.ndarray:
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max + 1, shape).astype(dtype)


INTEGERS = {
    "signed": (np.int8(0), np.int8, np.int8(0)),
    "with a zero point": (np.int8(-11), np.int8, np.int8(0)),
    "unsigned": (np.uint8(128), np.int8, np.int8(0)),
    "unsigned with a zero point": (np.uint8(77), np.int8, np.int8(0)),
    "unsigned weights": (np.uint8(3), np.uint8, np.uint8(128)),
}
"""Zero point of the activations, type of the weights and their zero point."""


@pytest.mark.parametrize("case", INTEGERS)
def test_layers_of_integers(case: str) -> None:
    zero, kind, weight_zero = INTEGERS[case]
    text = f"""{quantised("x")} d_w = DequantizeLinear<axis=1>(w, sw, zw) p = MatMul(d_x, d_w) r = Add(p, b)
        q = QuantizeLinear(r, sy, z) y = DequantizeLinear(q, sy, z)"""
    weights = {
        **DENSE_WEIGHTS, "z": np.array(zero), "w": integers(kind, 64, 24), "zw": np.full(24, weight_zero),
        "sw": scales(24) / 100,
    }  # fmt: skip
    graph = check(model(text, {"x": ("n", 7, 64)}, weights), X)
    assert operands(graph) == [I8, I8]
    product = only(graph, ops.Gemm)
    assert product.inputs[1].is_constant
    symmetric = zero == (128 if zero.dtype == np.uint8 else 0)
    assert any(value.name.endswith("sums") for value in product.inputs) == (not symmetric)
    # What quantises x, made signed in the same step; the product, with all up to its result's own rounding and back.
    assert kinds(graph) == {"Pointwise": 1, "Gemm": 1}


def test_scales_and_zero_points_that_are_computed() -> None:
    """As DynamicQuantizeLinear computes them."""
    text = """q, s, z = DynamicQuantizeLinear(x) d = DequantizeLinear(q, s, z)
        d_w = DequantizeLinear<axis=1>(w, sw) y = MatMul(d, d_w)"""
    weights = {"w": integers(np.int8, 64, 24), "sw": scales(24) / 100}
    graph = check(model(text, {"x": ("n", 7, 64)}, weights), X)
    assert operands(graph) == [I8, I8]


def test_zero_points_of_weights_stay_with_floats() -> None:
    text = f"{quantised('x')} d_w = DequantizeLinear<axis=1>(w, sw, zw) y = MatMul(d_x, d_w)"
    weights = {**DENSE_WEIGHTS, "z": np.zeros((), np.int8), "w": integers(np.int8, 64, 24)}
    weights["zw"] = np.arange(24, dtype=np.int8)
    assert operands(check(model(text, {"x": ("n", 7, 64)}, weights), X)) == [DType.F32, DType.F32]


def test_zero_points_beside_computed_operands_stay_with_floats() -> None:
    text = f"{quantised('x')} {quantised('k')} t = Transpose<perm=[0,2,1]>(d_k) y = MatMul(d_x, t)"
    feeds = {name: random(2, 7, 64, seed=i).astype(np.float32) for i, name in enumerate("xk")}
    inputs: dict[str, tuple[int | str, ...]] = {"x": ("n", 7, 64), "k": ("n", 7, 64)}
    for zero, expected in ((0, I8), (3, DType.F32)):
        graph = check(model(text, inputs, {**COMMON, "z": np.array(zero, np.int8)}), feeds)
        assert operands(graph) == [expected, expected]


def test_the_operator_of_integers() -> None:
    """QLinearMatMul, which is written as the same formulas."""
    text = "q = QuantizeLinear(x, sx, z) r = QLinearMatMul(q, sx, z, w, sw, zw, sy, z) y = DequantizeLinear(r, sy, z)"
    weights = {**COMMON, "z": np.array(5, np.uint8), "w": integers(np.int8, 64, 24), "zw": np.zeros((), np.int8)}
    weights["sw"] = np.array(0.01, np.float32)
    assert operands(check(model(text, {"x": ("n", 7, 64)}, weights), X)) == [I8, I8]


def test_convolutions_of_integers_stay_with_floats() -> None:
    text = f"{quantised('x')} d_w = DequantizeLinear<axis=0>(w, sw) y = Conv(d_x, d_w, b)"
    weights = {**COMMON, "z": np.zeros((), np.int8), "w": integers(np.int8, 24, 32, 1, 1), "sw": scales(24) / 100}
    weights["b"] = scales(24, seed=1)
    graph = check(model(text, {"x": ("n", 32, 6, 5)}, weights), {"x": random(2, 32, 6, 5).astype(np.float32)})
    assert only(graph, ops.Conv).inputs[0].dtype is DType.F32


def test_helper_makes_what_onnx_reads() -> None:
    """The reference evaluator agrees with the interpreter on what the frontend makes of a dense layer."""
    from onnx.reference import ReferenceEvaluator

    proto = model(DENSE, {"x": ("n", 7, 64)}, DENSE_WEIGHTS)
    (expected,) = ReferenceEvaluator(proto).run(None, X)
    (got,) = ir_interpreter.run(read(proto.SerializeToString()), X).values()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert (
        helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0]).data_type == numpy_helper.from_array(ZERO).data_type
    )
