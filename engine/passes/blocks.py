"""The pass `fuse_blocks`: a 1×1 convolution, the depthwise one that alone reads its result, and the 1×1 convolution
that alone reads that become one operator, where the target has such blocks (`Traits.conv_blocks`): nothing between them
is stored. To all passes before they are three nodes."""

from __future__ import annotations

from dataclasses import replace

from engine.ir import expr as ex
from engine.ir.dim import Dim
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node
from engine.ir.leading_bias import leading_bias
from engine.ir.ops import Conv, ConvBlock
from engine.passes.editor import Editor, joined_origin
from engine.passes.operands import Operands, is_matrix_product
from engine.passes.traits import ConvBlocks, Traits

_HALVES = (DType.F16, DType.BF16)


def fuse_blocks(graph: Graph, traits: Traits) -> None:
    """Join every inverted residual of 16 bits with constant weights that the target takes, whose first two results are
    functions of sums that begin with a constant for each channel."""
    limits = traits.conv_blocks
    if limits is None:
        return
    editor = Editor(graph)
    for node in editor.nodes():
        if not _is_pointwise(node):
            continue
        middle = _host(editor, node)
        first = _host(editor, middle) if middle is not None and _is_depthwise(middle, limits) else None
        if middle is None or first is None or not _is_pointwise(first) or not _fits(first, node, limits):
            continue
        every = (first, middle, node)
        operands = Operands([first.inputs[0], *(one.inputs[1] for one in every)])
        convs = [_renumbered(one, operands) for one in every]
        editor.remove(first)
        editor.remove(middle)
        editor.update(node, ConvBlock(*convs), operands.inputs, node.outputs, joined_origin(*every))
    editor.finish()


def _renumbered(node: Node, operands: Operands) -> Conv:
    assert isinstance(node.op, Conv)
    return replace(node.op, stores=(operands.adopt(node.op.stores[0], node),))


def _host(editor: Editor, node: Node) -> Node | None:
    """What makes a node's image, if the node alone reads that and it is a function of such sums."""
    image = node.inputs[0]
    host = editor.producer(image)
    if host is None or editor.only_user(image) is not node or not isinstance(host.op, Conv):
        return None
    stores, found = host.op.stores, leading_bias(host.op.stores)
    if found is not None:
        addition, added = found
        bias, channels = host.inputs[added.index], (host.inputs[1].shape[0], 1, 1)
        if not bias.is_constant or bias.shape not in (channels, (1, *channels)):
            return None
        stores = tuple(ex.replaced(store, addition, ex.Acc()) for store in stores)
    return None if ex.arguments(*stores) else host


def _fits(first: Node, last: Node, limits: ConvBlocks) -> bool:
    expanded, channels = first.inputs[1].shape[:2]
    return (
        all(_is_multiple(size, limits.multiple) for size in (channels, expanded))
        and _is_at_most(channels, limits.channels)
        and _is_at_most(last.inputs[1].shape[0], limits.results)
    )


def _is_multiple(size: Dim, of: int) -> bool:
    return isinstance(size, int) and size % of == 0


def _is_at_most(size: Dim, most: int) -> bool:
    return isinstance(size, int) and size <= most


def _is_pointwise(node: Node) -> bool:
    return is_matrix_product(node) and _is_narrow(node)


def _is_depthwise(node: Node, limits: ConvBlocks) -> bool:
    op = node.op
    if not isinstance(op, Conv) or op.transposed or not _is_narrow(node):
        return False
    channels, each, *kernel = node.inputs[1].shape
    return (
        op.groups == channels
        and each == 1
        and kernel[0] == kernel[1]
        and kernel[0] in range(limits.least, limits.most + 1)
        and op.strides[0] == op.strides[1] <= limits.stride
        and op.dilations == (1, 1)
    )


def _is_narrow(node: Node) -> bool:
    """Whether it is a convolution over two axes of images of 16 bits with constant weights of their type, and has one
    result."""
    image, weight = node.inputs[:2]
    one = len(node.outputs) == 1 and len(image.shape) == 4
    return one and weight.is_constant and image.dtype is weight.dtype and image.dtype in _HALVES
