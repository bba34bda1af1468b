"""Resizing by nearest, linear or cubic interpolation along any axes, in any layout (resize.cuh).

What depends on coordinates is computed on the host, once per plan: for each resized axis a table of the source indices
and weights of the taps of every output index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Op, Resize, ResizeMode
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda import codegen
from engine.targets.cuda.kernel import (
    STORAGE,
    Argument,
    Context,
    Functor,
    I64s,
    Launch,
    Pointer,
    TensorArgument,
    ceildiv,
    launch,
    pointer_to,
)
from engine.targets.cuda.spaces import VECTOR, operand, operands, space
from engine.targets.interpolation import Tables, count_taps, tables_of

_THREADS = 256
_BLOCKS_PER_MULTIPROCESSOR = 8
_TAP = np.dtype([("index", "i4"), ("weight", "f4")])


@dataclass(frozen=True)
class _RowAxis:
    """An axis of the result's rows: along it the source moves by `stride`, or to where the table says that starts at
    tap `first`."""

    size: int
    stride: int
    first: int | None


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Resize)
    if op.mode is not ResizeMode.NEAREST and inputs[0].dtype is DType.BOOL:
        raise UnsupportedOp("Resize: bool has nothing between true and false; use nearest")
    return (Requirement(),) * len(inputs), (Requirement(),) * len(op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    op, x, y = step.op, step.inputs[0], step.outputs[0]
    assert isinstance(op, Resize)
    taps = tables_of(op, x.shape, y.shape)
    tables, first = _packed(taps)
    order = sorted(range(len(y.shape)), key=lambda axis: (-abs(y.strides[axis]), axis))
    strides = operand(x, len(x.shape)).strides
    *outer, inner = order or [-1]  # a tensor without axes is one row of one column
    column, columns = (strides[inner], y.shape[inner]) if order else (1, 1)
    rows = _merged([_RowAxis(y.shape[axis], strides[axis], first.get(axis)) for axis in outer])
    width = VECTOR if inner not in first and columns >= VECTOR else 1
    number = x.dtype if op.mode is ResizeMode.NEAREST or x.dtype is DType.F64 else DType.F32
    walks = (columns, x.offset, *(row.stride for row in rows))
    config: dict[str, int | bool | str] = {
        "width": width, "threads": _THREADS, "axes": len(rows), "taps": count_taps(taps, op),
        "resized": sum(1 << i for i, row in enumerate(rows) if row.first is not None),
        "column_resized": inner in first, "column_unit": column == 1,
        "x_vector": width == VECTOR and column == 1 and all(walk % VECTOR == 0 for walk in walks),
        "input_t": STORAGE[x.dtype], "value_t": codegen.COMPUTE[number],
    }  # fmt: skip
    count = prod(row.size for row in rows)
    arguments: dict[str, Argument] = {
        "x": TensorArgument(pointer_to(x), (), column), "taps": Pointer(tables, ctype="struct Tap"), "rows": count,
        "columns": columns, "column_taps": first.get(inner, 0), "sizes": I64s(tuple(row.size for row in rows)),
        "strides": I64s(tuple(row.stride for row in rows)),
        "first_taps": I64s(tuple(row.first or 0 for row in rows)),
    }  # fmt: skip
    epilogue = _epilogue(step, op, order, number, columns if width == VECTOR else 1)
    chunks = count * ceildiv(columns, width)
    grid = min(ceildiv(chunks, _THREADS), context.multiprocessors * _BLOCKS_PER_MULTIPROCESSOR)
    return [launch("resize", "resize.cuh", config, [epilogue], arguments, (grid, 1, 1), _THREADS)]


def _packed(tables: Tables) -> tuple[Buffer, dict[int, int]]:
    """All tables, [size, taps] each, one after the other; and where each begins."""
    parts = [np.zeros(1, _TAP)]
    first: dict[int, int] = {}
    for axis, (index, weights) in tables.items():
        first[axis] = sum(len(part) for part in parts)
        part = np.zeros(index.size, _TAP)
        part["index"], part["weight"] = index.T.reshape(-1), weights.T.reshape(-1)
        parts.append(part)
    data = np.concatenate(parts)
    return Buffer("taps", BufferKind.PLAN, data.nbytes, data), first


def _merged(axes: Sequence[_RowAxis]) -> list[_RowAxis]:
    """Neighbouring axes that are not resized and lie together as one; at least one axis."""
    result: list[_RowAxis] = []
    for axis in axes:
        last = result[-1] if result else None
        if axis.size == 1 and axis.first is None:
            continue
        if last is not None and last.first is axis.first is None and last.stride == axis.stride * axis.size:
            result[-1] = _RowAxis(last.size * axis.size, axis.stride, None)
        else:
            result.append(axis)
    return result or [_RowAxis(1, 0, None)]


def _epilogue(step: Step, op: Resize, order: Sequence[int], number: DType, granularity: int) -> Functor:
    # `Acc` may ask for the element type (integers): what is interpolated is a float.
    stores = tuple(
        ex.rewrite(s, lambda leaf: ex.cast(ex.Acc(number), leaf.dtype) if isinstance(leaf, ex.Acc) else leaf)
        for s in op.stores
    )
    shape = step.outputs[0].shape
    reads = operands(step.inputs, ex.arguments(*stores), (), len(shape))
    writes = [operand(tensor, len(shape)) for tensor in step.outputs]
    every = space(shape, order[:-1], order[-1:], [*reads.values(), *writes])
    placed = dict(zip(reads, every.operands, strict=False))
    return codegen.epilogue(stores, every, placed, every.operands[len(reads) :], granularity, number)
