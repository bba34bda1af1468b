"""The pass `divide_rows`: a layer norm that only products read, as rows to multiply or as a residual, becomes part of
them.

With scale γ, shift β and weights W, norm(x) · W = (x · C) / σ + β · W, where C is γ ⊙ W less the mean of each of its
columns: the columns of C sum to 0, which takes the mean of a row out of the product. So a product needs of a row its
standard deviation σ alone, as the factor 1 / σ (`RowFactors`), and the normalised rows are neither written nor read. A
product that adds norm(x) to its result (as where norms come after residuals, in BERT) reads x instead, with that factor
and the offset mean / σ of each row (`residual_norms.py`). The pass comes last: to all others a norm and its products
are nodes of their own.

C is rounded so that the sums stay 0 (`_rounded`), or a row whose mean is many times its deviation would meet what
rounding has left of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import Apply, Expr, PointOp
from engine.ir.graph import Graph, Node, Value, constant
from engine.ir.ops import Gemm, Norm, NormKind, Reshape, RowFactors, View, factors_shape
from engine.passes.editor import Editor, joined_origin
from engine.passes.residual_norms import Residual, normalise_residual, of_columns, residual_of
from engine.passes.traits import Traits

_VECTOR = 8  # features come in multiples of it: rows that begin at multiples of 16 bytes
_SPREAD = 32  # weights of a column that share what rounding has left of its sum
_SMALLEST = {DType.F16: 2.0**-6, DType.BF16: 0.0}
"""What the largest weight is at least, times a power of two if need be, so that what is a thousand times smaller is
still a normal number."""
_Array = np.ndarray


@dataclass(frozen=True)
class _Scaled:
    """A norm that stores scale · normalised + shift of the rows of `x`: float64, one number per feature."""

    x: Value
    scale: _Array
    shift: _Array
    epsilon: float


def divide_rows(graph: Graph, traits: Traits) -> None:
    """Rewrite every such norm, where the target's products divide rows (`Traits.divided_rows`), and let a product that
    computes what is normalised find their factors, too."""
    if not traits.divided_rows:
        return
    editor, made, normalising = Editor(graph), _Made(), set[Node]()
    for node in editor.nodes():
        found = _scaled(node)
        users = editor.users(node.outputs[0])
        if found is None or not users or editor.is_output(node.output) or _lies_apart(editor, found.x):
            continue
        uses = [_use(user, node.output, found) for user in users]
        # A product that divides rows has no registers to normalise a residual beside.
        both = any(user in normalising and not isinstance(use, Residual) for user, use in zip(users, uses, strict=True))
        if both or any(use is None for use in uses):
            continue
        as_residual = any(isinstance(use, Residual) for use in uses)
        factors = _factors(editor, found.x, found.epsilon, as_residual, node.origin)
        if factors is None:
            continue
        for user, use in zip(users, uses, strict=True):
            if isinstance(use, Residual):
                normalise_residual(editor, node, user, use, (found.x, *factors))
                normalising.add(user)
            elif use is not None:
                _rewrite(editor, node, user, (found, factors[0]), use, made)
        editor.remove(node)
    editor.finish()


def _use(user: Node, normalised: Value, found: _Scaled) -> _Array | Residual | None:
    """What a product needs that reads the norm's result: its weights, centred, or its residual; None for others."""
    centred = _centred(user, normalised, found)
    return residual_of(user, normalised, found.scale, found.shift) if centred is None else centred


def _lies_apart(editor: Editor, x: Value) -> bool:
    """Whether the rows of `x` are some of another tensor's (a class token's): for these a norm is as good, and else
    they would have to be copied."""
    producer = editor.producer(x)
    while producer is not None and isinstance(producer.op, Reshape):
        producer = editor.producer(producer.inputs[0])
    return producer is not None and isinstance(producer.op, View)


