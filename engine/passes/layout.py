"""The passes on memory: in which order the axes of every computed tensor lie (`Value.order`, `choose_orders`).

Image kernels want the channel innermost. Convolutions start that order and everything that hands images on follows it:
each operator takes the order of its largest image operand, seen through views, so that NHWC exports, whose
transpositions are views of channels-last tensors, need no copy. Attention results lie head by head inside each token,
so that merging the heads is a view; the directions of a recurrent network likewise. What the caller hands in or gets
stays row-major.
"""

from __future__ import annotations

from engine.ir.dim import product
from engine.ir.graph import Graph, Node, Value, constant
from engine.ir.ops import (
    Attention,
    Concat,
    Conv,
    Expand,
    Gemm,
    Norm,
    Pad,
    Pointwise,
    Pool,
    Recurrent,
    Reduce,
    Reshape,
    Resize,
    Slice,
    Softmax,
    Transpose,
    View,
)
from engine.ir.regroup import is_view, reshaped_order
from engine.passes.editor import Editor
from engine.passes.traits import Traits
from engine.passes.views import inverse, reshape, transpose

Order = tuple[int, ...]

_IMAGE = (Conv, Pool)
_FOLLOWERS = (Pointwise, Concat, Pad, Resize, Pool, Norm, Softmax, Reduce)


def choose_orders(graph: Graph, traits: Traits) -> None:
    """Set the order of every value that an operator (not a view) computes."""
    outputs = set(graph.outputs)
    users = graph.users()
    seen: dict[Value, Order] = {}
    for node in graph.nodes:
        order = _order(node, seen, users, traits)
        for value in node.outputs:
            if order is None or len(order) != value.rank:
                continue
            if isinstance(node.op, Reshape):
                order = _reshaped(node, order, seen, users, traits)
                value.order = order if order != tuple(range(value.rank)) else None
            seen[value] = order
            if isinstance(node.op, View):
                continue
            if value in outputs:
                seen.pop(value)
            elif order != tuple(range(value.rank)):
                value.order = order


def _order(node: Node, seen: dict[Value, Order], users: dict[Value, list[Node]], traits: Traits) -> Order | None:
    """The order in which the results of `node` lie, or are seen through a view; None for row-major."""
    op = node.op
    if isinstance(op, View):
        return _through_view(op, node.inputs[0], seen)
    if isinstance(op, Attention | Recurrent):
        return _as_read(node.outputs[0], users)
    if isinstance(op, Gemm) and traits.permuted_rows and node.outputs[0].rank > 3:
        return _rows_as_read(node.outputs[0], users)
    if not traits.channels_last:
        return None
    if isinstance(op, Conv):
        return channels_last(node.outputs[0].rank)
    if isinstance(op, Pool) and node.inputs[0] not in seen:
        return channels_last(node.outputs[0].rank)
    if isinstance(op, _FOLLOWERS):
        return _followed(node, seen)
    return None


def channels_last(rank: int) -> Order:
    """Batch, spatial axes, channel."""
    return (0, *range(2, rank), 1)


def _followed(node: Node, seen: dict[Value, Order]) -> Order | None:
    """The order of the largest operand that has one: of several the most frequent."""
    rank = node.outputs[0].rank
    votes: dict[Order, int] = {}
    for value in node.inputs:
        order = seen.get(value)
        if order is not None and value.rank == rank and not value.is_constant:
            # An operand that is broadcast along an axis says little about where that axis should lie.
            full = sum(dim != 1 for dim in value.shape)
            votes[order] = votes.get(order, 0) + full
    return max(votes, key=lambda order: votes[order], default=None)


def _through_view(op: View, source: Value, seen: dict[Value, Order]) -> Order | None:
    """The order in which the elements of a view follow each other in memory, where its source has one."""
    order = seen.get(source)
    if isinstance(op, Transpose):
        # Output axis i is source axis perm[i]: the source's order in the names of the output's axes.
        back = inverse(op.perm)
        return tuple(back[axis] for axis in (order if order is not None else range(source.rank)))
    if order is None:
        return None
    if isinstance(op, Reshape):
        return reshaped_order(source.shape, op.shape, order)
    if isinstance(op, Slice) or (isinstance(op, Expand) and len(op.shape) == source.rank):
        return order
    return None


def _reshaped(
    node: Node, order: Order, seen: dict[Value, Order], users: dict[Value, list[Node]], traits: Traits
) -> Order:
    """The order of a reshaped tensor: where it takes a copy (a pixel shuffle), that which the readers want."""
    source = node.inputs[0]
    is_copied = not is_view(source.shape, node.output.shape, seen[source])
    if is_copied and traits.channels_last and any(isinstance(user.op, _IMAGE) for user in users.get(node.output, ())):
        return channels_last(node.output.rank)
    return order


def _as_read(value: Value, users: dict[Value, list[Node]]) -> Order | None:
    """The order that makes the transposition after an attention a view of contiguous memory."""
    for user in users.get(value, ()):
        if isinstance(user.op, Transpose):
            return user.op.perm
    return (0, 2, 1, 3) if value.rank == 4 else None


def _rows_as_read(value: Value, users: dict[Value, list[Node]]) -> Order | None:
    """The order that makes a permutation of the rows of a product a view of contiguous memory."""
    for user in users.get(value, ()):
        if isinstance(user.op, Transpose) and user.op.perm[-1] == value.rank - 1:
            return user.op.perm
    return None


def permute_flattened(graph: Graph, traits: Traits) -> None:
    """Flatten(image) @ weight: the weight's rows are permuted so that a channels-last image is flattened as it lies."""
    if not traits.channels_last:
        return
    editor = Editor(graph)
    for node in editor.nodes():
        if isinstance(node.op, Reshape) and editor.alive(node):
            _permute_flattened(editor, node)
    editor.finish()


def _permute_flattened(editor: Editor, node: Node) -> None:
    image, flat = node.inputs[0], node.output
    producer = editor.producer(image)
    users = editor.users(flat)
    if producer is None or isinstance(producer.op, View) or editor.is_output(flat) or not users:
        return
    sizes = [dim for dim in image.shape[1:] if isinstance(dim, int)]
    if image.rank < 3 or len(sizes) < image.rank - 1 or flat.shape != (image.shape[0], product(sizes)):
        return
    # An image of one pixel lies the same in both orders.
    if product(sizes[1:]) == 1 or not all(_reads_rows(user, flat) for user in users):
        return
    order = channels_last(image.rank)
    last = transpose(editor, image, order, node.origin)
    value = reshape(editor, last, flat.shape, node.origin)
    for user in users:
        weight = user.inputs[1]
        assert weight.data is not None
        columns = weight.data.shape[1]
        rows = weight.data.reshape(*sizes, columns).transpose(*range(1, image.rank - 1), 0, image.rank - 1)
        permuted = constant(weight.name, rows.reshape(-1, columns))
        editor.update(user, inputs=(value, permuted, *user.inputs[2:]))


def _reads_rows(node: Node, flat: Value) -> bool:
    return (
        isinstance(node.op, Gemm)
        and node.inputs[0] is flat
        and node.inputs[1].is_constant
        and node.inputs[1].rank == 2
        and all(value is not flat for value in node.inputs[1:])
    )
