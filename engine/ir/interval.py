"""Between which numbers the value of an expression lies, whatever its arguments are. Used by passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

from engine.ir import expr as ex
from engine.ir.dtype import DType

Interval = tuple[float, float]
"""The least and the largest value, both included; infinite where nothing is known."""

UNKNOWN: Interval = (-inf, inf)
_BOUNDED: Mapping[ex.PointOp, Interval] = {
    ex.PointOp.SIGMOID: (0.0, 1.0),
    ex.PointOp.TANH: (-1.0, 1.0),
    ex.PointOp.ERF: (-1.0, 1.0),
    ex.PointOp.SIN: (-1.0, 1.0),
    ex.PointOp.COS: (-1.0, 1.0),
}
_FLOATS = (DType.F16, DType.BF16, DType.F32, DType.F64)


def bounds(e: ex.Expr) -> Interval:
    """The interval of an expression of floats. A NaN lies in every one. Roundings are those of the exact result to the
    nearest number, so they do not leave an interval whose ends are numbers of the type, as 0 and 1 are."""
    found: dict[ex.Expr, Interval] = {}
    for node in ex.walk(e):
        found[node] = _of(node, [found[arg] for arg in node.args] if isinstance(node, ex.Apply) else [])
    return found[e]


def _of(node: ex.Expr, args: list[Interval]) -> Interval:
    if isinstance(node, ex.Const):
        return (float(node.value), float(node.value)) if float(node.value) == float(node.value) else UNKNOWN
    if not isinstance(node, ex.Apply) or node.dtype not in _FLOATS:
        return UNKNOWN
    if node.op in _BOUNDED:
        return _BOUNDED[node.op]
    if node.op is ex.PointOp.CAST and all(isinstance(arg, ex.Const) or arg.dtype in _FLOATS for arg in node.args):
        return args[0]
    combine = _COMBINE.get(node.op)
    return UNKNOWN if combine is None else combine(*args)


def _minimum(a: Interval, b: Interval) -> Interval:
    return min(a[0], b[0]), min(a[1], b[1])


def _maximum(a: Interval, b: Interval) -> Interval:
    return max(a[0], b[0]), max(a[1], b[1])


def _product(a: Interval, b: Interval) -> Interval:
    if inf in (*map(abs, a), *map(abs, b)):
        return UNKNOWN
    ends = [x * y for x in a for y in b]
    return min(ends), max(ends)


def _quotient(a: Interval, b: Interval) -> Interval:
    if b[0] <= 0 <= b[1] or inf in (*map(abs, a), *map(abs, b)):
        return UNKNOWN
    ends = [x / y for x in a for y in b]
    return min(ends), max(ends)


_COMBINE: Mapping[ex.PointOp, Callable[[Interval, Interval], Interval]] = {
    ex.PointOp.MIN: _minimum,
    ex.PointOp.MAX: _maximum,
    ex.PointOp.MUL: _product,
    ex.PointOp.DIV: _quotient,
}
