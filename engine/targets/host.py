"""Runs `Opaque` steps: rare ONNX operators without a kernel, through onnx.reference on the host. Any target may call
it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from engine.errors import EngineError
from engine.ir.ops import Opaque


class HostOperator:
    """An opaque operator made ready once and run many times."""

    def __init__(self, op: Opaque) -> None:
        node = onnx.NodeProto.FromString(op.node)
        self._op = op
        self._inputs = [name for name in node.input if name]
        outputs = [name for name in node.output if name]
        graph = onnx.helper.make_graph(
            [node],
            op.op_type,
            [onnx.helper.make_empty_tensor_value_info(name) for name in self._inputs],
            [onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
        )
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in op.opsets]
        self._evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets))

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs for `inputs` (those that are present, in order). Raises EngineError where the operator fails."""
        try:
            results = self._evaluator.run(None, dict(zip(self._inputs, inputs, strict=True)))
        except Exception as error:  # onnx.reference raises whatever NumPy or its own code does
            raise EngineError(f"operator {self._op.op_type} failed in onnx.reference: {error}") from error
        return [np.asarray(result) for result in results]
