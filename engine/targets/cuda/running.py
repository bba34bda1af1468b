"""Running sums and products along an axis (running.cuh)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from engine.errors import UnsupportedOp
from engine.ir.ops import Op, Running, RunningKind
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda.kernel import I64, STORAGE, Argument, Context, I64s, Launch, ceildiv, launch, pointer_to

_THREADS = 256
_MAX_GRID = 65535


@dataclass(frozen=True)
class _Axis:
    """An axis of the lines, and the strides of x and y along it."""

    size: int
    x: int
    y: int


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Running)
    if not (inputs[0].dtype.is_float or inputs[0].dtype.is_int):
        raise UnsupportedOp(f"Running {op.kind.value} of {inputs[0].dtype.value}")
    return (Requirement(),), (Requirement(),)


def lower(step: Step, context: Context) -> list[Launch]:
    op, x, y = step.op, step.inputs[0], step.outputs[0]
    assert isinstance(op, Running)
    lines = _lines(op, x, y)
    count, n = prod(axis.size for axis in lines), x.shape[op.axis]
    # A thread a line where neighbouring lines are neighbours in memory, and enough to keep the GPU busy.
    side_by_side = lines[-1].y == 1 and count >= 32 * context.multiprocessors
    config: dict[str, int | bool | str] = {
        "threads": _THREADS, "axes": len(lines), "exclusive": op.exclusive, "reverse": op.reverse,
        "side_by_side": side_by_side, "element": STORAGE[x.dtype],
        "operation": "Sum" if op.kind is RunningKind.SUM else "Product",
    }  # fmt: skip
    arguments: dict[str, Argument] = {
        "x": pointer_to(x), "y": pointer_to(y), "lines": count, "n": n, "sizes": I64s(tuple(a.size for a in lines)),
        "x_strides": I64s(tuple(axis.x for axis in lines)), "y_strides": I64s(tuple(axis.y for axis in lines)),
        "x_along": I64(x.strides[op.axis]), "y_along": I64(y.strides[op.axis]),
    }  # fmt: skip
    grid = ceildiv(count, _THREADS) if side_by_side else min(count, _MAX_GRID)
    return [launch("running", "running.cuh", config, [], arguments, (grid, 1, 1), _THREADS)]


def _lines(op: Running, x: Tensor, y: Tensor) -> list[_Axis]:
    """The other axes as they lie in the result, neighbours merged where they lie together; at least one."""
    others = [_Axis(x.shape[i], x.strides[i], y.strides[i]) for i in range(len(x.shape)) if i != op.axis]
    merged: list[_Axis] = []
    for axis in sorted((axis for axis in others if axis.size > 1), key=lambda axis: -abs(axis.y)):
        last = merged[-1] if merged else None
        if last is not None and (last.x, last.y) == (axis.x * axis.size, axis.y * axis.size):
            merged[-1] = _Axis(last.size * axis.size, axis.x, axis.y)
        else:
            merged.append(axis)
    return merged or [_Axis(1, 0, 0)]
