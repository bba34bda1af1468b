"""Runs a Plan in NumPy: every tensor is a strided window on its buffer, the arena one poisoned block of bytes.

The oracle for the plan builder: a wrong alias, lifetime or copy shows as wrong numbers, since the arithmetic of each
step is the interpreter's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from engine.ir.graph import Node
from engine.plan.plan import Access, Plan, Requirement, Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from tests.engine import ir_interpreter

Array = np.ndarray[Any, Any]


class AnyLayout:
    """Capabilities of a target whose kernels take every layout."""

    def requirements(self, op: Any, inputs: tuple[Tensor, ...]) -> Any:
        outputs = len(op.infer(inputs))
        return (Requirement(),) * len(inputs), (Requirement(),) * outputs


class DenseOnly:
    """Capabilities of a target whose kernels want every tensor row-major and without gaps."""

    def requirements(self, op: Any, inputs: tuple[Tensor, ...]) -> Any:
        dense = Requirement(Access.DENSE)
        if getattr(op, "stores", None) and len(inputs) == 1 and op.name == "Pointwise":
            return (Requirement(),), (Requirement(),)  # somebody has to be able to copy
        return (dense,) * len(inputs), (dense,) * len(op.infer(inputs))


def execute(plan: Plan, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of the plan. Arena and outputs start as NaN (0xFF bytes); what no step writes stays so."""
    memory: dict[Buffer, Array] = {}
    arena = np.full(plan.arena_bytes, 0xFF, np.uint8)
    tensors = [t for step in plan.steps for t in (*step.inputs, *step.outputs)]
    for buffer in {t.buffer for t in (*tensors, *plan.outputs.values(), *plan.inputs.values())}:
        match buffer.kind:
            case BufferKind.ARENA:
                memory[buffer] = arena[buffer.offset : buffer.offset + buffer.nbytes]
            case BufferKind.INPUT:
                memory[buffer] = np.ascontiguousarray(feeds[buffer.name]).reshape(-1).view(np.uint8)
            case BufferKind.OUTPUT:
                memory[buffer] = np.full(buffer.nbytes, 0xFF, np.uint8)
            case _:
                assert buffer.data is not None
                memory[buffer] = np.ascontiguousarray(buffer.data).reshape(-1).view(np.uint8)
    for step in plan.steps:
        _execute_step(step, memory)
    return {name: window(t, memory).copy() for name, t in plan.outputs.items()}


def _execute_step(step: Step, memory: Mapping[Buffer, Array]) -> None:
    inputs = [window(tensor, memory).copy() for tensor in step.inputs]
    results = ir_interpreter.run_node(Node(step.op, (), (), step.name), inputs, {})
    for tensor, result in zip(step.outputs, results, strict=True):
        assert result.shape == tensor.shape, f"{step.name}: {result.shape} into {tensor.shape}"
        window(tensor, memory)[...] = result


def window(tensor: Tensor, memory: Mapping[Buffer, Array]) -> Array:
    """A tensor as a strided view of the bytes of its buffer."""
    typed = memory[tensor.buffer].view(tensor.dtype.numpy)
    strides = [stride * tensor.dtype.itemsize for stride in tensor.strides]
    if not tensor.elements:
        return np.empty(tensor.shape, tensor.dtype.numpy)
    first = tensor.offset + sum(min(0, (n - 1) * s) for n, s in zip(tensor.shape, tensor.strides, strict=True))
    last = tensor.offset + sum(max(0, (n - 1) * s) for n, s in zip(tensor.shape, tensor.strides, strict=True))
    assert first >= 0 and last < typed.size, f"{tensor} reaches outside its buffer of {typed.size} elements"
    return as_strided(typed[tensor.offset :], tensor.shape, strides)
