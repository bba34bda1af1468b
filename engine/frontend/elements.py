"""Point-wise arithmetic on elements of small tensors that are numbers, sizes (`Dim`) or exact fractions of sizes.

`content` and `grid` run expressions through `map_elements`. An operation without a certain answer raises `Undecided`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

from engine.frontend.bounds import at_least, complexity, larger, lower_bound, smaller
from engine.ir import dim as dims
from engine.ir import expr as ex
from engine.ir.dim import Dim, Sym
from engine.ir.dtype import DType
from engine.ir.expr import PointOp

Array = np.ndarray[Any, Any]

MAX_TERMS = 256  # monomials and atoms in one size: real models have a few, hostile ones grow without end
_MAX_INT = 2**63 - 1


@dataclass(frozen=True)
class Ratio:
    """An exact fraction of a symbolic size, as `Resize` targets have them before they are rounded."""

    numerator: Sym
    denominator: int


Element: TypeAlias = Any  # int | float | bool | Sym | Ratio


class Undecided(Exception):
    """The symbolic arithmetic has no certain answer."""


def objects(elements: Sequence[Element], shape: tuple[int, ...]) -> Array:
    """An object array of `elements` (NumPy would look inside sequences if it built one itself)."""
    array = np.empty(len(elements), object)
    for i, element in enumerate(elements):
        array[i] = element
    return array.reshape(shape)


def map_elements(root: ex.Expr, inputs: Sequence[Array], acc: Array | None = None) -> Array:
    """`root` over object arrays. Raises Undecided."""
    done: dict[ex.Expr, Array] = {}
    for node in ex.walk(root):
        if isinstance(node, ex.Arg):
            done[node] = inputs[node.index]
        elif isinstance(node, ex.Acc):
            assert acc is not None
            done[node] = acc
        elif isinstance(node, ex.Const):
            done[node] = np.asarray(node.value, object)
        else:
            operate = _element_operation(node)
            mapped = np.frompyfunc(operate, len(node.args), 1)(*(done[arg] for arg in node.args))
            done[node] = np.asarray(mapped, object)
    return done[root]


def apply_elements(root: ex.Expr, elements: Sequence[Element]) -> Element:
    """`root` where argument i is the single element `elements[i]`. Raises Undecided."""
    return map_elements(root, [objects([element], ()) for element in elements]).item()


def _element_operation(node: ex.Apply) -> Callable[..., Element]:
    def operate(*elements: Element) -> Element:
        if node.op is PointOp.WHERE and isinstance(elements[0], (bool, np.bool_)):
            return elements[1] if elements[0] else elements[2]
        if not any(isinstance(element, (Sym, Ratio)) for element in elements):
            return _numbers(node, elements)
        if node.op is PointOp.CAST:
            return _cast(elements[0], node.dtype)
        function = ELEMENT_OPERATIONS.get(node.op)
        if node.op is PointOp.DIV and node.dtype.is_int:
            function = _divide_integers
        if function is None:
            raise Undecided
        result = function(*elements)
        if isinstance(result, Sym) and complexity(result) > MAX_TERMS:
            raise Undecided
        if isinstance(result, int) and abs(result) > _MAX_INT:
            raise Undecided
        return result

    return operate


def _numbers(node: ex.Apply, elements: Sequence[Element]) -> Element:
    leaves = tuple(ex.Arg(i, arg.dtype) for i, arg in enumerate(node.args))
    arrays = [np.asarray(e, arg.dtype.numpy) for e, arg in zip(elements, node.args, strict=True)]
    return ex.evaluate(ex.Apply(node.op, leaves, node.dtype), arrays).item()


def _fraction(element: Element) -> tuple[Dim, int]:
    if isinstance(element, Ratio):
        return element.numerator, element.denominator
    if isinstance(element, (Sym, int)):
        return element, 1
    if isinstance(element, float) and np.isfinite(element):
        fraction = Fraction(element)
        if fraction.denominator <= 2**16:
            return fraction.numerator, fraction.denominator
    raise Undecided


def _ratio(numerator: Dim, denominator: int) -> Element:
    quotient = dims.floordiv(numerator, denominator)
    if quotient * denominator == numerator:
        return quotient
    if isinstance(numerator, int):
        return numerator / denominator
    return Ratio(numerator, denominator)


def _add(a: Element, b: Element) -> Element:
    (n, d), (m, e) = _fraction(a), _fraction(b)
    return _ratio(n * e + m * d, d * e)


def _multiply(a: Element, b: Element) -> Element:
    (n, d), (m, e) = _fraction(a), _fraction(b)
    return _ratio(n * m, d * e)


def _negate(a: Element) -> Element:
    return _multiply(a, -1)


def _divide(a: Element, b: Element) -> Element:
    (n, d), (m, e) = _fraction(a), _fraction(b)
    if isinstance(m, int):
        if m == 0:
            raise Undecided
        sign = -1 if m < 0 else 1
        return _ratio(n * e * sign, d * m * sign)
    exact = dims.floordiv(n * e, m * d)
    if exact * m * d != n * e:
        raise Undecided
    return exact


def _divide_integers(a: Element, b: Element) -> Element:
    if not at_least(a, 0) or not at_least(b, 1):  # truncation and floor agree only there
        exact = dims.floordiv(a, b)
        if exact * b != a:
            raise Undecided
        return exact
    return dims.floordiv(a, b)


def _floor(a: Element) -> Element:
    return dims.floordiv(*_fraction(a))


def _ceil(a: Element) -> Element:
    return dims.ceildiv(*_fraction(a))


def _cast(a: Element, dtype: DType) -> Element:
    if dtype is DType.BOOL:
        return not _equal(a, 0)
    if dtype.is_float or isinstance(a, Sym):
        return a
    if not at_least(a.numerator, 0):
        raise Undecided
    return _floor(a)


def _whole(a: Element) -> Dim:
    n, d = _fraction(a)
    if d != 1:
        raise Undecided
    return n


def _equal(a: Element, b: Element) -> bool:
    difference = _difference(a, b)
    if isinstance(difference, int):
        return difference == 0
    for signed in (difference, -difference):
        bound = lower_bound(signed)
        if bound is not None and bound > 0:
            return False
    raise Undecided


def _less(a: Element, b: Element) -> bool:
    if at_least(_difference(b, a), 1):
        return True
    if at_least(_difference(a, b), 0):
        return False
    raise Undecided


def _less_or_equal(a: Element, b: Element) -> bool:
    return not _less(b, a)


def _difference(a: Element, b: Element) -> Dim:
    (n, d), (m, e) = _fraction(a), _fraction(b)
    return n * e - m * d


def _absolute(a: Element) -> Element:
    if at_least(_whole(a), 0):
        return a
    raise Undecided


def _power(a: Element, b: Element) -> Element:
    if not isinstance(b, (int, float)) or b not in {1, 2, 3}:
        raise Undecided
    return _multiply(a, _power(a, b - 1)) if b > 1 else a


ELEMENT_OPERATIONS: dict[PointOp, Callable[..., Element]] = {
    PointOp.ADD: _add,
    PointOp.SUB: lambda a, b: _add(a, _negate(b)),
    PointOp.MUL: _multiply,
    PointOp.DIV: _divide,
    PointOp.MIN: lambda a, b: smaller(_whole(a), _whole(b)),
    PointOp.MAX: lambda a, b: larger(_whole(a), _whole(b)),
    PointOp.MOD: lambda a, b: dims.mod(_whole(a), _whole(b)),
    PointOp.NEG: _negate,
    PointOp.ABS: _absolute,
    PointOp.FLOOR: _floor,
    PointOp.CEIL: _ceil,
    PointOp.ROUND: _whole,
    PointOp.POW: _power,
    PointOp.EQ: _equal,
    PointOp.LT: _less,
    PointOp.LE: _less_or_equal,
    PointOp.ISNAN: lambda _: False,
    PointOp.ISINF: lambda _: False,
}
