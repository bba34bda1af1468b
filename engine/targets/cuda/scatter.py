"""Writing, or adding, … where an index says (scatter.cuh): the data is copied, then the updates are placed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.errors import ShapeError, UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Op, Scatter, ScatterKind
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda.kernel import (
    I64,
    STORAGE,
    Argument,
    Context,
    I64s,
    Launch,
    StatusWord,
    ceildiv,
    launch,
    pointer_to,
)
from engine.targets.cuda.pointwise import copy
from engine.targets.cuda.spaces import operand
from engine.targets.cuda.units import UNITS, elements_in_unit

_THREADS = 256
_BLOCKS_PER_MULTIPROCESSOR = 8
_OPERATIONS = {
    ScatterKind.REPLACE: "void", ScatterKind.ADD: "Sum", ScatterKind.MUL: "Product", ScatterKind.MAX: "Maximum",
    ScatterKind.MIN: "Minimum",
}  # fmt: skip


@dataclass(frozen=True)
class _Axis:
    """An axis of the updates: its size, and the strides of updates, index and result along it."""

    size: int
    updates: int
    index: int
    result: int

    def continues(self, outer: _Axis) -> bool:
        """Whether `outer`, around this axis, only goes on where this one ends."""
        pairs = ((outer.updates, self.updates), (outer.index, self.index), (outer.result, self.result))
        return all(stride == inner * self.size for stride, inner in pairs)


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Scatter)
    if op.kind is not ScatterKind.REPLACE and inputs[0].dtype is DType.BOOL:
        raise UnsupportedOp(f"Scatter: {op.kind.value} of bool")
    return (Requirement(),) * len(inputs), (Requirement(),)


def lower(step: Step, context: Context) -> list[Launch]:
    op, (data, indices, updates), output = step.op, step.inputs, step.outputs[0]
    assert isinstance(op, Scatter)
    launches = copy(operand(data, len(output.shape)), output, context, "scatter")
    if not updates.elements:
        return launches
    depth = op.depth(step.inputs)
    placed = [op.axis] if op.axis is not None else list(range(depth))
    if any(output.shape[axis] == 0 for axis in placed):
        raise ShapeError(f"{step.name}: an index selects from an axis of size 0")
    axes = _axes(op, step, placed)
    rows = [output.strides[axis] for axis in placed]
    unit = _unit(op, axes, rows, updates, output)
    axes = [replace(axis, updates=axis.updates // unit, result=axis.result // unit) for axis in axes[:-1]] + [
        axes[-1] if unit == 1 else replace(axes[-1], size=axes[-1].size // unit)
    ]
    element = UNITS[unit * output.dtype.itemsize] if op.kind is ScatterKind.REPLACE else STORAGE[output.dtype]
    elements = updates.elements // unit
    config: dict[str, int | bool | str] = {
        "threads": _THREADS, "axes": len(axes), "depth": depth, "element": element,
        "operation": _OPERATIONS[op.kind],
    }  # fmt: skip
    arguments: dict[str, Argument] = {
        "updates": replace(pointer_to(updates), ctype=element), "indices": pointer_to(indices),
        "y": replace(pointer_to(output), ctype=element), "elements": elements, "status": StatusWord(),
        "component": I64(indices.strides[-1] if op.axis is None else 0),
        "sizes": I64s(tuple(axis.size for axis in axes)),
        "update_strides": I64s(tuple(axis.updates for axis in axes)),
        "index_strides": I64s(tuple(axis.index for axis in axes)),
        "strides": I64s(tuple(axis.result for axis in axes)),
        "rows": I64s(tuple(output.shape[axis] for axis in placed)),
        "row_strides": I64s(tuple(stride // unit for stride in rows)),
    }  # fmt: skip
    grid = min(ceildiv(elements, _THREADS), context.multiprocessors * _BLOCKS_PER_MULTIPROCESSOR)
    return [*launches, launch("scatter", "scatter.cuh", config, [], arguments, (grid, 1, 1), _THREADS)]


def _axes(op: Scatter, step: Step, placed: Sequence[int]) -> list[_Axis]:
    """The axes of the updates with neighbours merged where they lie together; at least one."""
    _, indices, updates = step.inputs
    output = step.outputs[0]
    if op.axis is not None:
        index = indices.strides
        result = tuple(0 if axis in placed else stride for axis, stride in enumerate(output.strides))
    else:
        lead = len(indices.shape) - 1
        index = indices.strides[:-1] + (0,) * (len(updates.shape) - lead)
        result = (0,) * lead + output.strides[len(placed) :]
    merged: list[_Axis] = []
    for size, *strides in zip(updates.shape, updates.strides, index, result, strict=True):
        axis = _Axis(size, *strides)
        if size == 1:
            continue
        if merged and axis.continues(merged[-1]):
            merged[-1] = replace(axis, size=axis.size * merged[-1].size)
        else:
            merged.append(axis)
    return merged or [_Axis(1, 0, 0, 0)]


def _unit(op: Scatter, axes: Sequence[_Axis], rows: Sequence[int], updates: Tensor, output: Tensor) -> int:
    """How many elements can always be moved at once: of rows that are replaced as a whole."""
    inner = axes[-1]
    if op.kind is not ScatterKind.REPLACE or inner.index or inner.updates != 1 or inner.result != 1:
        return 1
    strides = (stride for axis in axes[:-1] for stride in (axis.updates, axis.result))
    return elements_in_unit(output.dtype, (inner.size, updates.offset, output.offset, *rows, *strides))
