"""ONNX Gather along any axis: a copy whose source is read through the index (pointwise.cuh). An index out of range is
reported through the step's status word."""

from __future__ import annotations

from engine.ir.ops import Gather, Op
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda.kernel import Context, Launch
from engine.targets.cuda.pointwise import copy
from engine.targets.cuda.spaces import gathered, refuse_empty_tables


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Gather)
    return (Requirement(),) * len(inputs), (Requirement(),)


def lower(step: Step, context: Context) -> list[Launch]:
    op, output = step.op, step.outputs[0]
    assert isinstance(op, Gather)
    data, indices = step.inputs
    source = gathered(data, indices, op.axis, len(output.shape))
    refuse_empty_tables(step, [source])
    return copy(source, output, context, "gather")
