"""Simplification of point-wise expressions: rules that hold for every input, up to the last bit of rounding.

`simplified` is pure; the pass `simplify` applies it to every expression of a graph. A rule is one entry of `RULES`.
"""

from __future__ import annotations

from math import frexp, isfinite

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import Const, Expr, PointOp
from engine.ir.graph import Graph
from engine.passes.operands import Operands, fixed_operands, gathers_of, stores_of, with_expressions
from engine.passes.patterns import COMMUTATIVE, Captures, Rule, RuleSet, anything, literal, number, op
from engine.passes.traits import Traits

ADD, SUB, MUL, DIV, POW = PointOp.ADD, PointOp.SUB, PointOp.MUL, PointOp.DIV, PointOp.POW
MIN, MAX, NEG, WHERE, NOT, SQRT = PointOp.MIN, PointOp.MAX, PointOp.NEG, PointOp.WHERE, PointOp.NOT, PointOp.SQRT
AND, EXP, ISNAN = PointOp.AND, PointOp.EXP, PointOp.ISNAN

_MANTISSA = {DType.F64: 53, DType.F32: 24, DType.F16: 11, DType.BF16: 8, DType.F8E4M3: 4}
_SOFT_LIMIT = 1e30  # products of literals beyond this could overflow where the separate products did not

x, y, z = anything("x"), anything("y"), anything("z")
c, d = literal("c"), literal("d")
floating = anything("x", lambda e: e.dtype.is_float)


def _value(e: Expr) -> float:
    assert isinstance(e, Const)
    return e.value


def _like(value: float, e: Expr) -> Expr:
    return ex.const(value, e.dtype)


def _is_power_of_two(value: float) -> bool:
    return isfinite(value) and value != 0 and abs(frexp(value)[0]) == 0.5 and 2.0**-100 < abs(value) < 2.0**100


def _merge_products(m: Captures) -> Expr | None:
    merged = _value(m["c"]) * _value(m["d"])
    if not m["x"].dtype.is_float or not 1 / _SOFT_LIMIT < abs(merged) < _SOFT_LIMIT:
        return None
    return ex.apply(MUL, m["x"], _like(merged, m["x"]))


def _power(m: Captures) -> Expr | None:
    base, exponent = m["x"], _value(m["c"])
    if exponent == 1:
        return base
    if exponent == 2:
        return ex.apply(MUL, base, base)
    if not base.dtype.is_float:
        return None
    if exponent == 3:
        return ex.apply(MUL, ex.apply(MUL, base, base), base)
    if exponent == 0.5:
        return ex.apply(SQRT, base)
    if exponent == -0.5:
        return ex.apply(DIV, _like(1, base), ex.apply(SQRT, base))
    return ex.apply(DIV, _like(1, base), base) if exponent == -1 else None


def _bounds_in_order(m: Captures) -> Expr | None:
    low, high = _value(m["c"]), _value(m["d"])
    return ex.apply(MIN, ex.apply(MAX, m["x"], m["c"]), m["d"]) if low <= high else None


def _where_constant(m: Captures) -> Expr:
    return m["x"] if _value(m["c"]) else m["y"]


RULES = (
    Rule("x + 0", op(ADD, x, number(0)), lambda m: m["x"]),
    Rule("x - 0", op(SUB, x, number(0)), lambda m: m["x"]),
    Rule("x * 1", op(MUL, x, number(1)), lambda m: m["x"]),
    Rule("x / 1", op(DIV, x, number(1)), lambda m: m["x"]),
    Rule("0 - x", op(SUB, number(0), floating), lambda m: ex.apply(NEG, m["x"])),
    Rule("x * -1", op(MUL, floating, number(-1)), lambda m: ex.apply(NEG, m["x"])),
    Rule("--x", op(NEG, op(NEG, x)), lambda m: m["x"]),
    Rule("x + -y", op(ADD, x, op(NEG, y)), lambda m: ex.apply(SUB, m["x"], m["y"])),
    Rule("x - -y", op(SUB, x, op(NEG, y)), lambda m: ex.apply(ADD, m["x"], m["y"])),
    Rule("not not x", op(NOT, op(NOT, x)), lambda m: m["x"]),
    Rule("x / 2ⁿ", op(DIV, floating, literal("c", _is_power_of_two)),
         lambda m: ex.apply(MUL, m["x"], _like(1 / _value(m["c"]), m["x"]))),
    Rule("(x * c) * d", op(MUL, op(MUL, x, c), d), _merge_products),
    Rule("x ** c", op(POW, x, c), _power),
    Rule("x * (1 / y)", op(MUL, floating, op(DIV, number(1), y)), lambda m: ex.apply(DIV, m["x"], m["y"])),
    Rule("max(max(x, c), d)", op(MAX, op(MAX, x, c), d),
         lambda m: ex.apply(MAX, m["x"], _like(max(_value(m["c"]), _value(m["d"])), m["x"]))),
    Rule("min(min(x, c), d)", op(MIN, op(MIN, x, c), d),
         lambda m: ex.apply(MIN, m["x"], _like(min(_value(m["c"]), _value(m["d"])), m["x"]))),
    Rule("max(min(x, d), c)", op(MAX, op(MIN, x, d), c), _bounds_in_order),
    Rule("max(x, -inf)", op(MAX, x, number(float("-inf"))), lambda m: m["x"]),
    Rule("min(x, inf)", op(MIN, x, number(float("inf"))), lambda m: m["x"]),
    Rule("max(x, x)", op(MAX, x, x), lambda m: m["x"]),
    Rule("min(x, x)", op(MIN, x, x), lambda m: m["x"]),
    Rule("where(c, x, x)", op(WHERE, z, x, x), lambda m: m["x"]),
    Rule("where(constant, …)", op(WHERE, c, x, y), _where_constant),
    Rule("where(not z, x, y)", op(WHERE, op(NOT, z), x, y), lambda m: ex.apply(WHERE, m["z"], m["y"], m["x"])),
)  # fmt: skip


