"""The pass `recognise_attention`: softmax(q kᵀ · scale + masks) v, however it is spelled, becomes one `Attention` node.

The root is a `Gemm` whose first operand comes from a `Softmax` over the last axis. `scores.py` reads the way from the
softmax back to the first product; here the operands are prepared. They stay views of whatever they were projected into:
kᵀ is undone by one more transposition (which meets the exporter's own and vanishes), scales are collected from the
operands, and repeated key heads (grouped queries) are read where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir.dim import product
from engine.ir.expr import Const, PointOp
from engine.ir.graph import Graph, Node, Value
from engine.ir.ops import Attention, Expand, Gemm, Pointwise, Reshape, Softmax, View, broadcast_shapes
from engine.passes.editor import Editor, joined_origin
from engine.passes.scores import Scores, bias_value, read_scores
from engine.passes.simplify import simplified
from engine.passes.terms import Terms
from engine.passes.traits import Traits
from engine.passes.views import reshape, transpose, view


@dataclass(frozen=True)
class _Probabilities:
    """What feeds the second product: the softmax, the nodes after it, and whether fully masked rows become 0."""

    softmax: Node
    between: tuple[Node, ...]
    zero_rows: bool


def recognise_attention(graph: Graph, traits: Traits) -> None:
    """Replace every attention. One whose scores or probabilities are read elsewhere, or returned, stays as it is."""
    if not any(isinstance(node.op, Softmax) for node in graph.nodes):
        return
    editor = Editor(graph)
    terms = Terms(editor)
    for node in editor.nodes():
        if isinstance(node.op, Gemm) and len(node.inputs) >= 2 and node.inputs[1].dtype in traits.attention_types:
            _try(editor, terms, node)
    editor.finish()


def _try(editor: Editor, terms: Terms, node: Node) -> None:
    found = _probabilities(editor, node)
    if found is None:
        return
    softmax = found.softmax
    op = softmax.op
    assert isinstance(op, Softmax)
    if op.axis != softmax.output.rank - 1 or op.log or not plain(op.stores):
        return
    scores = read_scores(editor, terms, softmax)
    if scores is None:
        return
    inner = {softmax, node, *found.between, *scores.between, scores.product}
    hidden = [softmax.output, scores.product.output]
    hidden += [value for between in (*found.between, *scores.between) for value in between.outputs]
    if any(editor.is_output(value) or any(user not in inner for user in editor.users(value)) for value in hidden):
        return
    _rewrite(editor, terms, node, found, scores)


def plain(stores: tuple[ex.Expr, ...]) -> bool:
    """Whether an epilogue stores the accumulator alone, at most converted."""
    return len(stores) == 1 and ex.arguments(*stores) == () and ex.flops(*stores) == 0 and ex.uses_acc(*stores)


def _probabilities(editor: Editor, node: Node) -> _Probabilities | None:
    """Follow the first operand of the second product back to a softmax, through casts, reshapes and a NaN guard."""
    value = node.inputs[0]
    between: list[Node] = []
    zero_rows = False
    for _ in range(6):
        before = editor.producer(value)
        if before is None:
            return None
        if isinstance(before.op, Softmax):
            return _Probabilities(before, tuple(between), zero_rows)
        if isinstance(before.op, Reshape) and before.op.shape[-2:] == before.inputs[0].shape[-2:]:
            value = before.inputs[0]
        elif isinstance(before.op, Pointwise) and len(before.op.stores) == 1 and not before.op.gathers:
            guarded = _nan_guard(editor, before)
            if guarded is None:
                return None
            value, nodes, guards = guarded
            zero_rows |= guards
            between += nodes
        else:
            return None
        between.append(before)
    return None


def _nan_guard(editor: Editor, node: Node) -> tuple[Value, list[Node], bool] | None:
    """where(isnan(p), 0, p), in one node or two, or a mere cast of p: (p, nodes beside `node`, whether a guard)."""
    assert isinstance(node.op, Pointwise)
    store = node.op.stores[0]
    if _is_cast(store):
        return node.inputs[ex.arguments(store)[0]], [], False
    if not isinstance(store, ex.Apply) or store.op is not PointOp.WHERE or not isinstance(store.args[2], ex.Arg):
        return None
    condition, zero, kept = store.args
    probabilities = node.inputs[kept.index]  # type: ignore[union-attr]
    if not _is_zero(zero, node):
        return None
    nodes: list[Node] = []
    inputs = node.inputs
    if isinstance(condition, ex.Arg):
        test = editor.producer(node.inputs[condition.index])
        if test is None or not isinstance(test.op, Pointwise) or len(test.op.stores) != 1:
            return None
        condition, inputs = test.op.stores[0], test.inputs
        nodes.append(test)
    if isinstance(condition, ex.Apply) and condition.op is PointOp.ISNAN and isinstance(condition.args[0], ex.Arg):
        return (probabilities, nodes, True) if inputs[condition.args[0].index] is probabilities else None
    return None


def _is_zero(e: ex.Expr, node: Node) -> bool:
    if isinstance(e, ex.Arg):
        data = node.inputs[e.index].data
        return data is not None and data.size == 1 and data.item() == 0
    return isinstance(e, Const) and e.value == 0


def _is_cast(e: ex.Expr) -> bool:
    return isinstance(e, ex.Arg) or (
        isinstance(e, ex.Apply) and e.op is PointOp.CAST and isinstance(e.args[0], ex.Arg) and e.dtype.is_float
    )


def _rewrite(editor: Editor, terms: Terms, node: Node, found: _Probabilities, scores: Scores) -> None:
    origin = joined_origin(scores.product, found.softmax, node)
    q_scale, q = take_scale(editor, scores.product.inputs[0])
    k_scale, k = take_scale(editor, scores.product.inputs[1])
    v = node.inputs[1]
    k = _untransposed(editor, k, origin)
    bias = bias_value(editor, terms, scores, origin) if scores.bias is not None else None
    if (bias is None) != (scores.bias is None):
        return
    # Scores may have been cut into [batch, heads] for the mask although the products ran on batch · heads.
    lead = scores.shape[:-2]
    if q.shape[:-2] == k.shape[:-2] == v.shape[:-2] != lead:
        q, k, v = (reshape(editor, x, (*lead, *x.shape[-2:]), origin) for x in (q, k, v))
    result = node.output
    if q.rank == 4:
        k, v = _grouped_keys(editor, k, v, origin)
    op = node.op
    assert isinstance(op, Gemm)
    attention = Attention(
        scale=scores.scale * q_scale * k_scale,
        has_bias=bias is not None,
        masked_rows_zero=found.zero_rows,
        stores=op.stores,
    )
    operands = [x for x in (q, k, v, bias) if x is not None]
    if not plain(op.stores) or not _fits(attention, operands, result):
        editor.prune([q, k, v, *([bias] if bias is not None else [])])
        return
    made = editor.add(attention, operands, result.name, origin).output
    editor.redirect(result, reshape(editor, made, result.shape, origin))
    editor.prune([result])


def _fits(op: Attention, operands: list[Value], result: Value) -> bool:
    q, k, v = operands[:3]
    if not q.rank == k.rank == v.rank or q.rank not in (3, 4):
        return False
    try:
        ((_, shape),) = op.infer(operands)
    except ShapeError:
        return False
    if product(shape) != product(result.shape) or shape[-2:] != result.shape[-2:]:
        return False
    full = (*shape[:-1], k.shape[-2])
    if op.has_bias:
        try:
            if broadcast_shapes("Attention", full, operands[3].shape) != full:
                return False
        except ShapeError:
            return False
    if q.rank == 3:
        return k.shape[0] == q.shape[0] == v.shape[0]
    heads, kv_heads = q.shape[1], k.shape[1]
    if v.shape[1] != kv_heads or shape[1] != heads:
        return False
    return heads == kv_heads or (isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads == 0)


def take_scale(editor: Editor, value: Value) -> tuple[float, Value]:
    """`value` as (factor, what it is a multiple of), looking through views."""
    node = editor.producer(value)
    if node is None:
        return 1.0, value
    if isinstance(node.op, View):
        factor, source = take_scale(editor, node.inputs[0])
        return (factor, view(editor, node.op, source, node.origin)) if source is not node.inputs[0] else (1.0, value)
    if not isinstance(node.op, Pointwise) or len(node.op.stores) != 1 or node.op.gathers:
        return 1.0, value
    found = scalar_factor(node.op.stores[0], node.inputs)
    if found is None or node.inputs[found[1]].shape != value.shape:
        return 1.0, value
    factor, source = take_scale(editor, node.inputs[found[1]])
    return found[0] * factor, source


def scalar_factor(e: ex.Expr, inputs: tuple[Value, ...]) -> tuple[float, int] | None:
    """(factor, argument) of an expression that multiplies or divides one argument by a scalar."""
    e = simplified(_with_literals(e, inputs))
    if isinstance(e, ex.Apply) and e.op in (PointOp.MUL, PointOp.DIV) and e.dtype.is_float:
        a, b = e.args
        if isinstance(a, ex.Arg) and isinstance(b, Const) and b.value != 0:
            return (float(b.value) if e.op is PointOp.MUL else 1 / b.value), a.index
    return None


def _with_literals(e: ex.Expr, inputs: tuple[Value, ...]) -> ex.Expr:
    """`e` with arguments that are scalar constants written as literals."""

    def literal(leaf: ex.Expr) -> ex.Expr:
        data = inputs[leaf.index].data if isinstance(leaf, ex.Arg) else None
        return ex.const(data.item(), leaf.dtype) if data is not None and data.size == 1 else leaf

    return ex.rewrite(e, literal)


def _untransposed(editor: Editor, value: Value, origin: str) -> Value:
    """`value` with its last two axes swapped; a reshape of the axes before them (kᵀ made in rank 3) is passed by."""
    node = editor.producer(value)
    if node is not None and isinstance(node.op, Reshape) and node.inputs[0].shape[-2:] == value.shape[-2:]:
        inner = _untransposed(editor, node.inputs[0], origin)
        return reshape(editor, inner, (*value.shape[:-2], *inner.shape[-2:]), origin)
    return transpose(editor, value, _swap_last(value.rank), origin)


def _swap_last(rank: int) -> tuple[int, ...]:
    return (*range(rank - 2), rank - 1, rank - 2)


def _grouped_keys(editor: Editor, k: Value, v: Value, origin: str) -> tuple[Value, Value]:
    """Keys and values before their heads were repeated, where both were."""
    before_k, before_v = _before_repeat(editor, k), _before_repeat(editor, v)
    if before_k is None or before_v is None:
        return k, v
    return tuple(reshape(editor, x, (*x.shape[:2], *x.shape[3:]), origin) for x in (before_k, before_v))  # type: ignore[return-value]


def _before_repeat(editor: Editor, value: Value) -> Value | None:
    """x[b, kv, 1, s, d] if `value` is x expanded to [b, kv, group, s, d] and reshaped to [b, kv · group, s, d]."""
    merge = editor.producer(value)
    if merge is None or not isinstance(merge.op, Reshape):
        return None
    repeat = editor.producer(merge.inputs[0])
    if repeat is None or not isinstance(repeat.op, Expand) or repeat.output.rank != 5:
        return None
    source = repeat.inputs[0]
    b, kv, group, s, d = repeat.output.shape
    fits = source.shape == (b, kv, 1, s, d) and value.shape == (b, kv * group, s, d)
    return source if fits else None
