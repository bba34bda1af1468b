"""What exporters other than PyTorch's write, end to end on the CPU target beside ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import engine
from engine.cli.check import relative_error
from engine.ir import ops

TOLERANCE = 1e-5  # relative L2 of float32 against float32
Arrays = dict[str, np.ndarray]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.5).astype(np.float32)


def model(text_nodes: list[onnx.NodeProto], shape: list[Any], rank: int, weights: Arrays, opset: int = 17) -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(text_nodes, "test", [x], [y], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    serialised: bytes = proto.SerializeToString()
    return serialised


def check(content: bytes, *shapes: tuple[int, ...]) -> engine.Model:
    loaded = engine.load(content, device="cpu")
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for shape in shapes:
        x = random(*shape, seed=1)
        (want,) = session.run(None, {"x": x})
        got = loaded.run({"x": x})["y"]
        assert got.shape == want.shape
        assert relative_error(got, want) <= TOLERANCE
    return loaded


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_same_padding_of_images_of_any_size(mode: str, kernel: int) -> None:
    """How much SAME pads with stride 2 depends on whether the size is even: TensorFlow's detection models."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "w"], ["c"], auto_pad=mode, strides=[2, 2]),
        helper.make_node("MaxPool", ["c"], ["p"], auto_pad=mode, strides=[2, 2], kernel_shape=[kernel, 3]),
        helper.make_node("Transpose", ["p"], ["y"], perm=[0, 2, 3, 1]),
    ]
    content = model(nodes, [None, None, None, 3], 4, {"w": random(5, 3, kernel, 3)})
    check(content, (1, 16, 16, 3), (2, 17, 14, 3), (1, 15, 19, 3), (3, 2, 1, 3))


def test_keras_attention_in_einsum_is_fused() -> None:
    """Keras multiplies keys by queries and transposes the scores in the einsum's result."""
    heads, size, width = 4, 8, 32
    nodes = []
    for name in "qkv":
        nodes += [
            helper.make_node("Einsum", ["x", f"w{name}"], [f"{name}0"], equation="bsd,dhe->bshe"),
            helper.make_node("Add", [f"{name}0", f"b{name}"], [name]),
        ]
    nodes += [
        helper.make_node("Mul", ["q", "scale"], ["qs"]),
        helper.make_node("Einsum", ["k", "qs"], ["s"], equation="aecd,abcd->acbe"),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        helper.make_node("Einsum", ["p", "v"], ["o"], equation="acbe,aecd->abcd"),
        helper.make_node("Einsum", ["o", "wo"], ["y"], equation="bshe,hed->bsd"),
    ]
    weights = {f"w{name}": random(width, heads, size, seed=i) for i, name in enumerate("qkv")}
    weights |= {f"b{name}": random(heads, size, seed=i + 3) for i, name in enumerate("qkv")}
    weights |= {"wo": random(heads, size, width, seed=9), "scale": np.array(0.35, np.float32)}
    loaded = check(model(nodes, ["batch", "sequence", width], 3, weights), (1, 1, width), (3, 17, width))
    kinds = [type(node.op) for node in loaded.graph.nodes]
    assert kinds.count(ops.Attention) == 1 and ops.Softmax not in kinds


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_labels_are_resized_to_the_nearest(dtype: type) -> None:
    """As segmentation networks do with the classes of pixels."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest")
    x, y = (helper.make_tensor_value_info(name, kind, [1, 2, size, size]) for name, size in (("x", 5), ("y", 8)))
    scales = numpy_helper.from_array(np.array([1, 1, 1.6, 1.6], np.float32), "scales")
    graph = helper.make_graph([node], "labels", [x], [y], [scales])
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    feed = np.random.default_rng(0).integers(0, 100, (1, 2, 5, 5)).astype(dtype)
    (want,) = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"x": feed})
    with engine.load(content, device="cpu", strict=True) as loaded:
        np.testing.assert_array_equal(loaded.run({"x": feed})["y"], want)


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_grid_sample_by_its_old_mode_names(mode: str) -> None:
    nodes = [helper.make_node("GridSample", ["x", "grid"], ["y"], mode=mode)]
    check(model(nodes, [2, 3, 6, 5], 4, {"grid": random(2, 4, 4, 2)}), (2, 3, 6, 5))
