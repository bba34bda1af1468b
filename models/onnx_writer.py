"""A thin writer of ONNX graphs on ``onnx.helper``: nodes in order, weights by name. Called by the builders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8

Dims = Sequence[int | str]
"""Sizes, with symbol names for those chosen at run time."""


class GraphWriter:
    """Collects one graph. Value names are the exporter's: the scope of the layer, a slash, the operator."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._used: dict[str, int] = {}

    def weight(self, name: str, value: npt.NDArray[Any]) -> str:
        """Add ``value`` as an initializer and return its name; a name given twice must mean the same tensor."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def constant(self, scope: str, value: npt.NDArray[Any]) -> str:
        """Add a ``Constant`` node, the exporter's spelling of a literal in the model's code."""
        return self.node("Constant", [], scope, value=numpy_helper.from_array(value))

    def node(self, op: str, inputs: Sequence[str], scope: str, **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        return self.nodes(op, inputs, scope, 1, **attributes)[0]

    def nodes(self, op: str, inputs: Sequence[str], scope: str, results: int, **attributes: Any) -> tuple[str, ...]:
        """Add a node with several outputs and return their names."""
        base = f"{scope}/{op}"
        count = self._used.get(base, 0)
        self._used[base] = count + 1
        name = base if count == 0 else f"{base}_{count}"
        outputs = tuple(f"{name}_output_{i}" for i in range(results))
        self._nodes.append(helper.make_node(op, list(inputs), list(outputs), name=name, **attributes))
        return outputs

    def result(self, value: str, name: str) -> None:
        """Rename ``value``, the last node's output, to the graph output ``name``."""
        assert self._nodes[-1].output[0] == value
        self._nodes[-1].output[0] = name

    def model(self, inputs: Mapping[str, tuple[int, Dims]], outputs: Mapping[str, Dims]) -> onnx.ModelProto:
        """Return the checked model; inputs are (element type, dims) by name, outputs are float32."""
        graph = helper.make_graph(
            self._nodes,
            self._name,
            [helper.make_tensor_value_info(name, dtype, list(dims)) for name, (dtype, dims) in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(dims)) for name, dims in outputs.items()],
            list(self._initializers.values()),
        )
        model = helper.make_model(
            graph,
            producer_name="tilewave",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        onnx.checker.check_model(model, full_check=True)
        return model
