"""The pass `fuse_maxima`: a convolution whose result only a max pool reads stores the maxima alone, where the target
has such convolutions (`Traits.conv_maxima`).

What follows the sums has to rise with them, alike for all of a window: then the maximum of what it makes of them is
what it makes of their maximum. It comes last: to all other passes a convolution and a pool are two nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node
from engine.ir.ops import Conv, ConvMax, Pool, PoolKind
from engine.passes.editor import Editor, joined_origin
from engine.passes.operands import Operands, fixed_operands, is_alike
from engine.passes.traits import Traits

_RISING = {
    ex.PointOp.ADD,
    ex.PointOp.MIN,
    ex.PointOp.MAX,
    ex.PointOp.EXP,
    ex.PointOp.TANH,
    ex.PointOp.SIGMOID,
    ex.PointOp.ERF,
}
_MOST_STEM_CHANNELS = 4


def fuse_maxima(graph: Graph, traits: Traits) -> None:
    """Join every max pool over 2 × 2 pixels that do not overlap with the convolution that nobody else reads, and every
    one over 3 × 3 pixels, two apart, with such a convolution of an image with few channels."""
    if not traits.conv_maxima:
        return
    editor = Editor(graph)
    for node in editor.nodes():
        op = node.op
        if not isinstance(op, Pool) or op.kind is not PoolKind.MAX:
            continue
        value = node.inputs[0]
        host = editor.producer(value)
        if host is None or editor.only_user(value) is not node or not _stores_rising(host) or not _fits(op, host):
            continue
        assert isinstance(host.op, Conv)
        operands = Operands(host.inputs[: fixed_operands(host.op)])
        rising = operands.adopt(host.op.stores[0], host)
        store = _over(operands.adopt(op.stores[0], node), rising)
        joined = ConvMax(replace(host.op, stores=(store,)), replace(op, stores=(ex.Acc(store.dtype),)))
        editor.remove(node)
        editor.update(host, joined, operands.inputs, node.outputs, joined_origin(host, node))
    editor.finish()


def _over(store: ex.Expr, value: ex.Expr) -> ex.Expr:
    """The store of a pool over what its windows hold, in the type that it takes that in."""
    return ex.rewrite(store, lambda leaf: ex.cast(value, leaf.dtype) if isinstance(leaf, ex.Acc) else leaf)


def _fits(op: Pool, host: Node) -> bool:
    """Whether the windows of a pool are those of a kernel for such convolutions."""
    if set(op.dilations) != {1} or op.ceil_mode or len(op.stores) != 1 or op.strides != (2, 2):
        return False
    if op.kernel == (2, 2):
        return not any(pad for along in op.pads for pad in along)
    channels, padded = host.inputs[1].shape[1], all(pad in (0, 1) for along in op.pads for pad in along)
    return op.kernel == (3, 3) and padded and isinstance(channels, int) and channels <= _MOST_STEM_CHANNELS


def _stores_rising(node: Node) -> bool:
    """Whether a node is a convolution with constant filters, of 16 bits, whose one result rises with its sums, alike
    for all pixels of an image and channel."""
    op = node.op
    if not isinstance(op, Conv) or op.transposed or op.groups != 1 or len(node.outputs) != 1:
        return False
    weight, half = node.inputs[1], (DType.F16, DType.BF16)
    if not weight.is_constant or weight.dtype not in half or node.output.dtype not in half:
        return False
    return _rises(op.stores[0]) and all(is_alike(node.inputs[i]) for i in ex.arguments(op.stores[0]))


def _rises(e: ex.Expr) -> bool:
    """Whether an expression never falls where its accumulator rises."""
    found: dict[ex.Expr, bool] = {}
    for part in ex.walk(e):
        found[part] = not isinstance(part, ex.Apply) or not ex.uses_acc(part) or _rises_with(part, found)
    return found[e]


def _rises_with(part: ex.Apply, found: Mapping[ex.Expr, bool]) -> bool:
    """The same of one operation, where `found` says it of its operands."""
    first, *others = part.args
    if part.op in _RISING:
        return all(found[arg] for arg in part.args)
    if part.op is ex.PointOp.CAST:
        return part.dtype.is_float and found[first]
    if part.op is ex.PointOp.SUB:
        return found[first] and not ex.uses_acc(*others)
    if part.op in (ex.PointOp.MUL, ex.PointOp.DIV):
        return found[first] and all(map(_is_positive, others))
    return False


def _is_positive(e: ex.Expr) -> bool:
    return isinstance(e, ex.Const) and e.value > 0
