"""The pass `fuse_excitations`: two 1×1 convolutions of single pixels, one after the other, become one `Excitation`
where the target has it (`Traits.excitations`). On pooled channels they are the layers of a squeeze-and-excite block,
too small for a launch each. Where the pooled channels are the mean beside a convolution (`fuse_means`), whatever adds
up its parts is part of that.

It comes last: to all other passes they are convolutions.
"""

from __future__ import annotations

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node
from engine.ir.ops import ConvExcitation, ConvMean, Excitation
from engine.passes.editor import Editor, joined_origin
from engine.passes.operands import Operands, is_matrix_product, stores_of
from engine.passes.traits import Traits

_VECTOR = 8  # channels come in multiples of it
_MOST_CHANNELS, _MOST_HIDDEN = 4096, 512  # what a block has memory for


def fuse_excitations(graph: Graph, traits: Traits) -> None:
    """Join every pair of such convolutions whose result in between nobody else reads, then those of a mean that nobody
    else reads with the convolution beside which it is computed."""
    if not traits.excitations:
        return
    editor = Editor(graph)
    _join_layers(editor)
    _join_convolutions(editor)
    editor.finish()


def _join_layers(editor: Editor) -> None:
    for second in editor.nodes():
        if not editor.alive(second) or not _is_layer(second):
            continue
        between = second.inputs[0]
        first = editor.producer(between)
        if first is None or not _is_layer(first) or editor.only_user(between) is not second or not _fit(first, second):
            continue
        operands = Operands((*first.inputs[:2], second.inputs[1]))
        hidden = operands.adopt(_unrounded(stores_of(first.op)[0]), first)
        stores = tuple(operands.adopt(store, second) for store in stores_of(second.op))
        editor.remove(first)
        editor.update(second, Excitation(hidden, stores), operands.inputs, origin=joined_origin(first, second))


def _join_convolutions(editor: Editor) -> None:
    for node in editor.nodes():
        if not editor.alive(node) or not isinstance(node.op, Excitation):
            continue
        mean, *others = node.inputs
        host = editor.producer(mean)
        if host is None or not isinstance(host.op, ConvMean) or editor.only_user(mean) is not node:
            continue
        if ex.flops(host.op.mean):  # more than a mean
            continue
        op = ConvExcitation(host.op, node.op, len(host.inputs))
        results = (*host.outputs[:-1], *node.outputs)
        editor.remove(node)
        editor.update(host, op, (*host.inputs, *others), results, joined_origin(host, node))


def _is_layer(node: Node) -> bool:
    """Whether a node is a 1×1 convolution of single pixels, in 16 bits, whose tail reads constants only."""
    if not is_matrix_product(node) or len(node.outputs) != 1:
        return False
    x, w, *others = node.inputs
    return (
        w.is_constant
        and x.dtype is w.dtype
        and x.dtype in (DType.F16, DType.BF16)
        and all(size == 1 for size in x.shape[2:])
        and all(value.is_constant for value in others)
    )


def _fit(first: Node, second: Node) -> bool:
    """Whether the sizes are those that a block has memory for."""
    hidden, channels = (size for size in first.inputs[1].shape[:2] if isinstance(size, int))
    outputs = next(size for size in second.inputs[1].shape[:1] if isinstance(size, int))
    whole = channels % _VECTOR == 0 and outputs % _VECTOR == 0
    return whole and max(channels, outputs) <= _MOST_CHANNELS and hidden <= _MOST_HIDDEN


def _unrounded(store: ex.Expr) -> ex.Expr:
    """What is stored, before it is rounded to 16 bits."""
    rounded = isinstance(store, ex.Apply) and store.op is ex.PointOp.CAST and store.args[0].dtype is DType.F32
    return store.args[0] if rounded and isinstance(store, ex.Apply) else store
