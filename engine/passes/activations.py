"""The pass `canonicalise_activations`: GELU, SiLU and hard-swish in one short form each, whatever the exporter wrote.

- erf GELU: ``(x * 0.5) * (erf(x * c) + 1)``, with ½ in either place and √2 by Div or Mul;
- tanh GELU: ½ (1 + tanh z) = sigmoid(2 z), so ``x * sigmoid(x * (x * x * b + a))``;
- sigmoid written with exp: ``sigmoid(x)``; SiLU and the quick GELU follow as ``x * sigmoid(…)``;
- hard-swish: ``x * min(max(x * (1/6) + 0.5, 0), 1)``, from the division before or after the product.

Products are compared as bags of factors with their literals multiplied together, so that association and order do not
matter; the constants are the model's own. Rewrites here may change the last bits, unlike those of `simplify.py`.
"""

from __future__ import annotations

from math import isclose, isfinite

from engine.ir import expr as ex
from engine.ir.expr import Apply, Const, Expr, PointOp
from engine.ir.graph import Graph
from engine.passes.operands import stores_of, with_expressions
from engine.passes.patterns import Captures, Rule, RuleSet, anything, literal, match, number, op
from engine.passes.simplify import simplified
from engine.passes.traits import Traits

ADD, MUL, DIV, MIN, MAX = PointOp.ADD, PointOp.MUL, PointOp.DIV, PointOp.MIN, PointOp.MAX
ERF, TANH, SIGMOID, EXP, NEG = PointOp.ERF, PointOp.TANH, PointOp.SIGMOID, PointOp.EXP, PointOp.NEG

x, y, z = anything("x"), anything("y"), anything("z")
_ONE_PLUS = {kind: op(ADD, op(kind, z), number(1)) for kind in (ERF, TANH)}
_HALF_PLUS_HALF = {kind: op(ADD, op(MUL, op(kind, z), number(0.5)), number(0.5)) for kind in (ERF, TANH)}
_CLAMP = op(MIN, op(MAX, anything("inner"), literal("low")), literal("high"))
_SHIFTED = op(ADD, x, literal("shift"))
_CUBIC = op(ADD, x, anything("cube"))
_MOST_FACTORS = 6


def factors(e: Expr) -> tuple[float, list[Expr]]:
    """`e` as a literal and the other factors of the product that it is."""
    value = 1.0
    rest: list[Expr] = []
    pending = [e]
    while pending:
        part = pending.pop()
        if isinstance(part, Const):
            value *= part.value
        elif isinstance(part, Apply) and part.op is MUL:
            pending += part.args[::-1]
        elif isinstance(part, Apply) and part.op is DIV and isinstance(part.args[1], Const) and part.args[1].value:
            value /= part.args[1].value
            pending.append(part.args[0])
        elif isinstance(part, Apply) and part.op is NEG:
            value = -value
            pending.append(part.args[0])
        else:
            rest.append(part)
    return value, rest


def times(value: float, *parts: Expr) -> Expr:
    """The product of `parts`, the literal with the first of them."""
    first = parts[0] if value == 1 else ex.apply(MUL, parts[0], ex.const(value, parts[0].dtype))
    for part in parts[1:]:
        first = ex.apply(MUL, first, part)
    return first


def _product(e: Apply) -> Expr | None:
    """The activation that a product is, from its bag of factors."""
    if not e.dtype.is_float:
        return None
    value, parts = factors(e)
    if not 2 <= len(parts) <= _MOST_FACTORS or not isfinite(value):
        return None
    for gate in parts:
        others = list(parts)
        others.remove(gate)
        for attempt in (_gelu_erf, _gelu_tanh, _hard_swish):
            found = attempt(value, gate, others)
            if found is not None:
                return found
    return None


def _gate(kind: PointOp, gate: Expr) -> tuple[float, Expr] | None:
    """(c, z) where `gate` is c · (1 + kind(z))."""
    for pattern, scale in ((_ONE_PLUS[kind], 1.0), (_HALF_PLUS_HALF[kind], 0.5)):
        found = match(pattern, gate)
        if found is not None:
            return scale, found["z"]
    return None


def _gelu_erf(value: float, gate: Expr, others: list[Expr]) -> Expr | None:
    found = _gate(ERF, gate)
    if found is None or len(others) != 1:
        return None
    scale, inner = found
    factor, parts = factors(inner)
    if parts != others:
        return None
    x = others[0]
    erf = ex.apply(ERF, times(factor, x))
    return ex.apply(MUL, times(value * scale, x), ex.apply(ADD, erf, ex.const(1, x.dtype)))


