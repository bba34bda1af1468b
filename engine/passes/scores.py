"""The way from the input of a softmax back to the product q kᵀ: scales and masks collected, in whatever order.

Used by `attention.py`. Masks come out as terms to add: `Where(mask, scores, −inf)` is the sum of the scores and a bias
that is 0 or −inf. A finite fill is written as the lowest fp32 number instead, so that it absorbs the score it is added
to, as the selection would: the softmax is then the same in every row, fully masked ones included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import Apply, Const, Expr, PointOp
from engine.ir.graph import Node, Shape, Value
from engine.ir.ops import Expand, Gemm, Pointwise, Reshape, Softmax, broadcast_shapes
from engine.ir.ops.light import iteration_shape
from engine.passes.editor import Editor
from engine.passes.simplify import simplified
from engine.passes.terms import Terms, without_casts
from engine.passes.views import reshape

_LOWEST = float(np.finfo(np.float32).min)
_MASKED = -1e4  # a fill at or below this is meant to switch an element off
_LIMIT = 24  # steps between softmax and product


@dataclass(frozen=True)
class Scores:
    """`scale` · product + `bias`, the sum taken in the shape `shape`; `between` are the nodes on the way."""

    product: Node
    shape: Shape
    scale: float = 1.0
    bias: Expr | None = None
    between: tuple[Node, ...] = ()

    def plus(self, bias: Expr) -> Scores:
        """With a further bias, in the same shape."""
        if self.bias is None:
            return replace(self, bias=bias)
        dtype = bias.dtype if bias.dtype is self.bias.dtype else DType.F32
        return replace(self, bias=ex.apply(PointOp.ADD, ex.cast(self.bias, dtype), ex.cast(bias, dtype)))

    def times(self, factor: float) -> Scores:
        bias = None if self.bias is None else ex.apply(PointOp.MUL, self.bias, ex.const(factor, self.bias.dtype))
        return replace(self, scale=self.scale * factor, bias=bias)


def read_scores(editor: Editor, terms: Terms, softmax: Node) -> Scores | None:
    """What `softmax` is taken of, if that is a scaled and masked product."""
    op = softmax.op
    assert isinstance(op, Softmax)
    e = terms.over(op.source, softmax.inputs)
    found = _read(editor, terms, e, softmax.output.shape, 0)
    if found is None or not found.scale:
        return None
    return replace(found, between=_nodes_between(editor, softmax, found.product))


def _read(editor: Editor, terms: Terms, e: Expr, shape: Shape, depth: int) -> Scores | None:
    e = without_casts(e)
    if depth > _LIMIT:
        return None
    if isinstance(e, ex.Arg):
        leaf = terms.leaf(e)
        return _read_leaf(editor, terms, leaf, shape, depth) if isinstance(leaf, Value) else None
    if not isinstance(e, Apply) or not e.dtype.is_float:
        return None
    if e.op in (PointOp.MUL, PointOp.DIV):
        return _read_scaled(editor, terms, e, shape, depth)
    if e.op in (PointOp.ADD, PointOp.SUB):
        return _read_sum(editor, terms, e, shape, depth)
    if e.op is PointOp.WHERE:
        return _read_selection(editor, terms, e, shape, depth)
    return None


def _read_leaf(editor: Editor, terms: Terms, leaf: Value, shape: Shape, depth: int) -> Scores | None:
    node = editor.producer(leaf)
    if node is None:
        return None
    if isinstance(node.op, Gemm):
        stores = node.op.stores
        is_plain = len(stores) == 1 and not ex.arguments(*stores) and not ex.flops(*stores)
        return Scores(node, leaf.shape) if is_plain and leaf.shape == shape else None
    if isinstance(node.op, Reshape) and leaf.shape == shape and leaf.shape[-2:] == node.inputs[0].shape[-2:]:
        before = node.inputs[0]
        return _read(editor, terms, terms.of(before), before.shape, depth + 1)
    return None


def _read_scaled(editor: Editor, terms: Terms, e: Apply, shape: Shape, depth: int) -> Scores | None:
    a, b = e.args
    if isinstance(a, Const) and e.op is PointOp.MUL:
        a, b = b, a
    if not isinstance(b, Const) or not b.value:
        return None
    found = _read(editor, terms, a, shape, depth + 1)
    return None if found is None else found.times(b.value if e.op is PointOp.MUL else 1 / b.value)


def _read_sum(editor: Editor, terms: Terms, e: Apply, shape: Shape, depth: int) -> Scores | None:
    a, b = e.args
    found = _read_in(editor, terms, a, shape, depth)
    if found is not None:
        return found.plus(b if e.op is PointOp.ADD else ex.apply(PointOp.NEG, b))
    if e.op is PointOp.SUB:
        return None
    found = _read_in(editor, terms, b, shape, depth)
    return None if found is None else found.plus(a)


def _read_in(editor: Editor, terms: Terms, e: Expr, shape: Shape, depth: int) -> Scores | None:
    """What `e` is, with its bias, where there is one, in `shape`: before the heads were cut apart it was in another."""
    found = _read(editor, terms, e, shape, depth + 1)
    if found is None or found.shape == shape:
        return found
    if found.bias is None:
        return replace(found, shape=shape)
    held = bias_value(editor, terms, found, found.product.origin)
    if held is None:
        return None
    lead, last = (*[1] * (len(found.shape) - held.rank), *held.shape[:-2]), held.shape[-2:]
    if any(dim != 1 for dim in lead) and lead != found.shape[:-2]:
        return None
    lead = shape[:-2] if lead == found.shape[:-2] else (1,) * (len(shape) - 2)
    return replace(found, bias=terms.of(reshape(editor, held, (*lead, *last), found.product.origin)), shape=shape)


def _read_selection(editor: Editor, terms: Terms, e: Apply, shape: Shape, depth: int) -> Scores | None:
    condition, a, b = e.args
    for kept, fill in ((a, b), (b, a)):
        fill = without_casts(fill)
        if not isinstance(fill, Const) or not fill.value <= _MASKED:
            continue
        found = _read_in(editor, terms, kept, shape, depth)
        if found is None:
            return None
        wide = DType.F64 if e.dtype is DType.F64 else DType.F32
        masked = ex.const(fill.value if np.isinf(fill.value) else _LOWEST, wide)
        present = ex.const(0.0, wide) if found.bias is None else ex.cast(found.bias, wide)
        chosen = (present, masked) if kept is a else (masked, present)
        return replace(found, bias=ex.apply(PointOp.WHERE, condition, *chosen))
    return None


def _nodes_between(editor: Editor, softmax: Node, product: Node) -> tuple[Node, ...]:
    """The nodes on every path from the product to the softmax."""
    reached: dict[Node, None] = {}
    pending = [softmax]
    depends: dict[Node, bool] = {product: True}

    def leads(node: Node, depth: int) -> bool:
        if node not in depends:
            depends[node] = depth < _LIMIT and any(
                leads(before, depth + 1)
                for value in node.inputs
                if (before := editor.producer(value)) is not None
                and (before is product or isinstance(before.op, Pointwise | Reshape | Expand))
            )
        return depends[node]

    while pending:
        node = pending.pop()
        for value in node.inputs:
            before = editor.producer(value)
            if before is not None and before is not product and before not in reached and leads(before, 0):
                reached[before] = None
                pending.append(before)
    return tuple(reached)


def bias_value(editor: Editor, terms: Terms, scores: Scores, origin: str) -> Value | None:
    """The value that holds the bias; the mask that every layer adds is found again, not made anew."""
    assert scores.bias is not None
    total = simplified(scores.bias)
    held = terms.value(total)
    if held is not None:
        return held
    lowered = terms.lower(total)
    if lowered is None or not lowered[1]:
        return None
    op = Pointwise((lowered[0],))
    try:
        shape = iteration_shape("Attention", op.stores, lowered[1], ())
        if broadcast_shapes("Attention", scores.shape, shape) != scores.shape:
            return None
    except ShapeError:
        return None
    for user in editor.users(lowered[1][0]):
        if user.op == op and user.inputs == tuple(lowered[1]):
            return user.output
    return editor.add(op, lowered[1], "attention_bias", origin).output
