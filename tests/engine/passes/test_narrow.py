"""`narrow_floats`: what is stored in fp16 or bf16, what stays fp32, and how far the default models move."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from engine import frontend, passes
from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.graph import Graph
from engine.passes import Traits
from tests.engine import ir_interpreter
from tests.engine.passes.toolkit import load, model, only, random, rewritten

F16 = Traits(storage_type=DType.F16)
BF16 = Traits(storage_type=DType.BF16)
# Relative L2: a rounding of each activation and weight, 2⁻¹¹ or 2⁻⁸, over the depth of the models.
BOUNDS = {DType.F16: 5e-3, DType.BF16: 4e-2}
Feeds = Mapping[str, np.ndarray]


def narrowed(proto: onnx.ModelProto, feeds: Feeds, traits: Traits = F16) -> Graph:
    """The graph in the narrow type, having compared it with fp32."""
    graph = rewritten(proto, traits=traits)
    for value, before in zip(graph.inputs, load(proto).inputs, strict=True):
        assert value.dtype is before.dtype
    got, expected = ir_interpreter.run(graph, feeds), ir_interpreter.run(load(proto), feeds)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        assert relative_error(got[name], array) <= BOUNDS[traits.storage_type]
    return graph


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    a, b = got.astype(np.float64), expected.astype(np.float64)
    assert np.isfinite(a).all()
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: (random(*shape) / np.sqrt(shape[0])).astype(np.float32) for name, shape in shapes.items()}


def feed(*shape: int) -> np.ndarray:
    return random(*shape, seed=1).astype(np.float32)


TWO_LAYERS = "(float[n,8] x) => (float[n,4] y) { h = MatMul(x, w) hb = Add(h, b) r = Relu(hb) y = MatMul(r, v) }"


@pytest.mark.parametrize("traits", [F16, BF16], ids=["fp16", "bf16"])
def test_products_store_narrow_and_outputs_stay(traits: Traits) -> None:
    proto = model(TWO_LAYERS, weights(w=(8, 16), b=(16,), v=(16, 4)))
    graph = narrowed(proto, {"x": feed(5, 8)}, traits)
    first, second = (node for node in graph.nodes if isinstance(node.op, ops.Gemm))
    assert first.output.dtype is traits.storage_type and second.output.dtype is DType.F32
    assert all(value.dtype is traits.storage_type for node in (first, second) for value in node.inputs[:2])
    assert first.inputs[2].dtype is DType.F32, "a bias stays fp32"


def test_fp32_storage_changes_nothing() -> None:
    graph = rewritten(model(TWO_LAYERS, weights(w=(8, 16), b=(16,), v=(16, 4))), traits=Traits())
    assert {value.dtype for node in graph.nodes for value in (*node.inputs, *node.outputs)} == {DType.F32}


def test_a_model_input_is_rounded_once_for_all_products() -> None:
    text = "(float[n,8] x) => (float[n,8] y) { a = MatMul(x, w) b = MatMul(x, v) ra = Relu(a) y = Add(ra, b) }"
    graph = narrowed(model(text, weights(w=(8, 8), v=(8, 8))), {"x": feed(5, 8)})
    casts = [node for node in graph.nodes if isinstance(node.op, ops.Pointwise)]
    assert len(casts) == 1 and casts[0].inputs == (graph.inputs[0],)


def test_an_image_is_rounded_by_the_first_convolution() -> None:
    text = "(float[n,3,8,8] x) => (float[n,4,6,6] y) { y = Conv(x, w) }"
    node = only(narrowed(model(text, weights(w=(4, 3, 3, 3))), {"x": feed(2, 3, 8, 8)}), ops.Conv)
    assert [value.dtype for value in node.inputs[:2]] == [DType.F32, DType.F16]


def test_a_result_that_is_also_an_output_is_stored_twice_by_its_kernel() -> None:
    text = "(float[n,8] x) => (float[n,8] h, float[n,4] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    graph = narrowed(model(text, weights(w=(8, 8), v=(8, 4))), {"x": feed(5, 8)})
    first = next(node for node in graph.nodes if isinstance(node.op, ops.Gemm))
    assert sorted(value.dtype.value for value in first.outputs) == ["f16", "f32"]


def test_logits_of_a_softmax_stay_fp32() -> None:
    text = "(float[n,8] x) => (float[n,4] y) { h = MatMul(x, w) p = Softmax(h) y = MatMul(p, v) }"
    graph = narrowed(model(text, weights(w=(8, 16), v=(16, 4))), {"x": feed(5, 8)})
    softmax = only(graph, ops.Softmax)
    assert softmax.inputs[0].dtype is DType.F32 and softmax.output.dtype is DType.F16


def test_a_sum_stays_fp32_and_a_mean_need_not() -> None:
    text = "(float[n,64,8] x) => (float[n,64,8] y) { s = REDUCE <keepdims = 1> (x, axes) y = Add(x, s) }"
    for kind, dtype in (("ReduceSum", DType.F32), ("ReduceMean", DType.F16)):
        proto = model(text.replace("REDUCE", kind))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axes"))
        assert only(narrowed(proto, {"x": feed(3, 64, 8)}), ops.Reduce).outputs[0].dtype is dtype


def test_a_mask_with_the_lowest_number_stays_fp32() -> None:
    text = """(float[n,8] x, float[n,8] m) => (float[n,8] y)
        { k = Sub(one, m) b = Mul(k, low) h = MatMul(x, w) s = Add(h, b) t = Softmax(s) y = MatMul(t, w) }"""
    given = {**weights(w=(8, 8)), "one": np.float32(1), "low": np.float32(-3.4e38)}
    mask = np.ones((4, 8), np.float32)
    mask[1:, 5:] = 0
    narrowed(model(text, given), {"x": feed(4, 8), "m": mask})


def test_a_weight_out_of_range_of_fp16_is_infinite_and_in_range_of_bf16() -> None:
    given = {"w": np.full((8, 4), 1e5, np.float32)}
    text = "(float[n,8] x) => (float[n,4] y) { y = MatMul(x, w) }"
    feeds = {"x": np.abs(feed(2, 8))}
    assert np.isinf(ir_interpreter.run(rewritten(model(text, given), traits=F16), feeds)["y"]).all()
    narrowed(model(text, given), feeds, BF16)


def test_concatenated_parts_have_one_type() -> None:
    text = """(float[n,8] x) => (float[n,4] y)
        { a = MatMul(x, w) b = Relu(a) c = Concat <axis = 1> (b, x) y = MatMul(c, v) }"""
    graph = narrowed(model(text, weights(w=(8, 8), v=(16, 4))), {"x": feed(5, 8)})
    concat = only(graph, ops.Concat)
    assert {value.dtype for value in (*concat.inputs, concat.output)} == {DType.F32}


def test_integers_and_booleans_are_untouched() -> None:
    text = "(int64[n] i, bool[n] c) => (int64[n] y, bool[n] d) { y = Add(i, i) d = Not(c) }"
    graph = rewritten(model(text), traits=F16)
    assert {value.dtype for value in graph.outputs} == {DType.I64, DType.BOOL}


def test_a_half_precision_model_is_stored_as_it_is() -> None:
    text = "(float16[n,8] x) => (float16[n,4] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"
    given = {name: array.astype(np.float16) for name, array in weights(w=(8, 16), v=(16, 4)).items()}
    graph = rewritten(model(text, given), traits=F16)
    assert all(isinstance(node.op, ops.Gemm) for node in graph.nodes), "its input is copied"
    assert all(value.dtype is DType.F16 for node in graph.nodes for value in node.inputs)


@pytest.mark.parametrize("storage", [DType.F16, DType.BF16])
def test_efficientnet_stays_within_the_bound(efficientnet_lite0: Path, storage: DType) -> None:
    feeds = {"input": np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)}
    graph = _default_model(efficientnet_lite0, storage, feeds)
    assert all(len(node.inputs) < 2 or node.inputs[1].dtype is storage for node in graph.nodes)


@pytest.mark.parametrize("storage", [DType.F16, DType.BF16])
def test_minilm_stays_within_the_bound(all_minilm_l6_v2: Path, storage: DType) -> None:
    rng = np.random.default_rng(0)
    mask = np.array([[1] * 9, [1] * 5 + [0] * 4])
    ids = rng.integers(0, 30522, (2, 9))
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    graph = _default_model(all_minilm_l6_v2, storage, feeds)
    computed = [value for node in graph.nodes for value in node.outputs if value.dtype is DType.F32]
    assert [value.name for value in computed] == ["/Mul_output_0", "last_hidden_state"], "the mask and the output"


def _default_model(folder: Path, storage: DType, feeds: Feeds) -> Graph:
    """The narrow graph of a default model, within the bound of fp32 and without a step more."""
    path = folder / "1" / "model.onnx"
    plain = passes.run(frontend.read(path), Traits())
    graph = passes.run(frontend.read(path), Traits(storage_type=storage))
    graph.validate()
    assert len(graph.nodes) == len(plain.nodes)
    expected, got = ir_interpreter.run(plain, feeds), ir_interpreter.run(graph, feeds)
    for name, array in expected.items():
        assert relative_error(got[name], array) <= BOUNDS[storage]
    return graph


def test_weights_of_a_recurrence_are_narrow_its_states_are_not() -> None:
    text = "(float[n,2,8] x) => (float[n,1,2,6] y) { y = LSTM<hidden_size=6>(x, w, r) }"
    content = {"w": feed(1, 24, 8) / 3, "r": feed(1, 24, 6) / 3}
    graph = narrowed(
        model(text, {name: array.astype(np.float32) for name, array in content.items()}), {"x": feed(5, 2, 8)}
    )
    node = only(graph, ops.Recurrent)
    assert [value.dtype for value in node.inputs] == [DType.F32, DType.F16, DType.F32, DType.F32]
    assert all(value.dtype is DType.F32 for value in node.outputs)


def test_what_is_written_by_index_has_the_type_of_what_it_is_written_to() -> None:
    nodes = "a = MatMul(x, w) b = Slice(a, s, e) c = ScatterND(a, i, b) y = MatMul(c, v)"
    text = f"(float[4,8] x, int64[2,1] i) => (float[4,4] y) {{ {nodes} }}"
    content = weights(w=(8, 16), v=(16, 4)) | {"s": np.array([0]), "e": np.array([2])}
    node = only(narrowed(model(text, content), {"x": feed(4, 8), "i": np.array([[3], [-4]])}), ops.Scatter)
    assert [value.dtype for value in (*node.inputs, *node.outputs)] == [DType.F16, DType.I64, DType.F16, DType.F16]


def test_coordinates_stay_wide() -> None:
    text = "(float[n,3,9,9] x, float[n,4,4,8] z) => (float[n,3,4,4] y) { g = MatMul(z, w) y = GridSample(x, g) }"
    feeds = {"x": feed(2, 3, 9, 9), "z": feed(2, 4, 4, 8)}
    graph = narrowed(model(text, weights(w=(8, 2)), opset=20), feeds)
    product = only(graph, ops.Gemm)
    assert all(value.dtype is DType.F32 for value in product.outputs)
