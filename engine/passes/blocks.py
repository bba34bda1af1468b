"""The pass `fuse_blocks`: a 1×1 convolution, the depthwise one that alone reads its result, and the 1×1 convolution
that alone reads that become one operator, where the target has such blocks (`Traits.conv_blocks`): nothing between them
is stored. To all passes before they are three nodes."""

from __future__ import annotations

from dataclasses import replace

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node
from engine.ir.ops import Conv, ConvBlock
from engine.passes.editor import Editor, joined_origin
from engine.passes.operands import Operands, is_alike, is_matrix_product
from engine.passes.traits import Traits

_HALVES = (DType.F16, DType.BF16)


def fuse_blocks(graph: Graph, traits: Traits) -> None:
    """Join every inverted residual of 16 bits with constant weights, whose first two results are what a function of
    the sums and of constants of channels makes of them."""
    if not traits.conv_blocks:
        return
    editor = Editor(graph)
    for node in editor.nodes():
        if not _is_pointwise(node):
            continue
        middle = _host(editor, node)
        first = _host(editor, middle) if middle is not None and _is_depthwise(middle) else None
        if middle is None or first is None or not _is_pointwise(first):
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
    """What makes a node's image, if the node alone reads that and it is made of sums and constants of channels."""
    image = node.inputs[0]
    host = editor.producer(image)
    if host is None or editor.only_user(image) is not node or not isinstance(host.op, Conv):
        return None
    read = [host.inputs[i] for i in ex.arguments(*host.op.stores)]
    return host if all(value.is_constant and is_alike(value) for value in read) else None


def _is_pointwise(node: Node) -> bool:
    return is_matrix_product(node) and _is_narrow(node)


def _is_depthwise(node: Node) -> bool:
    op = node.op
    return (
        isinstance(op, Conv)
        and not op.transposed
        and op.groups == node.inputs[1].shape[0]
        and node.inputs[1].shape[1] == 1
        and _is_narrow(node)
    )


def _is_narrow(node: Node) -> bool:
    """Whether it is a convolution over two axes of images of 16 bits with constant weights of their type, and has one
    result."""
    image, weight = node.inputs[:2]
    one = len(node.outputs) == 1 and len(image.shape) == 4
    return one and weight.is_constant and image.dtype is weight.dtype and image.dtype in _HALVES
