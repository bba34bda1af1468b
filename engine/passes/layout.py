"""The pass `choose_orders`: in which order the axes of every computed tensor lie in memory (`Value.order`).

Image kernels want the channel innermost. Convolutions start that order and everything that hands images on follows it:
each operator takes the order of its largest image operand, seen through views, so that NHWC exports, whose
transpositions are views of channels-last tensors, need no copy. Attention results lie head by head inside each token,
so that merging the heads is a view. What the caller hands in or gets stays row-major.
"""

from __future__ import annotations

from engine.ir.graph import Graph, Node, Value
from engine.ir.ops import (
    Attention,
    Concat,
    Conv,
    Expand,
    Norm,
    Pad,
    Pointwise,
    Pool,
    Reduce,
    Resize,
    Slice,
    Softmax,
    Transpose,
    View,
)
from engine.passes.traits import Traits
from engine.passes.views import inverse

Order = tuple[int, ...]

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
    if isinstance(op, Attention):
        return _as_read(node.outputs[0], users)
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
    if isinstance(op, Slice) or (isinstance(op, Expand) and len(op.shape) == source.rank):
        return order
    return None


def _as_read(value: Value, users: dict[Value, list[Node]]) -> Order | None:
    """The order that makes the transposition after an attention a view of contiguous memory."""
    for user in users.get(value, ()):
        if isinstance(user.op, Transpose):
            return user.op.perm
    return (0, 2, 1, 3) if value.rank == 4 else None

