"""The older forms of operators (attributes where there are inputs today, other defaults) against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from engine.frontend import read
from tests.engine.frontend.models import model, node, tensor
from tests.engine.ir_interpreter import run

onnxruntime = pytest.importorskip("onnxruntime")
RNG = np.random.default_rng(5)
Array = np.ndarray[Any, Any]


def random(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


Case = tuple[int, onnx.NodeProto, dict[str, Array], dict[str, Array]]
IMAGE = {"x": random(2, 3, 4, 6)}
CASES: dict[str, Case] = {
    "Squeeze": (11, node("Squeeze", "x", "y", axes=[0, -2]), {"x": random(1, 3, 1, 4)}, {}),
    "Squeeze_all": (11, node("Squeeze", "x", "y"), {"x": random(1, 3, 1, 4)}, {}),
    "Unsqueeze": (11, node("Unsqueeze", "x", "y", axes=[0, 3]), {"x": random(3, 4)}, {}),
    "Slice": (9, node("Slice", "x", "y", starts=[1, -3], ends=[2**31 - 1, -1], axes=[1, 3]), IMAGE, {}),
    "Split": (11, node("Split", "x", "a y", axis=1, split=[1, 2]), IMAGE, {}),
    "Split_equal": (11, node("Split", "x", "a y", axis=3), IMAGE, {}),
    "Split_uneven": (18, node("Split", "x", "a b c y", axis=3, num_outputs=4), {"x": random(2, 3, 4, 7)}, {}),
    "Clip": (9, node("Clip", "x", "y", min=-0.5, max=0.25), IMAGE, {}),
    "Clip_low": (11, node("Clip", "x low", "y"), IMAGE, {"low": np.float32(0.1)}),
    "Clip_high": (13, node("Clip", "x _ high", "y"), IMAGE, {"high": np.float32(0.1)}),
    "Pad": (9, node("Pad", "x", "y", pads=[0, 0, 1, 2, 0, 0, 0, 1], value=1.5), IMAGE, {}),
    "Pad_reflect": (9, node("Pad", "x", "y", pads=[0, 0, 1, 2, 0, 0, 0, 1], mode="reflect"), IMAGE, {}),
    "Pad_crop": (11, node("Pad", "x p", "y"), IMAGE, {"p": np.array([0, -1, 1, 0, 0, 0, 0, -2])}),
    "Softmax_flat": (11, node("Softmax", "x", "y"), IMAGE, {}),
    "Softmax_axis": (9, node("Softmax", "x", "y", axis=2), IMAGE, {}),
    "LogSoftmax_flat": (11, node("LogSoftmax", "x", "y", axis=2), IMAGE, {}),
    "Dropout": (9, node("Dropout", "x", "y", ratio=0.3), IMAGE, {}),
    "ReduceSum": (11, node("ReduceSum", "x", "y", axes=[1, -1], keepdims=0), IMAGE, {}),
    "ReduceMean": (13, node("ReduceMean", "x", "y", axes=[2]), IMAGE, {}),
    "ReduceMax_all": (11, node("ReduceMax", "x", "y", keepdims=0), IMAGE, {}),
    "ReduceL2": (18, node("ReduceL2", "x a", "y"), IMAGE, {"a": np.array([1, 2])}),
    "ReduceLogSumExp": (13, node("ReduceLogSumExp", "x", "y", axes=[1]), IMAGE, {}),
    "Upsample": (9, node("Upsample", "x s", "y"), IMAGE, {"s": np.array([1, 1, 2, 3], np.float32)}),
    "Upsample_linear": (
        9, node("Upsample", "x s", "y", mode="linear"), IMAGE, {"s": np.array([1, 1, 2, 2], np.float32)},
    ),
    "Resize_10": (10, node("Resize", "x s", "y"), IMAGE, {"s": np.array([1, 1, 2, 0.5], np.float32)}),
    "Resize_11": (
        11, node("Resize", "x r f s", "y", mode="linear", coordinate_transformation_mode="align_corners"), IMAGE,
        {"r": np.array([], np.float32), "f": np.array([], np.float32), "s": np.array([2, 3, 7, 9])},
    ),
    "BatchNormalization": (
        9, node("BatchNormalization", "x s b m v", "y"), IMAGE,
        {"s": random(3), "b": random(3), "m": random(3), "v": abs(random(3))},
    ),
    "BatchNormalization_of_computed_statistics": (
        15, node("BatchNormalization", "x s b m v", "y"),
        IMAGE | {"s": random(3), "b": random(3), "m": random(3), "v": abs(random(3))}, {},
    ),
    "Gemm": (9, node("Gemm", "a b c", "y", transA=1, alpha=0.5, beta=2.0), {"a": random(4, 3)},
             {"b": random(4, 5), "c": random(3, 1)}),
    "Gemm_without_c": (11, node("Gemm", "a b", "y"), {"a": random(3, 4)}, {"b": random(4, 5)}),
    "ConvTranspose": (
        11, node("ConvTranspose", "x w b", "y", strides=[2, 1], pads=[0, 1, 1, 0], group=3), IMAGE,
        {"w": random(3, 2, 3, 2), "b": random(6)},
    ),
    "Conv_auto_pad": (
        11, node("Conv", "x w", "y", auto_pad="SAME_LOWER", strides=[2, 2], group=3), IMAGE,
        {"w": random(3, 1, 2, 2)},
    ),
    "AveragePool_include": (
        11, node("AveragePool", "x", "y", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2], count_include_pad=1),
        IMAGE, {},
    ),
    "MaxPool_ceil": (12, node("MaxPool", "x", "y", kernel_shape=[2, 3], strides=[3, 2], ceil_mode=1), IMAGE, {}),
    "LRN": (13, node("LRN", "x", "y", size=3, alpha=0.1), IMAGE, {}),
    "LpPool": (11, node("LpPool", "x", "y", kernel_shape=[2, 2], p=2), {"x": abs(random(1, 2, 4, 4))}, {}),
    "ArgMax": (11, node("ArgMax", "x", "y", axis=1, keepdims=0), IMAGE, {}),
    "ArgMin_last": (13, node("ArgMin", "x", "y", axis=-1, select_last_index=1), {"x": np.zeros((2, 3))}, {}),
    "CumSum": (11, node("CumSum", "x a", "y", exclusive=1, reverse=1), IMAGE, {"a": np.array(2)}),
    "OneHot": (11, node("OneHot", "x d v", "y", axis=0), {"x": np.array([[1, -1], [0, 2]])},
               {"d": np.array(3), "v": np.array([2.0, 5.0], np.float32)}),
    "GatherElements": (11, node("GatherElements", "x i", "y", axis=1), {"x": random(3, 4)},
                       {"i": np.array([[0, -1], [2, 3], [1, 1]])}),
    "GatherND_batch": (13, node("GatherND", "x i", "y", batch_dims=1), {"x": random(2, 3, 4)},
                       {"i": np.array([[[0]], [[2]]])}),
    "Einsum": (12, node("Einsum", "a b", "y", equation="bhid,bhjd->bhij"), {"a": random(2, 3, 4, 5)},
               {"b": random(2, 3, 6, 5)}),
    "Einsum_outer": (12, node("Einsum", "a b", "y", equation="i,j->ji"), {"a": random(3)}, {"b": random(4)}),
    "Einsum_of_three": (12, node("Einsum", "a b c", "y", equation="ij,jk,kl->il"), {"a": random(2, 3)},
                        {"b": random(3, 4), "c": random(4, 5)}),
    "MatMul_vectors": (13, node("MatMul", "a b", "y"), {"a": random(4)}, {"b": random(2, 4, 3)}),
    "MatMul_of_integers": (13, node("MatMul", "a b", "y"), {"a": np.arange(6, dtype=np.int32).reshape(2, 3)},
                           {"b": np.arange(12, dtype=np.int32).reshape(3, 4)}),
    "DequantizeLinear": (13, node("DequantizeLinear", "x s z", "y", axis=1),
                         {"x": np.arange(12, dtype=np.uint8).reshape(3, 4)},
                         {"s": abs(random(4)), "z": np.arange(4, dtype=np.uint8)}),
    "LSTM": (14, node("LSTM", "x w r b", "y", hidden_size=4), {"x": random(3, 2, 5)},
             {"w": random(1, 16, 5), "r": random(1, 16, 4), "b": random(1, 32)}),
    "TopK": (11, node("TopK", "x k", "y i"), {"x": random(2, 6)}, {"k": np.array([3])}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operator_matches_onnxruntime(name: str) -> None:
    opset, operator, arrays, constants = CASES[name]
    inputs = [
        tensor(key, list(array.shape), onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
        for key, array in arrays.items()
    ]
    data = model([operator], inputs, list(operator.output), constants, opset).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    graph = read(data)
    graph.validate()
    results = run(graph, arrays)
    for output, want in zip(operator.output, session.run(None, arrays), strict=True):
        assert results[output].dtype == want.dtype
        assert results[output].shape == want.shape
        np.testing.assert_allclose(results[output], want, atol=2e-5, rtol=2e-5)
