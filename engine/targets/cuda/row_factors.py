"""Factors of rows, 1 / √(variance + ε), by which products divide these (kernels/mma/divided_rows.cuh), and their
offsets, in a launch of their own (row_factors.cuh)."""

from __future__ import annotations

from collections.abc import Sequence
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
    return (dense(rank),), (dense(rank),) * (1 + op.offsets)


def dense(rank: int) -> Requirement:
    """Rows one after the other."""
    return Requirement(Access.DENSE, tuple(range(rank)))


def lower(step: Step, context: Context) -> list[Launch]:
    op, x = step.op, step.inputs[0]
    assert isinstance(op, RowFactors)
    found = found_at(x, step.outputs, op.epsilon)
    return [launch_factors(found, prod(x.shape[:-1]), x.shape[-1])]


def found_at(result: Tensor, places: Sequence[Tensor], epsilon: float, short: bool = True) -> Found:
    """Factors of a `result`, and offsets if there is a second one of the `places`."""
    factors, offsets = pointer_of(places[0]), pointer_of(places[1]) if len(places) > 1 else None
    return Found(pointer_to(result), factors, result.dtype, epsilon, offsets, short)


def pointer_of(factors: Tensor) -> Pointer:
    """The address of factors that lie as asked for."""
    return Pointer(factors.buffer, factors.offset * factors.dtype.itemsize, "float")


def launch_factors(found: Found, rows: int, columns: int) -> Launch:
    """The launch for dense rows of the `result`."""
    aligned = not (columns | found.result.offset // found.dtype.itemsize) % VECTOR
    return launch(
        "factors",
        "row_factors.cuh",
        {
            "operand": STORAGE[found.dtype], "threads": _THREADS, "aligned": aligned,
            "offsets": found.offsets is not None,
        },
        [],
        {"x": found.result, "rows": rows, "columns": columns, **found.arguments()},
        (ceildiv(rows, _THREADS // 32), 1, 1),
        _THREADS,
    )  # fmt: skip
