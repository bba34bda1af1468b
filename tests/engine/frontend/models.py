"""Small models that the frontend's tests build with onnx.helper."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
OPSET = 17


def tensor(name: str, shape: list[int | str | None], dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[str],
    constants: dict[str, Array] | None = None,
    opset: int = OPSET,
    **extra: Any,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        inputs,
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, **extra)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """A node from names separated by spaces; "_" stands for an input left out."""
    names = ["" if name == "_" else name for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name=f"{op}_{outputs.split()[0]}", **attributes)


def convnet() -> onnx.ModelProto:
    """A convolution, batch norm, pool and classifier with a symbolic batch."""
    rng = np.random.default_rng(3)
    constants = {
        "w": rng.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "b": rng.standard_normal(8).astype(np.float32),
        "scale": rng.random(8).astype(np.float32) + 0.5,
        "shift": rng.standard_normal(8).astype(np.float32),
        "mean": rng.standard_normal(8).astype(np.float32),
        "variance": rng.random(8).astype(np.float32) + 0.5,
        "fc": rng.standard_normal((10, 8)).astype(np.float32),
        "fc_b": rng.standard_normal(10).astype(np.float32),
    }
    nodes = [
        node("Conv", "x w b", "c", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("BatchNormalization", "c scale shift mean variance", "n"),
        node("Relu", "n", "r"),
        node("GlobalAveragePool", "r", "p"),
        node("Flatten", "p", "f"),
        node("Gemm", "f fc fc_b", "logits", transB=1),
        node("Softmax", "logits", "y"),
    ]
    return model(nodes, [tensor("x", ["n", 3, 12, 12])], ["y"], constants)


def shape_arithmetic() -> onnx.ModelProto:
    """Heads split and joined again with target shapes computed from the input's shape, as exporters write it."""
    constants = {
        "zero": np.array(0),
        "one": np.array(1),
        "axis0": np.array([0]),
        "heads": np.array([4]),
        "width": np.array([8]),
        "minus": np.array([-1]),
    }
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "batch"),
        node("Gather", "s one", "length"),
        node("Unsqueeze", "batch axis0", "batch1"),
        node("Unsqueeze", "length axis0", "length1"),
        node("Concat", "batch1 length1 heads width", "split", axis=0),
        node("Reshape", "x split", "apart"),
        node("Transpose", "apart", "turned", perm=[0, 2, 1, 3]),
        node("Softmax", "turned", "soft", axis=-1),
        node("Transpose", "soft", "back", perm=[0, 2, 1, 3]),
        node("Concat", "batch1 length1 minus", "joined", axis=0),
        node("Reshape", "back joined", "y"),
    ]
    return model(nodes, [tensor("x", ["batch", "sequence", 32])], ["y"], constants)
