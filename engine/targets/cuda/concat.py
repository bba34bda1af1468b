"""Concatenation: every input is copied to its slice of the output (pointwise.cuh), unless it lies there already.

The plan makes slices of most concatenations, so that nothing is left to do here.
"""

from __future__ import annotations

from engine.ir.ops import Concat, Op
from engine.plan.build import concat_slices
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda.kernel import Context, Launch
from engine.targets.cuda.pointwise import copy
from engine.targets.cuda.spaces import operand


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Concat)
    return (Requirement(),) * len(inputs), (Requirement(),)


def lower(step: Step, context: Context) -> list[Launch]:
    op, output = step.op, step.outputs[0]
    assert isinstance(op, Concat)
    launches: list[Launch] = []
    slices = concat_slices(op, output, [source.shape for source in step.inputs])
    for source, place in zip(step.inputs, slices, strict=True):
        if source.elements and not source.is_at(place):
            launches += copy(operand(source, len(place.shape)), place, context, "concat")
    return launches
