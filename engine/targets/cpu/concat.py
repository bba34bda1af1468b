"""Concatenation: every input is copied to its slice of the output, unless the plan has already placed it there."""

from __future__ import annotations

from dataclasses import replace

from engine.ir.ops import Concat, Op
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.kernel import Context, Launch
from engine.targets.cpu.pointwise import copy_launches
from engine.targets.cpu.spaces import operand


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Concat)
    return (Requirement(),) * len(inputs), (Requirement(),)


def lower(step: Step, context: Context) -> list[Launch]:
    op, output = step.op, step.outputs[0]
    assert isinstance(op, Concat)
    launches: list[Launch] = []
    start = 0
    for source in step.inputs:
        shape = (*output.shape[: op.axis], source.shape[op.axis], *output.shape[op.axis + 1 :])
        target = replace(output, shape=shape, offset=output.offset + start * output.strides[op.axis])
        start += source.shape[op.axis]
        if not source.is_at(target):
            launches += copy_launches(target, operand(source, len(shape)), context, concurrent=bool(launches))
    return launches
