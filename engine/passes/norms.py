"""The pass `recognise_norms`: normalisations written in primitive operators become `Norm` nodes.

Layer norm (with it instance and group norm on their views), RMS norm and L2 normalisation are all `a · f(statistic)`
with a reduction for the statistic of a. The root looked for is therefore a product or quotient in which one factor is
an inverse square root over a `Reduce`, and another is the very expression that the reduction squares. Scale and shift
are left around the new node for the epilogue fusion.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

from engine.ir import expr as ex
from engine.ir.dim import Dim, floordiv
from engine.ir.dtype import DType
from engine.ir.expr import Apply, Const, Expr, PointOp
from engine.ir.graph import Graph, Node, Value
from engine.ir.ops import Norm, NormKind, Pointwise, Reduce, ReduceKind, Reshape
from engine.ir.ops.light import iteration_shape
from engine.passes.editor import Editor
from engine.passes.patterns import anything, literal, match, op
from engine.passes.simplify import simplified
from engine.passes.terms import Reduction, Terms, same, without_casts
from engine.passes.traits import Traits
from engine.passes.views import reshape

ADD, SUB, MUL, DIV, SQRT, MAX = PointOp.ADD, PointOp.SUB, PointOp.MUL, PointOp.DIV, PointOp.SQRT, PointOp.MAX

_FACTOR_LIMIT = 8  # factors of one product that are looked at: a longer product is no norm
_STATISTIC_PLUS = op(ADD, anything("statistic"), literal("epsilon", lambda v: v >= 0))
_STATISTIC_FLOOR = op(MAX, anything("statistic"), literal("epsilon", lambda v: v >= 0))
_SHIFT = op(SUB, anything("b"), op(MUL, anything("m"), anything("s")))
_TWO_STEP = op(ADD, op(MUL, anything("x"), anything("s")), _SHIFT)


@dataclass(frozen=True)
class _Match:
    """`rest` · norm(`source`), where `rest` are the other factors: (expression, whether it divides)."""

    kind: NormKind
    source: Expr
    reduction: Reduction
    epsilon: float
    rest: tuple[tuple[Expr, bool], ...]
    shift: Expr | None = None


def recognise_norms(graph: Graph, _traits: Traits) -> None:
    """Replace every normalisation in primitive form. What else reads its intermediate values still finds them."""
    if not any(isinstance(node.op, Reduce) for node in graph.nodes):
        return
    editor = Editor(graph)
    terms = Terms(editor)
    made: dict[tuple[Norm, Value], Value] = {}
    for node in editor.nodes():
        if isinstance(node.op, Pointwise) and len(node.op.stores) == 1 and not node.op.gathers:
            e = terms.of(node.output)
            found = _match(terms, without_casts(e))
            if found is not None:
                _rewrite(editor, terms, node, e, found, made)
    editor.finish()


def _match(terms: Terms, e: Expr) -> _Match | None:
    if not isinstance(e, Apply):
        return None
    if e.op is ADD:
        return _match_two_step(terms, e)
    if e.op not in (MUL, DIV):
        return None
    factors = _factors(e)
    for i, (factor, inverted) in enumerate(factors):
        statistic = _statistic(terms, factor) if inverted else None
        if statistic is None:
            continue
        for j, (a, a_inverted) in enumerate(factors):
            if i != j and not a_inverted:
                found = _normalised(terms, a, *statistic)
                if found is not None:
                    rest = tuple(f for k, f in enumerate(factors) if k not in (i, j))
                    return _Match(*found, rest)
    return None


def _match_two_step(terms: Terms, e: Expr) -> _Match | None:
    """x · s + (b − mean · s) with s = scale / sqrt(variance + ε), as some exporters write it."""
    found = match(_TWO_STEP, e)
    if found is None:
        return None
    mean = terms.leaf(without_casts(found["m"]))
    if not isinstance(mean, Reduction) or mean.op.kind is not ReduceKind.MEAN or not same(mean.source, found["x"]):
        return None
    scale = ex.apply(MUL, ex.apply(SUB, found["x"], found["m"]), found["s"])
    inner = _match(terms, scale)
    if inner is None or inner.kind is not NormKind.LAYER:
        return None
    return _Match(inner.kind, inner.source, inner.reduction, inner.epsilon, inner.rest, shift=found["b"])


def _factors(e: Expr) -> list[tuple[Expr, bool]]:
    """The factors of a tree of products and quotients, each with whether it divides."""
    done: list[tuple[Expr, bool]] = []
    pending = [(e, False)]
    while pending and len(done) < _FACTOR_LIMIT:
        part, inverted = pending.pop(0)
        bare = without_casts(part)
        if isinstance(bare, Apply) and bare.op in (MUL, DIV):
            pending += [(bare.args[0], inverted), (bare.args[1], inverted != (bare.op is DIV))]
        elif not (isinstance(bare, Const) and bare.value == 1):
            done.append((part, inverted))
    return done + pending


def _statistic(terms: Terms, divisor: Expr) -> tuple[Reduction, ReduceKind, float, bool] | None:
    """sqrt(mean + ε), max(sqrt(sum), ε), sqrt(max(sum, ε)), sqrt(sum): (reduction, its kind, ε, is ε a floor)."""
    e = without_casts(divisor)
    floor: float | None = None
    if (found := match(_STATISTIC_FLOOR, e)) is not None:
        floor = _number(found["epsilon"])
        e = without_casts(found["statistic"])
    if not isinstance(e, Apply) or e.op is not SQRT:
        return None
    e = without_casts(e.args[0])
    epsilon = 0.0
    if floor is None and (found := match(_STATISTIC_PLUS, e)) is not None:
        epsilon, e = _number(found["epsilon"]), without_casts(found["statistic"])
    elif floor is None and (found := match(_STATISTIC_FLOOR, e)) is not None:
        floor, e = sqrt(_number(found["epsilon"])), without_casts(found["statistic"])
    reduction = terms.leaf(e)
    if not isinstance(reduction, Reduction) or not reduction.op.keepdims:
        return None
    return reduction, reduction.op.kind, floor if floor is not None else epsilon, floor is not None


def _normalised(
    terms: Terms, a: Expr, reduction: Reduction, kind: ReduceKind, epsilon: float, floored: bool
) -> tuple[NormKind, Expr, Reduction, float] | None:
    """Which norm `a` divided by the root of the reduction is, if the reduction is one of a²."""
    squared = without_casts(reduction.source)
    if not (isinstance(squared, Apply) and squared.op is MUL and same(*squared.args) and same(squared.args[0], a)):
        return None
    if kind is ReduceKind.SUM and (floored or epsilon == 0):
        return NormKind.L2, a, reduction, epsilon
    if kind is not ReduceKind.MEAN or floored:
        return None
    a = without_casts(a)
    if isinstance(a, Apply) and a.op is SUB:
        mean = terms.leaf(without_casts(a.args[1]))
        if (
            isinstance(mean, Reduction)
            and mean.op.kind is ReduceKind.MEAN
            and mean.op.axes == reduction.op.axes
            and mean.op.keepdims
            and same(mean.source, a.args[0])
        ):
            return NormKind.LAYER, a.args[0], mean, epsilon
    return NormKind.RMS, a, reduction, epsilon


def _rewrite(
    editor: Editor, terms: Terms, node: Node, e: Expr, found: _Match, made: dict[tuple[Norm, Value], Value]
) -> None:
    op_ = found.reduction.op
    shape = iteration_shape("Norm", (op_.source,), found.reduction.node.inputs, ())
    source = terms.value(found.source, shape) or terms.value(without_casts(found.source), shape)
    if source is None or not source.dtype.is_float:
        return
    acc = ex.Acc(DType.F64 if source.dtype is DType.F64 else DType.F32)
    normalised_type = found.source.dtype
    norm = Norm(
        found.kind,
        op_.axes,
        found.epsilon,
        source=ex.Arg(0, source.dtype),
        stores=(ex.cast(acc, normalised_type),),
    )
    # The quotient and its product with the scale both match: they share one norm.
    if (norm, source) not in made:
        made[norm, source] = editor.add(norm, (source,), node.output.name, node.origin).output
    value = made[norm, source]
    # A stand-in that occurs nowhere else takes the place of the normalised value while the factors are put around it.
    stand_in = ex.Arg(-1, normalised_type)
    whole: Expr = stand_in
    for factor, divides in found.rest:
        whole = ex.apply(DIV if divides else MUL, ex.cast(whole, factor.dtype), factor)
    if found.shift is not None:
        whole = ex.apply(ADD, ex.cast(whole, found.shift.dtype), found.shift)
    whole = simplified(ex.cast(whole, e.dtype))
    if whole == stand_in and value.shape == node.output.shape:
        editor.redirect(node.output, value)
        return
    lowered = terms.lower(whole, {stand_in: value}) if whole != stand_in else (ex.Arg(0, value.dtype), [value])
    if lowered is None:
        return
    replacement = Pointwise((lowered[0],))
    if iteration_shape("Norm", replacement.stores, lowered[1], ()) == node.output.shape:
        editor.update(node, replacement, lowered[1])


def _number(e: Expr) -> float:
    assert isinstance(e, Const)
    return float(e.value)


def split_norm_groups(graph: Graph, _traits: Traits) -> None:
    """Group norm on a view [n, groups, rest] is one on [n, groups, channels / groups, *spatial], which is a view of a
    channels-last image too, and behind which a scale per channel can be put."""
    editor = Editor(graph)
    for node in editor.nodes():
        if isinstance(node.op, Norm) and not node.op.gathers and len(node.outputs) == 1 and len(node.inputs) >= 1:
            _split_groups(editor, node, node.op)
    editor.finish()


def _split_groups(editor: Editor, node: Node, norm: Norm) -> None:
    before, after = editor.producer(node.inputs[0]), editor.only_user(node.output)
    if before is None or after is None or not isinstance(before.op, Reshape) or not isinstance(after.op, Reshape):
        return
    x, grouped = before.inputs[0], node.inputs[0].shape
    if x.rank < 3 or x.shape != after.output.shape or len(grouped) < 3 or grouped[0] != x.shape[0]:
        return
    groups, channels = grouped[1], x.shape[1]
    is_plain = isinstance(norm.source, ex.Arg) and norm.source.index == 0 and ex.arguments(*norm.stores) == ()
    if not is_plain or norm.axes != tuple(range(2, len(grouped))) or not _divides(groups, channels):
        return
    shape = (x.shape[0], groups, floordiv(channels, groups), *x.shape[2:])
    if shape == grouped:
        return
    split = reshape(editor, x, shape, before.origin)
    new = replace(norm, axes=tuple(range(2, len(shape))))
    value = editor.add(new, (split,), node.output.name, node.origin).output
    editor.redirect(after.output, reshape(editor, value, x.shape, after.origin))
    editor.prune([after.output])


def _divides(groups: Dim, channels: Dim) -> bool:
    return isinstance(groups, int) and isinstance(channels, int) and channels % groups == 0
