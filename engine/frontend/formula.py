"""Point-wise formulas that read like mathematics: `Term` wraps an expression with Python's operators.

Operator functions write ``x * 0.5 * (1 + erf(x / SQRT2))``; numbers take the dtype of the term beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, Union

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp

Operand: TypeAlias = Union["Term", float, int, bool]


@dataclass(frozen=True)
class Term:
    """An expression; `+ - * / -x abs` build larger ones. Comparisons are the functions below."""

    expr: ex.Expr

    @property
    def dtype(self) -> DType:
        return self.expr.dtype

    def cast(self, dtype: DType) -> Term:
        return Term(ex.cast(self.expr, dtype))

    def __add__(self, other: Operand) -> Term:
        return apply(PointOp.ADD, self, other)

    def __radd__(self, other: Operand) -> Term:
        return apply(PointOp.ADD, self, other)

    def __sub__(self, other: Operand) -> Term:
        return apply(PointOp.SUB, self, other)

    def __rsub__(self, other: Operand) -> Term:
        return apply(PointOp.SUB, self.like(other), self)

    def __mul__(self, other: Operand) -> Term:
        return apply(PointOp.MUL, self, other)

    def __rmul__(self, other: Operand) -> Term:
        return apply(PointOp.MUL, self, other)

    def __truediv__(self, other: Operand) -> Term:
        return apply(PointOp.DIV, self, other)

    def __rtruediv__(self, other: Operand) -> Term:
        return apply(PointOp.DIV, self.like(other), self)

    def __neg__(self) -> Term:
        return apply(PointOp.NEG, self)

    def like(self, value: Operand) -> Term:
        """`value` as a term: a number becomes a constant of this term's dtype."""
        return value if isinstance(value, Term) else Term(ex.const(value, self.dtype))


def apply(op: PointOp, first: Term, *others: Operand) -> Term:
    terms = [first, *(first.like(other) for other in others)]
    for i, term in enumerate(terms):
        if len(terms) == 2 and isinstance(term.expr, ex.Const) and _is_neutral(op, term.expr, i == 1):
            return terms[1 - i]
    return Term(ex.apply(op, first.expr, *(first.like(other).expr for other in others)))


def _is_neutral(op: PointOp, constant: ex.Const, is_second: bool) -> bool:
    """Whether the constant changes nothing: ranges and masks of exporters are full of such steps."""
    value, dtype = constant.value, constant.dtype
    if dtype is DType.BOOL:
        return (op is PointOp.AND and value is True) or (op is PointOp.OR and value is False)
    if op is PointOp.MUL or (op is PointOp.DIV and is_second):
        return value == 1
    # Not for floats: -0.0 + 0.0 is 0.0.
    return dtype.is_int and value == 0 and (op is PointOp.ADD or (op is PointOp.SUB and is_second))


def minimum(a: Term, b: Operand) -> Term:
    return apply(PointOp.MIN, a, b)


def maximum(a: Term, b: Operand) -> Term:
    return apply(PointOp.MAX, a, b)


def equal(a: Term, b: Operand) -> Term:
    return apply(PointOp.EQ, a, b)


def less(a: Term, b: Operand) -> Term:
    return apply(PointOp.LT, a, b)


def less_equal(a: Term, b: Operand) -> Term:
    return apply(PointOp.LE, a, b)


def logical_not(a: Term) -> Term:
    return apply(PointOp.NOT, a)


def logical_or(a: Term, b: Term) -> Term:
    return apply(PointOp.OR, a, b)


def logical_and(a: Term, b: Term) -> Term:
    return apply(PointOp.AND, a, b)


def where(condition: Term, a: Term, b: Operand) -> Term:
    return Term(ex.apply(PointOp.WHERE, condition.expr, a.expr, a.like(b).expr))


def exp(x: Term) -> Term:
    return apply(PointOp.EXP, x)


def log(x: Term) -> Term:
    return apply(PointOp.LOG, x)


def sqrt(x: Term) -> Term:
    return apply(PointOp.SQRT, x)


def tanh(x: Term) -> Term:
    return apply(PointOp.TANH, x)


def erf(x: Term) -> Term:
    return apply(PointOp.ERF, x)


def sigmoid(x: Term) -> Term:
    return apply(PointOp.SIGMOID, x)


def absolute(x: Term) -> Term:
    return apply(PointOp.ABS, x)


def floor(x: Term) -> Term:
    return apply(PointOp.FLOOR, x)


def round_half_even(x: Term) -> Term:
    return apply(PointOp.ROUND, x)


def softplus(x: Term) -> Term:
    """log(1 + eˣ), without overflow for large x."""
    return maximum(x, 0.0) + log(1.0 + exp(-absolute(x)))
