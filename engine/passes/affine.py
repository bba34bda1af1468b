"""The pass `fold_affine`: scales and shifts per channel beside a product with constant weights go into weights, bias.

Batch normalisation above all. After a product: the chain of constant operations that starts at the accumulator. Before
one: a point-wise node that only scales and shifts the input per channel; a shift does not pass a padded convolution,
for the padding is not shifted. Weights are computed in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import Apply, Const, Expr, PointOp
from engine.ir.graph import Graph, Node, Value, constant
from engine.ir.ops import Conv, Gemm, Pointwise
from engine.passes.editor import Editor, joined_origin
from engine.passes.operands import Operands, stores_of, with_expressions
from engine.passes.simplify import simplified
from engine.passes.traits import Traits

ADD, SUB, MUL, DIV, NEG = PointOp.ADD, PointOp.SUB, PointOp.MUL, PointOp.DIV, PointOp.NEG
_Array = np.ndarray


@dataclass(frozen=True)
class _Affine:
    """`scale` · inner + `shift` per channel (float64 arrays of one axis), and the sub-expression it stands for."""

    scale: _Array
    shift: _Array
    whole: Expr
    steps: int = 0


def fold_affine(graph: Graph, _traits: Traits) -> None:
    """Fold what stands before, then what stands after, every Conv and Gemm with constant weights."""
    editor = Editor(graph)
    for node in editor.nodes():
        if isinstance(node.op, Conv | Gemm) and _has_plain_weight(node):
            _fold_before(editor, node)
            _fold_after(editor, node)
    editor.finish()


def _has_plain_weight(node: Node) -> bool:
    weight = node.inputs[1]
    scales = weight.dtype.is_float and weight.dtype is not DType.F8E4M3  # which a scale would round anew
    return weight.is_constant and scales and (isinstance(node.op, Conv) or weight.rank == 2)


def _fold_after(editor: Editor, node: Node) -> None:
    found = _after_accumulator(node)
    if found is None:
        return
    acc = next(e for e in ex.walk(*stores_of(node.op)) if isinstance(e, ex.Acc))
    operands = Operands((node.inputs[0], _scaled_outputs(node, found.scale)))
    shifted = _shifted(node, operands, acc, found.shift)
    stores = []
    for store in stores_of(node.op):
        bare = operands.adopt(ex.replaced(store, found.whole, acc), node)
        stores.append(simplified(ex.replace_acc(bare, shifted)))
    editor.update(node, with_expressions(node.op, tuple(stores)), operands.inputs)


def _shifted(node: Node, operands: Operands, acc: Expr, shift: _Array) -> Expr:
    """The accumulator plus a bias per channel, where there is one."""
    if not np.any(shift):
        return acc
    channels = (-1, *[1] * (node.outputs[0].rank - 2)) if isinstance(node.op, Conv) else (-1,)
    bias = constant(f"{node.inputs[1].name}.bias", shift.reshape(channels).astype(acc.dtype.numpy))
    return ex.apply(ADD, acc, operands.arg(bias))


def _after_accumulator(node: Node) -> _Affine | None:
    """The longest chain of constant operations on the accumulator that all stores share, if folding it helps."""
    stores = stores_of(node.op)
    parents: dict[Expr, list[Apply]] = {}
    for e in ex.walk(*stores):
        if isinstance(e, Apply):
            for arg in dict.fromkeys(e.args):
                parents.setdefault(arg, []).append(e)
    accs = [e for e in parents if isinstance(e, ex.Acc)]
    channels = node.outputs[0].shape[1 if isinstance(node.op, Conv) else -1]
    if len(accs) != 1 or not isinstance(channels, int):
        return None
    current = _Affine(np.ones(channels), np.zeros(channels), accs[0])
    while len(parents.get(current.whole, ())) == 1 and current.whole not in stores:
        axis = 1 - node.outputs[0].rank if isinstance(node.op, Conv) else -1
        step = _extended(current, parents[current.whole][0], node.inputs, axis, node.outputs[0].rank)
        if step is None:
            break
        current = step
    only_bias = current.steps == 1 and bool(np.all(current.scale == 1))
    if current.steps == 0 or only_bias or not (np.isfinite(current.scale).all() and np.isfinite(current.shift).all()):
        return None
    return current


def _extended(inner: _Affine, e: Apply, inputs: tuple[Value, ...], axis: int, rank: int) -> _Affine | None:
    """The chain with one more operation `e` on top of it."""
    scale, shift = inner.scale, inner.shift
    if e.op is NEG:
        return _Affine(-scale, -shift, e, inner.steps + 1)
    if e.op not in (ADD, SUB, MUL, DIV) or e.args[0] == e.args[1]:
        return None
    is_left = e.args[0] == inner.whole
    c = _per_channel(e.args[1 if is_left else 0], inputs, axis, len(scale), rank)
    if c is None or (e.op is DIV and (not is_left or not c.all())):
        return None
    if e.op is ADD:
        shift = shift + c
    elif e.op is SUB:
        scale, shift = (scale, shift - c) if is_left else (-scale, c - shift)
    elif e.op is MUL:
        scale, shift = scale * c, shift * c
    else:
        scale, shift = scale / c, shift / c
    return _Affine(scale, shift, e, inner.steps + 1)


def _per_channel(e: Expr, inputs: tuple[Value, ...], axis: int, channels: int, rank: int) -> _Array | None:
    """The constant `e` as one number per channel; None where it is no constant or differs along another axis."""
    if isinstance(e, Const):
        return np.full(channels, float(e.value))
    data = inputs[e.index].data if isinstance(e, ex.Arg) else None
    if data is None or data.ndim > rank:
        return None
    if data.size == 1:
        return np.full(channels, float(data.item()))
    if data.size != channels or data.ndim < -axis or data.shape[axis] != channels:
        return None
    return data.reshape(-1).astype(np.float64)


def _scaled_outputs(node: Node, scale: _Array) -> Value:
    """The weight with every output channel multiplied by its scale."""
    weight = node.inputs[1]
    if np.all(scale == 1):
        return weight
    return _scaled(weight, _along_outputs(node, scale))


def _along_outputs(node: Node, scale: _Array) -> _Array:
    op, weight = node.op, node.inputs[1]
    if not isinstance(op, Conv):
        return scale
    ones = [1] * (weight.rank - 2)
    if not op.transposed:
        return scale.reshape(-1, 1, *ones)
    by_group = scale.reshape(op.groups, 1, -1)
    per_input = np.repeat(by_group, _size(weight, 0) // op.groups, axis=1)
    return per_input.reshape(_size(weight, 0), -1, *ones)


def _along_inputs(node: Node, scale: _Array) -> _Array:
    """One factor per input channel, shaped to broadcast against the weight."""
    op, weight = node.op, node.inputs[1]
    if not isinstance(op, Conv):
        return scale[:, None]
    ones = [1] * (weight.rank - 2)
    if op.transposed:
        return scale.reshape(-1, 1, *ones)
    by_group = np.repeat(scale.reshape(op.groups, -1), _size(weight, 0) // op.groups, axis=0)
    return by_group.reshape(_size(weight, 0), -1, *ones)


def _scaled(weight: Value, factor: _Array) -> Value:
    assert weight.data is not None
    data = (weight.data.astype(np.float64) * factor).astype(weight.data.dtype)
    return constant(weight.name, data)


def _size(value: Value, axis: int) -> int:
    size = value.shape[axis]
    assert isinstance(size, int)
    return size


def _fold_before(editor: Editor, node: Node) -> None:
    before = editor.producer(node.inputs[0])
    if (
        before is None
        or not isinstance(before.op, Pointwise)
        or before.op.gathers
        or len(before.op.stores) != 1
        or editor.only_user(before.output) is not node
        or any(value is before.output for value in node.inputs[1:])
    ):
        return
    found = _before_product(node, before)
    if found is None:
        return
    source, affine = found
    op, weight = node.op, node.inputs[1]
    assert weight.data is not None
    if np.any(affine.shift) and isinstance(op, Conv) and (op.transposed or any(b or e for b, e in op.pads)):
        return
    shift = weight.data.astype(np.float64) * _along_inputs(node, affine.shift)
    bias = shift.sum(axis=tuple(range(1, weight.rank)) if isinstance(op, Conv) else 0)
    operands = Operands((source, _scaled(weight, _along_inputs(node, affine.scale))))
    acc = next(e for e in ex.walk(*stores_of(op)) if isinstance(e, ex.Acc))
    shifted = _shifted(node, operands, acc, bias)
    stores = tuple(ex.replace_acc(operands.adopt(store, node), shifted) for store in stores_of(op))
    editor.update(node, with_expressions(op, stores), operands.inputs, origin=joined_origin(before, node))
    editor.remove(before)


def _before_product(node: Node, before: Node) -> tuple[Value, _Affine] | None:
    """(x, affine) where `before` is scale · x + shift per input channel."""
    assert isinstance(before.op, Pointwise)
    store = before.op.stores[0]
    varying = [i for i in ex.arguments(store) if not before.inputs[i].is_constant]
    if len(varying) != 1:
        return None
    x = before.inputs[varying[0]]
    axis = 1 - x.rank if isinstance(node.op, Conv) else -1
    channels = x.shape[axis]
    if x.shape != before.output.shape or x.dtype is not before.output.dtype or not isinstance(channels, int):
        return None
    current = _Affine(np.ones(channels), np.zeros(channels), ex.Arg(varying[0], x.dtype))
    while current.whole != store:
        above = [e for e in ex.walk(store) if isinstance(e, Apply) and current.whole in e.args]
        step = _extended(current, above[0], before.inputs, axis, x.rank) if len(above) == 1 else None
        if step is None:
            return None
        current = step
    finite = np.isfinite(current.scale).all() and np.isfinite(current.shift).all()
    return (x, current) if current.steps and finite else None
