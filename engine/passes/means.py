"""The pass `fuse_means`: a depthwise convolution computes the mean over all its pixels beside its result, as a
squeeze-and-excite layer wants it, where the target has such convolutions (`Traits.conv_means`).

It comes last: to all other passes a convolution and a reduction are two nodes.
"""

from __future__ import annotations

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node, Value
from engine.ir.ops import Conv, ConvMean, Reduce, ReduceKind
from engine.passes.editor import Editor, joined_origin
from engine.passes.traits import Traits


def fuse_means(graph: Graph, traits: Traits) -> None:
    """Join every global mean with the depthwise convolution whose only result of 16 bits it is taken of."""
    if not traits.conv_means:
        return
    editor = Editor(graph)
    for node in editor.nodes():
        value = _averaged(node)
        host = None if value is None else editor.producer(value)
        if host is None or not isinstance(host.op, Conv) or not _is_depthwise(host):
            continue
        assert isinstance(node.op, Reduce)
        (mean,) = node.op.stores
        editor.remove(node)
        editor.update(
            host, ConvMean(host.op, mean), outputs=(*host.outputs, node.output), origin=joined_origin(host, node)
        )
    editor.finish()


def _averaged(node: Node) -> Value | None:
    """What a node is the mean of over all axes behind the first two, if it computes nothing else."""
    op = node.op
    if not isinstance(op, Reduce) or op.kind is not ReduceKind.MEAN or not op.keepdims or len(op.stores) != 1:
        return None
    source = op.source.args[0] if isinstance(op.source, ex.Apply) and op.source.op is ex.PointOp.CAST else op.source
    if not isinstance(source, ex.Arg) or op.source.dtype is not DType.F32 or ex.arguments(*op.stores):
        return None
    value = node.inputs[source.index]
    return value if op.axes == tuple(range(2, value.rank)) else None


def _is_depthwise(node: Node) -> bool:
    op, weight = node.op, node.inputs[1]
    assert isinstance(op, Conv)
    return (
        len(node.outputs) == 1
        and node.output.dtype in (DType.F16, DType.BF16)
        and not op.transposed
        and weight.is_constant
        and weight.shape[:2] == (op.groups, 1)
    )