def _factors(editor: Editor, x: Value, epsilon: float, offsets: bool, origin: str) -> tuple[Value, ...] | None:
    """The factors of the rows of `x` and, if asked for, their offsets: results of the product with a weight that
    computes it, else of a node; a product that divides rows itself has no registers for moments. None where it has
    factors of another epsilon."""
    host = editor.producer(x)
    if host is not None and isinstance(host.op, Gemm):
        a, b = host.inputs[:2]
        found = host.outputs[1:] if host.op.factors is not None else ()
        if found and host.op.factors != epsilon:
            return None
        narrow = a.dtype is b.dtype is x.dtype and _accumulators(host.op) == {DType.F32}
        alone = len(host.op.stores) == 1 and b.is_constant and b.rank == 2
        if found or (alone and narrow and not host.op.divided):
            names = ("factors", "offsets")[len(found) : 1 + offsets]
            found += tuple(Value(f"{x.name}/{name}", DType.F32, factors_shape(x.shape)) for name in names)
            editor.update(host, replace(host.op, factors=epsilon, offsets=len(found) > 1), outputs=(x, *found))
            return found
    return editor.add(RowFactors(epsilon, offsets), (x,), f"{x.name}/factors", origin).outputs


def _scaled(node: Node) -> _Scaled | None:
    """What a node stores, if it is a layer norm along the last axis of a tensor of 16 bits, scaled and shifted."""
    op = node.op
    if not isinstance(op, Norm) or op.kind is not NormKind.LAYER or op.gathers or len(op.stores) != 1:
        return None
    source = op.source.args[0] if isinstance(op.source, Apply) and op.source.op is PointOp.CAST else op.source
    x = node.inputs[source.index] if isinstance(source, ex.Arg) else None
    if x is None or x.is_constant or x.dtype not in _SMALLEST or x.shape != node.output.shape:
        return None
    features = x.shape[-1]
    if op.axes != (x.rank - 1,) or x.rank < 2 or not isinstance(features, int) or features % _VECTOR:
        return None
    found = _affine(op.stores[0], node, features)
    return None if found is None or node.output.dtype is not x.dtype else _Scaled(x, *found, op.epsilon)


def _affine(e: Expr, node: Node, features: int) -> tuple[_Array, _Array] | None:
    """(scale, shift) where `e` is scale · acc + shift per feature; scale is 0 for a constant."""
    none, one = np.zeros(features), np.ones(features)
    match e:
        case ex.Acc():
            return one, none
        case ex.Const():
            return none, np.full(features, float(e.value))
        case ex.Arg():
            shift = of_columns(node.inputs[e.index], features)
            return None if shift is None else (none, shift)
    parts = [_affine(part, node, features) for part in e.args]
    if e.op is PointOp.CAST and e.dtype.is_float:
        return parts[0]
    if len(parts) != 2 or parts[0] is None or parts[1] is None:
        return None
    (a, b), (c, d) = parts[0], parts[1]
    if e.op is PointOp.ADD:
        return a + c, b + d
    if e.op is PointOp.SUB:
        return a - c, b - d
    if e.op is PointOp.MUL and not (np.any(a) and np.any(c)):
        return a * d + b * c, b * d
    return None


def _centred(user: Node, normalised: Value, found: _Scaled) -> _Array | None:
    """The centred weights [features, n], in float64, of a product that reads `normalised` as its first operand alone;
    None for other nodes, and where a weight does not fit its type."""
    op, others = user.op, user.inputs[1:]
    if not isinstance(op, Gemm) or op.divided or normalised in others:
        return None
    weight = others[0]
    if weight.data is None or weight.rank != 2 or weight.dtype is not found.x.dtype:
        return None
    scaled = found.scale[:, None] * weight.data.astype(np.float64)
    centred: _Array = scaled - scaled.mean(axis=0)
    largest = float(np.abs(centred).max(initial=0))
    fits = np.isfinite(largest) and (weight.dtype is not DType.F16 or largest < 2**15)
    return centred if fits and _accumulators(op) == {DType.F32} else None


def _accumulators(op: Gemm) -> set[DType]:
    return {leaf.dtype for leaf in ex.walk(*op.stores) if isinstance(leaf, ex.Acc)}


