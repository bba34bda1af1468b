"""Residuals that are normalised where they are added, for the pass `divide_rows`: where only products read a layer
norm, one that adds its result to its own reads what the norm reads.

With scale γ, shift β and the factor r and the offset o of each row (`RowFactors`), a · b + c + norm(x) is
a · b + (c + β) + γ · (x · r − o): a product with a full tile x, a number for each row twice, and γ for each column. The
difference is exact to a few 2⁻²⁴ of |mean / σ|, and x has been rounded to 2⁻¹¹ of that (bf16: 2⁻⁸) already, whatever
the mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import Apply, Expr, PointOp
from engine.ir.graph import Node, Value, constant
from engine.ir.ops import Gemm
from engine.passes.editor import Editor, joined_origin


@dataclass(frozen=True)
class Residual:
    """What a product adds to its accumulator beside normalised rows, and what these are multiplied by: float64, one
    number per column."""

    bias: np.ndarray
    scale: np.ndarray


def residual_of(user: Node, normalised: Value, scale: np.ndarray, shift: np.ndarray) -> Residual | None:
    """What is needed of a product that adds `normalised`, scaled and shifted rows, to its accumulator; None where it
    does not, adds anything else but numbers for each column, or divides rows."""
    op = user.op
    if not isinstance(op, Gemm) or op.divided or len(op.stores) != 1 or normalised in user.inputs[: op.operands]:
        return None
    (store,) = op.stores
    if user.outputs[0].shape != normalised.shape or not store.dtype.is_float:
        return None
    bias, found = shift.copy(), [0, 0]  # accumulators and residuals
    for term in _terms(store):
        value = user.inputs[term.index] if isinstance(term, ex.Arg) else None
        added = _added(term, value, len(shift))
        if isinstance(term, ex.Acc) and term.dtype is DType.F32:
            found[0] += 1
        elif value is normalised:
            found[1] += 1
        elif added is not None:
            bias = bias + added
        else:
            return None
    return Residual(bias, scale) if found == [1, 1] else None


def _terms(e: Expr) -> list[Expr]:
    """What is added up, without the casts from one float type to another: sums are fp32 whatever they are."""
    if isinstance(e, Apply) and e.op is PointOp.ADD:
        return [term for part in e.args for term in _terms(part)]
    if isinstance(e, Apply) and e.op is PointOp.CAST and e.dtype.is_float and e.args[0].dtype.is_float:
        return _terms(e.args[0])
    return [e]


def _added(term: Expr, value: Value | None, columns: int) -> np.ndarray | None:
    """A term that is a constant for each column."""
    if isinstance(term, ex.Const):
        return np.full(columns, float(term.value))
    return None if value is None else of_columns(value, columns)


def of_columns(value: Value, columns: int) -> np.ndarray | None:
    """A constant that has a number for each column, or one for all, as float64; None for other values."""
    data = value.data
    if data is None or data.size not in (1, columns) or data.shape[-1:] not in ((), (1,), (columns,)):
        return None
    return np.broadcast_to(data.reshape(-1).astype(np.float64), (columns,))


def normalise_residual(editor: Editor, norm: Node, user: Node, found: Residual, rows: tuple[Value, ...]) -> None:
    """Make `user` read `rows`, what the norm reads with its factors and offsets, in place of the norm's result."""
    op, (x, factors, offsets) = user.op, rows
    assert isinstance(op, Gemm)
    name = user.inputs[1].name
    inputs = [*user.inputs[:2], x, factors, offsets, constant(f"{name}.scale", found.scale.astype(np.float32))]
    centred = ex.apply(PointOp.MUL, ex.cast(ex.Arg(2, x.dtype), DType.F32), ex.Arg(3, DType.F32))
    centred = ex.apply(PointOp.SUB, centred, ex.Arg(4, DType.F32))
    total: Expr = ex.Acc()
    if np.any(found.bias):
        total = ex.apply(PointOp.ADD, total, ex.Arg(6, DType.F32))
        inputs.append(constant(f"{name}.bias", found.bias.astype(np.float32)))
    total = ex.apply(PointOp.ADD, total, ex.apply(PointOp.MUL, ex.Arg(5, DType.F32), centred))
    store = ex.cast(total, op.stores[0].dtype)
    editor.update(user, replace(op, stores=(store,)), inputs, origin=joined_origin(norm, user))
