"""What targets share that runs on the host: `Opaque` steps (rare ONNX operators without a kernel, through
onnx.reference), and plans bound to NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from engine.errors import EngineError, ShapeError
from engine.ir.ops import Opaque
from engine.plan.plan import Plan
from engine.specs import StepStat
from engine.targets.base import Executable


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
        """The outputs for `inputs` (those that are present, in order). Raises ShapeError for an index out of range and
        for strings that cannot be read, EngineError where the operator fails otherwise."""
        try:
            results = self._evaluator.run(None, dict(zip(self._inputs, inputs, strict=True)))
        except Exception as error:  # onnx.reference raises whatever NumPy or its own code does
            strings = any(array.dtype == object for array in inputs)
            values = isinstance(error, IndexError) or (strings and isinstance(error, ValueError))
            kind = ShapeError if values else EngineError
            raise kind(f"operator {self._op.op_type} failed in onnx.reference: {error}") from error
        return [np.asarray(result) for result in results]


class HostResident:
    """A plan with NumPy arrays for its inputs and outputs."""

    def __init__(self, plan: Plan, executable: Executable) -> None:
        self._executable = executable
        self.inputs = {name: np.zeros(tensor.shape, tensor.dtype.numpy) for name, tensor in plan.inputs.items()}
        self.outputs = {name: np.zeros(tensor.shape, tensor.dtype.numpy) for name, tensor in plan.outputs.items()}

    def launch(self, stream: object) -> None:
        """Run once; a CPU has no streams."""
        self._executable.run(self.inputs, self.outputs)

    def step_stats(self) -> Sequence[StepStat]:
        return self._executable.step_stats()

    def close(self) -> None:
        self._executable.close()