def _structural(e: ex.Apply) -> Expr | None:
    """What no pattern says: literals folded or to the right, the accumulator to the left, needless casts removed."""
    if all(isinstance(arg, Const) for arg in e.args) and e.dtype is not DType.STRING:
        value = ex.evaluate(e, ())
        return ex.const(value.item(), e.dtype)
    if e.op in COMMUTATIVE and (isinstance(e.args[0], Const) or isinstance(e.args[1], ex.Acc)):
        swapped = ex.Apply(e.op, e.args[::-1], e.dtype)
        return swapped if not isinstance(e.args[0], ex.Acc) and not isinstance(e.args[1], Const) else None
    if e.op is PointOp.CAST:
        return _cast(e)
    return None


def _cast(e: ex.Apply) -> Expr | None:
    inner = e.args[0]
    if inner.dtype is e.dtype:
        return inner
    if isinstance(inner, ex.Apply) and inner.op is PointOp.CAST and _holds(inner.dtype, inner.args[0].dtype):
        return ex.cast(inner.args[0], e.dtype)
    return None


def _holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of `narrow` can be told apart in `wide`, so that a cast through it changes nothing."""
    if wide is narrow or (narrow is DType.BOOL and wide is not DType.STRING):
        return True
    if wide.is_float and narrow.is_float:
        return _MANTISSA[wide] >= _MANTISSA[narrow] and (wide, narrow) != (DType.F16, DType.BF16)
    if wide.is_float and narrow.is_int:
        return _MANTISSA[wide] >= 8 * narrow.itemsize
    if wide.is_int and narrow.is_int:
        smallest = np.iinfo(wide.numpy)
        inner = np.iinfo(narrow.numpy)
        return bool(smallest.min <= inner.min and smallest.max >= inner.max)
    return False


_SIMPLER = RuleSet(RULES, _structural)


def simplified(e: Expr) -> Expr:
    """An equal expression that is no longer than `e`."""
    return _SIMPLER.rewrite(e)


def simplify(graph: Graph, _traits: Traits) -> None:
    """Every expression of the graph in its simplest form that reads the same arguments: they give nodes their shape."""
    for node in graph.nodes:
        op_ = node.op
        stores = stores_of(op_)
        source: Expr | None = getattr(op_, "source", None)
        if stores:
            new_source = None if source is None else _keeping_arguments(source)
            node.op = with_expressions(op_, tuple(_keeping_arguments(store) for store in stores), new_source)


def _keeping_arguments(e: Expr) -> Expr:
    new = simplified(e)
    return new if ex.arguments(new) == ex.arguments(e) else e


def drop_unread(graph: Graph, _traits: Traits) -> None:
    """Inputs that no operand and no expression of a node reads any more are taken off it."""
    for node in graph.nodes:
        stores = stores_of(node.op)
        source: Expr | None = getattr(node.op, "source", None)
        if not stores:
            continue
        fixed = fixed_operands(node.op)
        gathers = gathers_of(node.op)
        read = ex.arguments(*stores, *([] if source is None else [source]))
        if len({*range(fixed), *read, *(by for _, by in gathers)}) == len(node.inputs):
            continue
        operands = Operands(node.inputs[:fixed])
        new_source = None if source is None else operands.adopt(source, node)
        new_stores = tuple(operands.adopt(store, node) for store in stores)
        node.op, node.inputs = with_expressions(node.op, new_stores, new_source, operands.gathers), operands.inputs
