"""Reductions: a formula before, a sum, mean, product or extreme, and a formula after."""

from __future__ import annotations

from collections.abc import Callable

from engine.frontend import formula as f
from engine.frontend.formula import Term
from engine.frontend.onnx_node import OnnxNode, compute_dtype
from engine.frontend.registry import operator
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.graph import Value
from engine.ir.ops import ReduceKind

Step = Callable[[Term], Term]


def _same(x: Term) -> Term:
    return x


def _square(x: Term) -> Term:
    return x * x


def reduce_axes(node: OnnxNode, x: Value, axes: Value | None) -> tuple[int, ...]:
    """The axes from the attribute or the input; all of them where none are given, unless the model says otherwise."""
    given = node.integers("axes", ()) if axes is None else tuple(node.static_ints(axes, "axes"))
    if not given and node.integer("noop_with_empty_axes", 0):
        return ()
    return node.axes(given, x.rank) if given else tuple(range(x.rank))


def reduce(
    node: OnnxNode,
    x: Value,
    axes: tuple[int, ...],
    kind: ReduceKind,
    before: Step = _same,
    after: Step = _same,
    keepdims: bool = True,
) -> Value:
    """after(kind(before(x))) over `axes`, in the compute dtype of `x`."""
    wide = compute_dtype(x.dtype)
    if x.dtype is DType.BOOL:
        wide = DType.U8
    elif x.dtype.is_int and (after is not _same or kind is ReduceKind.MEAN):
        wide = DType.F64  # roots, logarithms and means of integers
    source = before(Term(ex.Arg(0, x.dtype)).cast(wide))
    if not axes:  # nothing to reduce: the formulas remain
        return node.pointwise(lambda t: after(before(t.cast(wide))).cast(x.dtype), x)
    stored = after(Term(ex.Acc(source.dtype))).cast(x.dtype)
    return node.add(ops.Reduce(kind, axes, keepdims, source.expr, (stored.expr,)), x)


def _reduction(name: str, kind: ReduceKind, before: Step = _same, after: Step = _same) -> None:
    @operator(name)
    def function(node: OnnxNode, x: Value, axes: Value | None = None) -> Value:
        keepdims = bool(node.integer("keepdims", 1))
        return reduce(node, x, reduce_axes(node, x, axes), kind, before, after, keepdims)


_reduction("ReduceSum", ReduceKind.SUM)
_reduction("ReduceMean", ReduceKind.MEAN)
_reduction("ReduceMax", ReduceKind.MAX)
_reduction("ReduceMin", ReduceKind.MIN)
_reduction("ReduceProd", ReduceKind.PROD)
_reduction("ReduceL1", ReduceKind.SUM, f.absolute)
_reduction("ReduceL2", ReduceKind.SUM, _square, f.sqrt)
_reduction("ReduceLogSum", ReduceKind.SUM, _same, f.log)
_reduction("ReduceSumSquare", ReduceKind.SUM, _square)


@operator("ReduceLogSumExp")
def ReduceLogSumExp(node: OnnxNode, x: Value, axes: Value | None = None) -> Value:
    """log Σ eˣ, shifted by the maximum so that nothing overflows."""
    over = reduce_axes(node, x, axes)
    keepdims = bool(node.integer("keepdims", 1))
    if not over:
        return x
    wide = DType.F64 if x.dtype.is_int else compute_dtype(x.dtype)
    top = reduce(node, x, over, ReduceKind.MAX)
    # Where every element is -inf the shift is 0, for -inf - -inf is not a number.
    finite = node.pointwise(
        lambda t: f.where(f.apply(ex.PointOp.ISINF, t.cast(wide)), t.cast(wide).like(0.0), t.cast(wide)), top
    )
    shifted = f.exp(Term(ex.Arg(0, x.dtype)).cast(wide) - Term(ex.Arg(1, wide)))
    total = f.log(Term(ex.Acc(wide))) + Term(ex.Arg(1, wide))
    result = node.add(ops.Reduce(ReduceKind.SUM, over, True, shifted.expr, (total.cast(x.dtype).expr,)), x, finite)
    return result if keepdims else node.reshape(result, [d for i, d in enumerate(x.shape) if i not in over])
