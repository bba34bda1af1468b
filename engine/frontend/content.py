"""What is known of a small tensor's content while a model is read: numbers, or sizes not known before run time.

Exporters compute the targets of Reshape, Expand or Slice from the shapes of other tensors with ordinary operators.
`evaluate` runs those operators on arrays whose elements are numbers, `Dim`s or `Ratio`s, so that nothing of that
arithmetic stays in the graph. The builder calls it for every node it is about to add. It answers None wherever the
result is not certain; the node then stays in the graph and is computed from data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any, TypeAlias

import numpy as np

from engine.ir import dim as dims
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import Dim, DimOp, Sym
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.graph import Value

Array = np.ndarray[Any, Any]

MAX_NUMBERS = 65536  # elements of a constant that is folded here; larger ones are the folding pass's work
MAX_SIZES = 2048  # elements of a tensor of symbolic sizes
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


def evaluate(op: ops.Op, inputs: Sequence[Value], contents: Sequence[Array | None]) -> list[Array] | None:
    """The results of `op`, as arrays of numbers or object arrays of elements; None where they are not certain."""
    run = _RUNNERS.get(type(op))
    if run is None or any(content is None for content in contents):
        return None
    known = [content for content in contents if content is not None]
    symbolic = any(content.dtype == object for content in known)
    shapes = [shape for _, shape in op.infer(inputs)]
    limit = MAX_SIZES if symbolic else MAX_NUMBERS
    for shape in shapes:
        sizes = [size for size in shape if isinstance(size, int)]
        if len(sizes) < len(shape) or prod(sizes) > limit:
            return None
    if symbolic:
        known = [content.astype(object) for content in known]
    try:
        results = run(op, known, symbolic)
    except (Undecided, OverflowError, ZeroDivisionError):
        return None
    if results is None:
        return None
    return [_settled(array, dtype) for array, (dtype, _) in zip(results, op.infer(inputs), strict=True)]


def _settled(array: Array, dtype: DType) -> Array:
    """A plain array where every element is a number."""
    if array.dtype != object:
        return array
    if any(isinstance(element, (Sym, Ratio)) for element in array.flat):
        return array
    return array.astype(dtype.numpy)


def lower_bound(dim: Dim) -> int | None:
    """A number that `dim` is never below, every symbol being a size of at least 1; None where there is none."""
    if isinstance(dim, int):
        return dim
    total = 0
    for monomial, coefficient in dim.terms:
        least = coefficient
        for factor, power in monomial:
            if coefficient < 0:
                return None
            bound = 1 if isinstance(factor, str) else _atom_bound(factor)
            if bound is None or bound < 0:
                return None
            least *= bound**power
        total += least
    return total


def _atom_bound(atom: dims.Atom) -> int | None:
    a, b = lower_bound(atom.a), lower_bound(atom.b)
    if atom.op is DimOp.MAX:
        return max((bound for bound in (a, b) if bound is not None), default=None)
    if a is None or b is None:
        return None
    return min(a, b) if atom.op is DimOp.MIN else 0 if a >= 0 and b > 0 else None


def at_least(a: Dim, b: Dim) -> bool:
    """Whether a ≥ b for certain."""
    bound = lower_bound(a - b)
    return bound is not None and bound >= 0


def smaller(a: Dim, b: Dim) -> Dim:
    """min(a, b), simplified where the bounds of the sizes decide it."""
    return b if at_least(a, b) else a if at_least(b, a) else dims.minimum(a, b)


def larger(a: Dim, b: Dim) -> Dim:
    return a if at_least(a, b) else b if at_least(b, a) else dims.maximum(a, b)


def complexity(dim: Dim) -> int:
    """The number of terms in `dim`, counting those inside its atoms."""
    if isinstance(dim, int):
        return 1
    count = len(dim.terms)
    for monomial, _ in dim.terms:
        for factor, power in monomial:
            count += abs(power) - 1 if isinstance(factor, str) else complexity(factor.a) + complexity(factor.b)
    return count


# --- views and moves: NumPy does them on numbers and on objects alike -------------------------------------------------


def _slice(op: ops.Slice, inputs: list[Array], symbolic: bool) -> list[Array] | None:
    result = inputs[0]
    for axis, (start, size, step) in enumerate(zip(op.starts, op.sizes, op.steps, strict=True)):
        if isinstance(start, Sym) or isinstance(size, Sym):
            return None
        result = np.take(result, start + step * np.arange(size), axis=axis)
    return [result]


def _gather(op: ops.Gather, inputs: list[Array], symbolic: bool) -> list[Array] | None:
    index = inputs[1]
    if any(isinstance(element, (Sym, Ratio)) for element in index.flat):
        return None
    index = index.astype(np.int64)
    size = inputs[0].shape[op.axis]
    if index.size and not (-size <= index.min() and index.max() < size):
        return None
    return [np.asarray(np.take(inputs[0], index, axis=op.axis), inputs[0].dtype)]


def _shape_tensor(op: ops.ShapeTensor, inputs: list[Array], symbolic: bool) -> list[Array] | None:
    shape = tuple(int(size) for size in op.shape if isinstance(size, int))
    if op.values is None:
        return [np.arange(shape[0]).astype(op.dtype.numpy)]
    return [objects(op.values, shape)]


def objects(elements: Sequence[Element], shape: tuple[int, ...]) -> Array:
    """An object array of `elements` (NumPy would look inside sequences if it built one itself)."""
    array = np.empty(len(elements), object)
    for i, element in enumerate(elements):
        array[i] = element
    return array.reshape(shape)


def _reduce(op: ops.Reduce, inputs: list[Array], symbolic: bool) -> list[Array] | None:
    source = _map(op.source, inputs) if symbolic else ex.evaluate(op.source, inputs)
    if op.kind is ops.ReduceKind.MEAN and symbolic:
        return None
    if not source.size:
        return None
    if symbolic:
        combine: Callable[[Any, Any], Any] = _COMBINE[op.kind]
        acc = source
        for axis in reversed(op.axes):
            parts = [np.take(acc, i, axis=axis) for i in range(acc.shape[axis])]
            total = parts[0]
            for part in parts[1:]:
                total = np.asarray(np.frompyfunc(combine, 2, 1)(total, part), object)
            acc = np.expand_dims(np.asarray(total, object), axis) if op.keepdims else np.asarray(total, object)
        return [_map(store, inputs, acc) for store in op.stores]
    wide = source.astype(np.float64) if source.dtype.kind == "f" else source
    acc = np.asarray(_NUMPY_REDUCE[op.kind](wide, axis=op.axes, keepdims=op.keepdims)).astype(source.dtype)
    return [ex.evaluate(store, inputs, acc) for store in op.stores]


_NUMPY_REDUCE: dict[ops.ReduceKind, Callable[..., Any]] = {
    ops.ReduceKind.SUM: np.sum,
    ops.ReduceKind.MEAN: np.mean,
    ops.ReduceKind.MAX: np.max,
    ops.ReduceKind.MIN: np.min,
    ops.ReduceKind.PROD: np.prod,
}


def _pointwise(op: ops.Pointwise, inputs: list[Array], symbolic: bool) -> list[Array] | None:
    if op.gathers:
        return None
    shape = np.broadcast_shapes(*(inputs[i].shape for i in ex.arguments(*op.stores)))
    results = [_map(store, inputs) if symbolic else ex.evaluate(store, inputs) for store in op.stores]
    return [np.broadcast_to(result, shape) for result in results]


# --- point-wise arithmetic on elements --------------------------------------------------------------------------------


def _map(root: ex.Expr, inputs: Sequence[Array], acc: Array | None = None) -> Array:
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


def _element_operation(node: ex.Apply) -> Callable[..., Element]:
    def operate(*elements: Element) -> Element:
        if node.op is PointOp.WHERE and isinstance(elements[0], (bool, np.bool_)):
            return elements[1] if elements[0] else elements[2]
        if not any(isinstance(element, (Sym, Ratio)) for element in elements):
            return _numbers(node, elements)
        if node.op is PointOp.CAST:
            return _cast(elements[0], node.dtype)
        function = _ELEMENTS.get(node.op)
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


_ELEMENTS: dict[PointOp, Callable[..., Element]] = {
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
    PointOp.ISNAN: lambda a: False,
    PointOp.ISINF: lambda a: False,
}
_COMBINE: dict[ops.ReduceKind, Callable[[Element, Element], Element]] = {
    ops.ReduceKind.SUM: _add,
    ops.ReduceKind.PROD: _multiply,
    ops.ReduceKind.MAX: _ELEMENTS[PointOp.MAX],
    ops.ReduceKind.MIN: _ELEMENTS[PointOp.MIN],
}
_RUNNERS: dict[type[ops.Op], Callable[[Any, list[Array], bool], list[Array] | None]] = {
    ops.Reshape: lambda op, inputs, symbolic: [inputs[0].reshape(op.shape)],
    ops.Transpose: lambda op, inputs, symbolic: [np.transpose(inputs[0], op.perm)],
    ops.Expand: lambda op, inputs, symbolic: [np.broadcast_to(inputs[0], op.shape)],
    ops.Concat: lambda op, inputs, symbolic: [np.concatenate(inputs, axis=op.axis)],
    ops.Slice: _slice,
    ops.Gather: _gather,
    ops.ShapeTensor: _shape_tensor,
    ops.Reduce: _reduce,
    ops.Pointwise: _pointwise,
}
