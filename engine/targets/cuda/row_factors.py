"""Factors of rows, 1 / √(variance + ε), by which products divide these (kernels/mma/divided_rows.cuh), in a launch of
their own (row_factors.cuh)."""

from __future__ import annotations

from math import prod

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Op, RowFactors
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda.kernel import STORAGE, Context, Launch, Pointer, ceildiv, launch, pointer_to
from engine.targets.cuda.product import Found
from engine.targets.cuda.spaces import VECTOR

_THREADS = 128
_TYPES = (DType.F16, DType.BF16)


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Dense rows of 16 bits. Raises UnsupportedOp for others."""
    assert isinstance(op, RowFactors)
    if inputs[0].dtype not in _TYPES:
        raise UnsupportedOp(f"{op.name} of {inputs[0].dtype.value}")
    rank = len(inputs[0].shape)
    return (dense(rank),), (dense(rank),)


def dense(rank: int) -> Requirement:
    """Rows one after the other."""
    return Requirement(Access.DENSE, tuple(range(rank)))


def lower(step: Step, context: Context) -> list[Launch]:
    op, x, factors = step.op, step.inputs[0], step.outputs[0]
    assert isinstance(op, RowFactors)
    found = Found(pointer_to(x), pointer_of(factors), x.dtype, op.epsilon)
    return [launch_factors(found, prod(x.shape[:-1]), x.shape[-1])]


def pointer_of(factors: Tensor) -> Pointer:
    """The address of factors that lie as asked for."""
    return Pointer(factors.buffer, factors.offset * factors.dtype.itemsize, "float")


def launch_factors(found: Found, rows: int, columns: int) -> Launch:
    """The launch for dense rows of the `result`."""
    aligned = not (columns | found.result.offset // found.dtype.itemsize) % VECTOR
    return launch(
        "factors",
        "row_factors.cuh",
        {"operand": STORAGE[found.dtype], "threads": _THREADS, "aligned": aligned},
        [],
        {"x": found.result, "rows": rows, "columns": columns, "factors": found.factors, "epsilon": found.epsilon},
        (ceildiv(rows, _THREADS // 32), 1, 1),
        _THREADS,
    )
