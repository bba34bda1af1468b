"""MaxPool with indices, MaxUnpool and Col2Im on the CPU target beside ONNX Runtime, and their plans for a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import engine
from engine import frontend
from engine.errors import UnsupportedOp
from engine.ir import ops
from tests.engine.targets.cuda.planning import cuda_plan, launches

TYPES = {np.float32: TensorProto.FLOAT, np.float64: TensorProto.DOUBLE, np.uint8: TensorProto.UINT8}


def model(nodes: list[onnx.NodeProto], shape: list[Any], outputs: dict[str, int], dtype: type, **weights: Any) -> bytes:
    x = helper.make_tensor_value_info("x", TYPES[dtype], shape)
    results = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    tensors = [numpy_helper.from_array(np.array(array), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "test", [x], results, tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    serialised: bytes = proto.SerializeToString()
    return serialised


def check(content: bytes, x: np.ndarray, sizes: dict[str, int] | None = None) -> dict[str, np.ndarray]:
    """Every output, equal to ONNX Runtime's; on a GPU no step would be the host's."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    expected = dict(zip(names, session.run(names, {"x": x}), strict=True))
    with engine.load(content, device="cpu", strict=True) as loaded:
        got = loaded.run({"x": x})
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        if array.dtype.kind == "f":
            np.testing.assert_allclose(got[name], array, rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(got[name], array)
    plan = cuda_plan(frontend.read(content), sizes or {})
    assert not any(isinstance(step.op, ops.Opaque) for step in plan.steps)
    assert launches(plan)
    return got


def drawn(rng: np.random.Generator, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Few distinct numbers: the first of several maxima counts. Negative ones beside the padding; zeros of uint8."""
    low, high = (0, 3) if dtype is np.uint8 else (-9, -3)
    return rng.integers(low, high, shape).astype(dtype)


@pytest.mark.parametrize("seed", range(30))
def test_places_of_maxima(seed: int) -> None:
    rng = np.random.default_rng(seed)
    axes, dtype = int(rng.integers(1, 4)), list(TYPES)[seed % 3]
    kernel = [int(rng.integers(1, 5 if axes < 3 else 3)) for _ in range(axes)]
    dilated = seed % 4 == 3
    dilations = [int(rng.integers(1, 3)) if dilated else 1 for _ in range(axes)]
    pads = [0] * 2 * axes if dilated else [int(rng.integers(0, k)) for k in kernel * 2]
    strides = [int(rng.integers(1, 4)) for _ in range(axes)]
    size = [(k - 1) * d + 1 + int(rng.integers(0, 7)) for k, d in zip(kernel, dilations, strict=True)]
    ceil_mode, order = int(seed % 5 == 1 and not dilated), int(seed % 7 == 2 and axes == 2)
    node = helper.make_node(
        "MaxPool", ["x"], ["y", "places"], kernel_shape=kernel, strides=strides, pads=pads, dilations=dilations,
        ceil_mode=ceil_mode, storage_order=order,
    )  # fmt: skip
    channels = int(rng.integers(1, 6))
    content = model([node], ["n", channels, *size], {"y": TYPES[dtype], "places": TensorProto.INT64}, dtype)
    check(content, drawn(rng, dtype, (2, channels, *size)), {"n": 2})


def test_sizes_may_be_symbols() -> None:
    node = helper.make_node("MaxPool", ["x"], ["y", "places"], kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1])
    content = model([node], ["n", 3, "h", "w"], {"y": 1, "places": TensorProto.INT64}, np.float32)
    rng = np.random.default_rng(0)
    for height, width in ((8, 9), (5, 4)):
        x = rng.standard_normal((2, 3, height, width)).astype(np.float32)
        check(content, x, {"n": 2, "h": height, "w": width})


def test_nan_is_the_largest() -> None:
    node = helper.make_node("MaxPool", ["x"], ["y", "places"], kernel_shape=[2], strides=[2])
    content = model([node], [1, 1, 6], {"y": 1, "places": TensorProto.INT64}, np.float32)
    with engine.load(content, device="cpu") as loaded:
        got = loaded.run({"x": np.array([[[1, np.nan, np.nan, 2, np.nan, np.nan]]], np.float32)})
    assert np.isnan(got["y"]).all() and got["places"].tolist() == [[[1, 2, 4]]]


def test_a_padded_dilated_pool_is_the_hosts_and_refused_where_strict() -> None:
    node = helper.make_node("MaxPool", ["x"], ["y", "places"], kernel_shape=[2, 2], dilations=[2, 2], pads=[1, 1, 1, 1])
    content = model([node], [1, 2, 6, 6], {"y": 1, "places": TensorProto.INT64}, np.float32)
    with pytest.raises(UnsupportedOp, match="MaxPool"):
        engine.load(content, device="cpu", strict=True)


@pytest.mark.parametrize("kernel", [2, 3])
def test_pooled_and_unpooled_as_in_a_segmentation_network(kernel: int) -> None:
    moves = {"kernel_shape": [kernel] * 2, "strides": [kernel] * 2}
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("MaxPool", ["a"], ["p", "places"], **moves),
        helper.make_node("Mul", ["p", "two"], ["q"]),
        helper.make_node("MaxUnpool", ["q", "places"], ["y"], **moves),
    ]
    content = model(nodes, [2, 8, 12, 6], {"y": 1}, np.float32, two=np.float32(2))
    check(content, np.random.default_rng(0).standard_normal((2, 8, 12, 6)).astype(np.float32))


def test_another_output_shape_is_refused() -> None:
    moves = {"kernel_shape": [2, 2], "strides": [2, 2]}
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p", "places"], **moves),
        helper.make_node("MaxUnpool", ["p", "places", "wanted"], ["y"], **moves),
    ]
    for size in (4, 5):
        content = model(nodes, [1, 1, size, size], {"y": 1}, np.float32, wanted=np.array([1, 1, size, size]))
        if size == 4:
            check(content, np.random.default_rng(0).standard_normal((1, 1, 4, 4)).astype(np.float32))
        else:
            with pytest.raises(UnsupportedOp, match="output_shape other than"):
                engine.load(content, device="cpu")


@pytest.mark.parametrize("seed", range(12))
def test_blocks_are_added_up(seed: int) -> None:
    rng = np.random.default_rng(seed)
    block, strides, dilations = (rng.integers(1, 4, 2) for _ in range(3))
    pads, image = rng.integers(0, 2, 4), rng.integers(8, 13, 2)
    free = image + pads[:2] + pads[2:] - (block - 1) * dilations - 1
    count = int(np.prod(free // strides + 1))
    channels = int(rng.integers(1, 4))
    node = helper.make_node(
        "Col2Im", ["x", "image", "block"], ["y"], strides=strides.tolist(), dilations=dilations.tolist(),
        pads=pads.tolist(),
    )  # fmt: skip
    shape = (2, channels * int(np.prod(block)), count)
    content = model([node], ["n", *shape[1:]], {"y": 1}, np.float32, image=image, block=block)
    check(content, rng.standard_normal(shape).astype(np.float32), {"n": 2})
