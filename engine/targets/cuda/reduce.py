"""Reductions over any axes (reduce.cuh). The innermost axis in memory of the first input decides which columns are
read."""

from __future__ import annotations

from math import prod

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.ops import Op, Reduce, ReduceKind
from engine.ir.ops.light import iteration_shape
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import codegen
from engine.targets.cuda.kernel import Argument, Context, Launch, ceildiv, launch
from engine.targets.cuda.spaces import VECTOR, Operand, operand, operands, space

_THREADS = 256
_MAX_GRID = 65535

_OPERATIONS = {
    ReduceKind.SUM: "Sum", ReduceKind.MEAN: "Sum", ReduceKind.PROD: "Product", ReduceKind.MAX: "Maximum",
    ReduceKind.MIN: "Minimum",
}  # fmt: skip


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Reduce)
    if op.kind in (ReduceKind.MAX, ReduceKind.MIN) and not op.source.dtype.is_float and not op.source.dtype.is_int:
        raise UnsupportedOp(f"Reduce {op.kind.value} of {op.source.dtype.value}: no CUDA kernel")
    return tuple(Requirement() for _ in inputs), tuple(Requirement() for _ in op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    op = step.op
    assert isinstance(op, Reduce)
    dims = iteration_shape("Reduce", (op.source,), step.inputs, ())
    shape = tuple(size for size in dims if isinstance(size, int))
    used = ex.arguments(op.source)
    reads = operands(step.inputs, used, (), len(shape))
    # Results and epilogue inputs along the axes of the source: reduced ones do not move them.
    writes = [_kept(tensor, op, len(shape)) for tensor in step.outputs]
    more = {i: _kept(step.inputs[i], op, len(shape)) for i in ex.arguments(*op.stores)}

    inner = _innermost(shape, list(reads.values()))
    reduced = [axis for axis in op.axes if axis != inner]
    kept = [axis for axis in range(len(shape)) if axis not in op.axes and axis != inner]
    columns_kept = inner not in op.axes
    source = space(shape, [*kept, *reduced], (inner,), list(reads.values()))
    result_sizes = tuple(1 if axis in op.axes else size for axis, size in enumerate(shape))
    result = space(result_sizes, kept, (inner,), [*more.values(), *writes])
    placed = iter(result.operands)
    stored: dict[int, Operand] = {i: next(placed) for i in more}
    prologue = codegen.prologue(op.source, source, dict(zip(reads, source.operands, strict=True)), source.columns)
    epilogue = codegen.epilogue(op.stores, result, stored, list(placed), result.columns, op.source.dtype)

    kept_rows, reduced_rows = prod(shape[axis] for axis in kept), prod(shape[axis] for axis in reduced)
    row_threads = min(8, 1 << (max(1, reduced_rows) - 1).bit_length()) if columns_kept else 1
    column_threads = _THREADS // row_threads if columns_kept else _THREADS
    if columns_kept:
        column_threads = min(column_threads, max(32, 1 << (ceildiv(source.columns, VECTOR) - 1).bit_length()))
    config: dict[str, int | bool | str] = {
        "width": VECTOR, "columns_kept": columns_kept, "column_threads": column_threads, "row_threads": row_threads,
        "mean": op.kind is ReduceKind.MEAN, "operation": _OPERATIONS[op.kind],
    }  # fmt: skip
    arguments: dict[str, Argument] = {"kept_rows": kept_rows, "reduced_rows": reduced_rows, "columns": source.columns}
    blocks = ceildiv(source.columns, column_threads * VECTOR) if columns_kept else 1
    grid = (blocks, min(kept_rows, _MAX_GRID), ceildiv(kept_rows, _MAX_GRID))
    identity = f"DEVICE {codegen.COMPUTE[op.source.dtype]} identity() {{ return {_identity(op)}; }}\n"
    return [
        launch(
            "reduce", "reduce.cuh", config, [prologue, epilogue], arguments, grid, column_threads * row_threads,
            helpers=identity,
        )
    ]  # fmt: skip


def _kept(tensor: Tensor, op: Reduce, rank: int) -> Operand:
    """A tensor of the result's shape (or broadcasting against it) along the axes of the source."""
    if op.keepdims:
        return operand(tensor, rank)
    along = [axis for axis in range(rank) if axis not in op.axes]
    own = operand(tensor, len(along))
    strides = [0] * rank
    for axis, stride in zip(along, own.strides, strict=True):
        strides[axis] = stride
    return Operand(own.pointer, own.dtype, tuple(strides), own.offset)


def _innermost(shape: tuple[int, ...], reads: list[Operand]) -> int:
    """The axis along which most operands have neighbouring elements; the last one in doubt."""
    votes = [sum(size > 1 and operand.strides[axis] == 1 for operand in reads) for axis, size in enumerate(shape)]
    return max(range(len(shape)), key=lambda axis: (votes[axis], axis))


def _identity(op: Reduce) -> str:
    """The value that changes nothing, as an expression."""
    dtype = op.source.dtype
    if op.kind in (ReduceKind.SUM, ReduceKind.MEAN):
        return "0"
    if op.kind is ReduceKind.PROD:
        return "1"
    lowest = op.kind is ReduceKind.MAX
    if dtype.is_float:
        return "-INFINITY" if lowest else "INFINITY"
    limits = np.iinfo(dtype.numpy)
    return codegen.literal(int(limits.min if lowest else limits.max), dtype)
