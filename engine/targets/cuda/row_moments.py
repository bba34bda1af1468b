"""Moments of rows by parts of 32 columns (row_moments.cuh), from which products find what they divide rows by
(kernels/mma/divided_rows.cuh). In memory a part of all rows comes after the other."""

from __future__ import annotations

from math import prod

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import MOMENT_COLUMNS, Op, RowMoments
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda.kernel import I64, STORAGE, Context, Launch, Pointer, ceildiv, launch, pointer_to
from engine.targets.cuda.spaces import VECTOR

_THREADS, _UNROLL = 128, 4
_TYPES = (DType.F16, DType.BF16)


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Dense rows of 16 bits. Raises UnsupportedOp for others."""
    assert isinstance(op, RowMoments)
    if inputs[0].dtype not in _TYPES:
        raise UnsupportedOp(f"{op.name} of {inputs[0].dtype.value}")
    rank = len(inputs[0].shape)
    return (dense(rank),), (parts_outside(rank),)


def dense(rank: int) -> Requirement:
    """Rows one after the other."""
    return Requirement(Access.DENSE, tuple(range(rank)))


def parts_outside(rank: int) -> Requirement:
    """The moments of a tensor of so many axes: those of the first part of all rows, then of the next."""
    return Requirement(Access.DENSE, (rank - 1, *range(rank - 1), rank))


def lower(step: Step, context: Context) -> list[Launch]:
    x, moments = step.inputs[0], step.outputs[0]
    rows = prod(x.shape[:-1])
    return [launch_moments(pointer_to(x), x.dtype, rows, x.shape[-1], x.shape[-1], row_parts(moments))]


def row_parts(moments: Tensor) -> Pointer:
    """The address of moments that lie as asked for."""
    return Pointer(moments.buffer, moments.offset * moments.dtype.itemsize, "struct RowPart")


def launch_moments(x: Pointer, dtype: DType, rows: int, columns: int, stride: int, parts: Pointer) -> Launch:
    """The launch for `rows` that lie `stride` elements apart."""
    aligned = not (columns | stride | x.offset // dtype.itemsize) % VECTOR
    lanes = MOMENT_COLUMNS // VECTOR
    return launch(
        "moments",
        "row_moments.cuh",
        {"operand": STORAGE[dtype], "threads": _THREADS, "unroll": _UNROLL, "aligned": aligned},
        [],
        {"x": x, "stride": I64(stride), "rows": rows, "columns": columns, "row_parts": parts},
        (ceildiv(rows, _THREADS // lanes * _UNROLL), ceildiv(columns, MOMENT_COLUMNS), 1),
        _THREADS,
    )