def _rounded(centred: _Array, dtype: DType) -> _Array:
    """The nearest numbers, but for the smallest ones of each column, which share what the others leave of its sum: they
    are the finest, so that next to nothing is left in the end, and a small part of what all are rounded by moves."""
    rounded: _Array = centred.astype(dtype.numpy).astype(np.float64)
    least = min(_SPREAD, len(rounded) - 1)
    smallest = np.argpartition(np.abs(rounded), least, axis=0)[:least]
    for rows in (smallest, smallest[:1]):
        values = np.take_along_axis(rounded, rows, axis=0) - rounded.sum(axis=0) / len(rows)
        np.put_along_axis(rounded, rows, values.astype(dtype.numpy).astype(np.float64), axis=0)
    return rounded.astype(dtype.numpy)


class _Made:
    """Constants that have been made: layers that share a weight and the scale of their norms share these, too."""

    def __init__(self) -> None:
        self._weights: dict[tuple[int, bytes], tuple[Value, Value]] = {}

    def weight(self, weight: Value, scale: _Array, centred: _Array, exponent: int) -> Value:
        """`centred`, which is made of a weight and a scale, times 2 to `exponent`."""
        key = (id(weight), scale.tobytes())
        if key not in self._weights:
            rounded = _rounded(centred * 2.0**exponent, weight.dtype)
            # The weight is kept alive with what is made of it, so that its id stays its own.
            self._weights[key] = (weight, constant(f"{weight.name}.centred", rounded))
        return self._weights[key][1]


def _rewrite(
    editor: Editor, norm: Node, user: Node, operands: tuple[_Scaled, Value], centred: _Array, made: _Made
) -> None:
    """Make `user` a product of what the norm reads that divides its rows, by their factors."""
    op, weight, (found, factors) = user.op, user.inputs[1], operands
    assert isinstance(op, Gemm)
    assert weight.data is not None
    exponent = _exponent(centred, weight.dtype)
    new = made.weight(weight, found.scale, centred, exponent)
    acc = next(leaf for leaf in ex.walk(*op.stores) if isinstance(leaf, ex.Acc))
    product: Expr = ex.apply(PointOp.MUL, acc, ex.const(2.0**-exponent, acc.dtype)) if exponent else acc
    biased, bias = _bias(user, acc)
    bias = bias + found.shift @ weight.data.astype(np.float64)
    inputs = [found.x, new, factors, *user.inputs[2:]]
    if np.any(bias):
        product = ex.apply(PointOp.ADD, product, ex.Arg(len(inputs), acc.dtype))
        inputs.append(constant(f"{weight.name}.bias", bias.astype(np.float32)))
    # Operands of the epilogue come one place later, behind the factors.
    later = lambda leaf: ex.Arg(leaf.index + 1, leaf.dtype) if isinstance(leaf, ex.Arg) else leaf  # noqa: E731
    stores = tuple(ex.replaced(store, biased, product, later) for store in op.stores)
    read = ex.arguments(*stores)
    places = {old: 3 + i for i, old in enumerate(read)}
    editor.update(
        user,
        replace(op, stores=tuple(ex.renumber(store, places) for store in stores), divided=True),
        (*inputs[:3], *(inputs[i] for i in read)),
        origin=joined_origin(norm, user),
    )


def _exponent(centred: _Array, dtype: DType) -> int:
    """The power of two that weights are multiplied by, where all are small."""
    largest = float(np.abs(centred).max(initial=0))
    return -int(np.frexp(largest)[1]) if 0 < largest < _SMALLEST[dtype] else 0


def _bias(node: Node, acc: Expr) -> tuple[Expr, _Array]:
    """What all of a product's stores make of the accumulator first, if that is to add a constant for each column, and
    the constant; the accumulator and 0 where it is not."""
    columns = node.inputs[1].shape[-1]
    assert isinstance(columns, int)
    above = {e for e in ex.walk(*node.op.stores) if isinstance(e, Apply) and acc in e.args}  # type: ignore[attr-defined]
    sum_ = above.pop() if len(above) == 1 else None
    if sum_ is None or sum_.op is not PointOp.ADD or sum_.args.count(acc) != 1:
        return acc, np.zeros(columns)
    other = sum_.args[1 - sum_.args.index(acc)]
    other = other.args[0] if isinstance(other, Apply) and other.op is PointOp.CAST else other
    bias = of_columns(node.inputs[other.index], columns) if isinstance(other, ex.Arg) else None
    return (acc, np.zeros(columns)) if bias is None else (sum_, bias)
