"""The k largest or smallest elements along an axis (top_k.cuh)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from engine.errors import UnsupportedOp
from engine.ir.ops import Op, TopK
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda.kernel import I64, STORAGE, Argument, Context, I64s, Launch, ceildiv, launch, pointer_to

_MAX_KEPT = 1024  # items of a block: 24 KiB of shared memory for twice as many
_PIECE = 512  # of a row that are sorted at once, at least
_THREADS = 256
_MAX_GRID = 65535


@dataclass(frozen=True)
class _Axis:
    """An axis of the rows, and the strides of x, values and places along it."""

    size: int
    strides: tuple[int, ...]


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, TopK)
    if not (inputs[0].dtype.is_float or inputs[0].dtype.is_int):
        raise UnsupportedOp(f"TopK of {inputs[0].dtype.value}")
    return (Requirement(),), (Requirement(), Requirement())


def lower(step: Step, context: Context) -> list[Launch]:
    op, x = step.op, step.inputs[0]
    assert isinstance(op, TopK)
    values, places = step.outputs
    n, k = x.shape[op.axis], values.shape[op.axis]
    rows = _rows(op, (x, values, places))
    capacity = 0 if k > _MAX_KEPT else 1 << (max(k, min(n, _PIECE)) - 1).bit_length()
    threads = _THREADS if not capacity else max(32, min(_THREADS, capacity // 2))
    config: dict[str, int | bool | str] = {
        "threads": threads, "axes": len(rows), "capacity": capacity, "largest": op.largest, "element": STORAGE[x.dtype],
    }  # fmt: skip
    count = prod(axis.size for axis in rows)
    arguments: dict[str, Argument] = {"rows": count, "n": n, "k": k, "sizes": I64s(tuple(axis.size for axis in rows))}
    for i, (name, tensor) in enumerate((("x", x), ("values", values), ("places", places))):
        arguments |= {name: pointer_to(tensor), f"{name}_along": I64(tensor.strides[op.axis])}
        arguments |= {f"{name}_strides": I64s(tuple(axis.strides[i] for axis in rows))}
    grid = (1 if capacity else ceildiv(n, threads), min(count, _MAX_GRID), 1)
    return [launch("top_k", "top_k.cuh", config, [], arguments, grid, threads)]


def _rows(op: TopK, tensors: tuple[Tensor, ...]) -> list[_Axis]:
    """The other axes, neighbours merged where they lie together; at least one."""
    merged: list[_Axis] = []
    for axis, size in enumerate(tensors[0].shape):
        if axis == op.axis or size == 1:
            continue
        strides = tuple(tensor.strides[axis] for tensor in tensors)
        last = merged[-1] if merged else None
        if last is not None and all(a == b * size for a, b in zip(last.strides, strides, strict=True)):
            merged[-1] = _Axis(last.size * size, strides)
        else:
            merged.append(_Axis(size, strides))
    return merged or [_Axis(1, (0,) * len(tensors))]