def _gelu_tanh(value: float, gate: Expr, others: list[Expr]) -> Expr | None:
    found = _gate(TANH, gate)
    if found is None or len(others) != 1:
        return None
    scale, inner = found
    x = others[0]
    doubled = _twice_cubic(inner, x) or times(2.0, inner)
    return times(2 * value * scale, ex.apply(MUL, x, ex.apply(SIGMOID, doubled)))


def _twice_cubic(e: Expr, x: Expr) -> Expr | None:
    """2 · a · (x + b · x³), or 2 · a · x · (1 + b · x²), as x · (x · x · 2ab + 2a)."""
    a, parts = factors(e)
    if len(parts) == 1:
        found = match(_CUBIC, parts[0])
        if found is None:
            return None
        terms = (found["x"], found["cube"])
        for linear, cube in (terms, terms[::-1]):
            b, powers = factors(cube)
            if linear == x and powers == [x, x, x]:
                return _cubic(x, 2 * a, 2 * a * b)
    if len(parts) == 2 and x in parts:
        other = parts[1] if parts[0] == x else parts[0]
        found = match(op(ADD, anything("square"), number(1)), other)
        if found is not None:
            b, powers = factors(found["square"])
            if powers == [x, x]:
                return _cubic(x, 2 * a, 2 * a * b)
    return None


def _cubic(x: Expr, a: float, b: float) -> Expr:
    square = times(b, ex.apply(MUL, x, x))
    return ex.apply(MUL, x, ex.apply(ADD, square, ex.const(a, x.dtype)))


def _hard_swish(value: float, gate: Expr, others: list[Expr]) -> Expr | None:
    """x · clamp(x + 3, 0, 6) / 6, and x · clamp(x / 6 + ½, 0, 1), up to the same factor everywhere."""
    found = match(_CLAMP, gate)
    if found is None or len(others) != 1:
        return None
    x = others[0]
    low, high = _number(found["low"]), _number(found["high"])
    shifted = match(_SHIFTED, found["inner"])
    if shifted is None or low != 0 or high <= 0:
        return None
    slope, parts = factors(shifted["x"])
    shift = _number(shifted["shift"])
    if parts != [x] or slope <= 0 or not isclose(shift / high, 0.5, rel_tol=1e-4):
        return None
    if not isclose(value * high, 1.0, rel_tol=1e-4) or (high == 1 and value == 1):
        return None
    inner = ex.apply(ADD, times(slope / high, x), ex.const(shift / high, x.dtype))
    clamped = ex.apply(MIN, ex.apply(MAX, inner, ex.const(0, x.dtype)), ex.const(1, x.dtype))
    return ex.apply(MUL, times(value * high, x), clamped)


def _number(e: Expr) -> float:
    assert isinstance(e, Const)
    return float(e.value)


def _sigmoid(m: Captures) -> Expr:
    value, parts = factors(m["y"])
    argument = times(-value, *parts) if parts else ex.const(-value, m["y"].dtype)
    return ex.apply(SIGMOID, argument)


def _quotient_sigmoid(m: Captures) -> Expr:
    return ex.apply(MUL, m["x"], _sigmoid(m))


RULES = (
    Rule("1 / (1 + exp(y))", op(DIV, number(1), op(ADD, op(EXP, y), number(1))), _sigmoid),
    Rule("x / (1 + exp(y))", op(DIV, x, op(ADD, op(EXP, y), number(1))), _quotient_sigmoid),
)


def _structural(e: Apply) -> Expr | None:
    return _product(e) if e.op in (MUL, DIV) else None


_CANONICAL = RuleSet(RULES, _structural)


def canonical(e: Expr) -> Expr:
    """`e` with the activations in it in their canonical forms."""
    return simplified(_CANONICAL.rewrite(e))


def canonicalise_activations(graph: Graph, _traits: Traits) -> None:
    """Every epilogue of the graph with its activations in canonical form."""
    for node in graph.nodes:
        stores = stores_of(node.op)
        new = tuple(canonical(store) for store in stores)
        if new != stores and all(ex.arguments(a) == ex.arguments(b) for a, b in zip(new, stores, strict=True)):
            node.op = with_expressions(node.op, new)
