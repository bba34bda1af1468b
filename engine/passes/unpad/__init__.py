"""The pass `unpad`: an encoder whose mask is an input of zeros and ones, rewritten to run on real tokens only.

From a finished graph and to another one, beside it, with the same constants: the padded graph stays as it is. In the
new one the axes of batch and positions are one row of `tokens`, from the first operator that treats each position
alone; attention runs on packed sequences; and what is not done position by position is given them unpacked. What has to
hold:

- Attention: the bias gives real keys 0 and hides padded ones (and, if causal, later ones) for good (`masks.py`). Which
  it is follows from what one element of the bias is, as a function of the mask at its place (`elements.py`).
- Everything on packed rows: a row of the result depends on the same row of the operands, and on operands that are the
  same for every token or for every token at a position (`rules.py`).
- Everything else: it is done on values that are those of the original graph in every element. Those that no packed
  attention has a part in are; an unpacked one is where its elements at padded positions are known (a product with the
  mask), or where they are not looked at (the first position of a sequence). So no result at a real position, and none
  without positions, depends on what stood at padded ones.

Outputs that show positions are filled with zeros at padded ones, where the original has what its encoder made of
padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir.dim import is_symbol, symbol, symbols
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node, Value
from engine.ir.ops import Attention, Gather, Gemm, Reduce, Slice
from engine.passes.layout import choose_orders
from engine.passes.operands import fixed_operands, gathers_of
from engine.passes.pipeline import print_after
from engine.passes.prologues import fuse_gathers
from engine.passes.traits import PackedAttention, Traits
from engine.passes.unpad.elements import Index, broadcast
from engine.passes.unpad.last_norms import unpack_in_norms
from engine.passes.unpad.masks import Refused
from engine.passes.unpad.rows import Rows
from engine.passes.unpad.rules import pack, pack_attention
from engine.passes.views import merge_views


@dataclass(frozen=True)
class Unpadded:
    """The graph on packed tokens.

    Its inputs are those of the model that it reads, and `hidden` ones, by kind, which are computed from the input
    `mask`: int64 `rows` [tokens], where in batch · sequence each token is; `positions` [tokens], where in its sequence;
    `places` [batch, sequence], which token is there; int32 `starts` [batch + 1], the first token of each sequence.
    `tokens` is the name of a size that is this graph's alone: the number of tokens, rounded up. `shown` are the outputs
    with positions: their axes of batch and sequence (or the one that has both), and what they are filled with at padded
    ones. `attentions` is the number of attentions on packed sequences.
    """

    graph: Graph
    mask: str
    tokens: str
    hidden: dict[str, str]
    shown: dict[str, tuple[tuple[int, ...], float]]
    attentions: int


def unpad(graph: Graph, traits: Traits) -> Unpadded | str:
    """The graph on packed tokens, or in a few words why there is none. `graph` is not changed."""
    attentions = [node for node in graph.nodes if isinstance(node.op, Attention)]
    if not attentions:
        return "no attention was recognised"
    if traits.packed is None:
        return "the device has no attention on packed sequences"
    reason = ""
    for mask in _masks(graph, attentions):
        try:
            return _rewritten(graph, mask, traits, traits.packed)
        except Refused as refused:
            reason = reason or str(refused)
        except ShapeError as error:
            reason = reason or f"sizes do not fit: {error}"
    return reason or "no attention is masked by an input [batch, sequence] of sizes that tell its axes"


def _masks(graph: Graph, attentions: list[Node]) -> list[Value]:
    """Inputs that may be the mask: [batch, sequence], with a bias computed from them."""
    producers = graph.producers()
    seen: set[Value] = set()
    pending = [node.inputs[3] for node in attentions if isinstance(node.op, Attention) and node.op.has_bias]
    while pending:
        value = pending.pop()
        if value not in seen:
            seen.add(value)
            node = producers.get(value)
            pending += node.inputs if node is not None and not isinstance(node.op, Attention) else ()
    looked_up = _of_many(graph)
    return [value for value in graph.inputs if value in seen and value not in looked_up and _may_be_mask(value)]


def _may_be_mask(value: Value) -> bool:
    numeric = value.dtype.is_int or value.dtype.is_float or value.dtype is DType.BOOL
    # Axes are told by their sizes. That is no guess: a row (i, j) of what has these sizes is one whatever it means.
    told = all(is_symbol(dim) or (isinstance(dim, int) and dim > 1) for dim in value.shape)
    return numeric and value.rank == 2 and told and value.shape[0] != value.shape[1]


def _of_many(graph: Graph) -> set[Value]:
    """Values that choose from a table of more than two rows: token ids (compared with padding's, maybe), no mask."""
    found = set()
    for node in graph.nodes:
        pairs = [(node.inputs[table], node.inputs[by], 0) for table, by in gathers_of(node.op)]
        if isinstance(node.op, Gather):
            pairs.append((node.inputs[0], node.inputs[1], node.op.axis))
        found |= {by for table, by, axis in pairs if table.shape[axis] not in (1, 2)}
    return found


def _rewritten(graph: Graph, mask: Value, traits: Traits, kernel: PackedAttention) -> Unpadded:
    rows = Rows(graph, mask, symbol(_free_name("tokens", {str(s) for v in graph.inputs for s in symbols(*v.shape)})))
    names = {value.name for value in graph.inputs}
    for value in (rows.rows, rows.positions, rows.places, rows.starts):
        value.name = _free_name(value.name, names)
    count = 0
    refused: Refused | None = None
    for node in graph.nodes:
        try:
            if isinstance(node.op, Attention):
                _check_kernel(node, kernel)
                pack_attention(rows, node)
                count += 1
                continue
            if any(value in rows.dependent for value in node.inputs):
                _dependent(rows, node)
                continue
            if node.outputs[0].rank > 2 or node.outputs[0].dtype.is_float:
                pack(rows, node)
        except (Refused, ShapeError) as error:
            found = error if isinstance(error, Refused) else Refused(f"{node.op.name} {node.origin!r}: {error}")
            if any(value in rows.dependent for value in node.inputs):
                raise found from None
            refused = refused or (found if isinstance(node.op, Attention) else None)
        _copy(rows, node)
    if not count:
        raise refused or Refused("no attention is masked")
    outputs = [rows.unpacked(value) for value in graph.outputs]
    return _finished(graph, rows, outputs, traits, count)


def _check_kernel(node: Node, kernel: PackedAttention) -> None:
    """Raises Refused where the target has no kernel for an attention on packed sequences."""
    if node.inputs[0].dtype not in kernel.types:
        raise Refused(f"no attention on packed sequences of {node.inputs[0].dtype.value} on this device")
    for value in node.inputs[:3]:
        width = value.shape[-1]
        fits = isinstance(width, int) and width % kernel.multiple == 0 and width <= (kernel.widest or width)
        if not fits:
            raise Refused(f"no attention on packed sequences of heads of {width} features on this device")


def _copy(rows: Rows, node: Node, inputs: list[Value] | None = None) -> None:
    """`node` in the plain graph."""
    given = inputs if inputs is not None else [rows.in_plain(value) for value in node.inputs]
    results = rows.add(node.op, given, node.outputs[0].name, node.origin)
    for value, new in zip(node.outputs, results, strict=True):
        # What is inferred anew may be said otherwise (a size beside the same size cut off).
        new.shape = value.shape
        rows.plain[value] = new


def _dependent(rows: Rows, node: Node) -> None:
    """A node that reads what a packed attention has a part in: on rows where it can, else on values as the original has
    them in every element it looks at. Raises Refused where it looks at padded ones."""
    packed = [value for value in node.inputs if value in rows.dependent and value in rows.packed]
    if packed:
        try:
            pack(rows, node)
            return
        except Refused as refused:
            if _first_position(rows, node):
                return
            if any(rows.has_holes(value) for value in packed) and not _ignores_padding(rows, node):
                raise refused from None
    _copy(rows, node, [rows.unpacked(value) for value in node.inputs])
    rows.dependent.update(node.outputs)
    for value in node.outputs:
        rows.padded.given[value] = None


def _first_position(rows: Rows, node: Node) -> bool:
    """Take the first position of every sequence, where that is what `node` does."""
    op = node.op
    if not isinstance(op, Slice) or node.inputs[0] not in rows.packed:
        return False
    axes = rows.packed[node.inputs[0]].axes
    axis = axes.sequence
    if axes.batch is None or op.starts[axis] != 0 or op.sizes[axis] != 1:
        return False
    first = rows.first_tokens(node.inputs[0])
    _copy(rows, node, [first])
    rows.dependent.update(node.outputs)
    for value in node.outputs:
        rows.padded.given[value] = None
    return True


def _ignores_padding(rows: Rows, node: Node) -> bool:
    """Whether a reduction over positions meets the same number at every padded one, whatever is there."""
    op = node.op
    if isinstance(op, Reduce):
        inner = {i: node.inputs[i] for i in ex.arguments(op.source)}
        spaces = [value for value in inner.values() if value in rows.packed and value in rows.dependent]
        rank = max(value.rank for value in inner.values())
        if not spaces or any(rows.has_holes(node.inputs[i]) for i in ex.arguments(*op.stores)):
            return False
        axes = rows.packed[spaces[0]].axes.moved(rank - spaces[0].rank)
        if any(rows.packed[value].axes.moved(rank - value.rank) != axes for value in spaces):
            return False
        indices = rows.indices(rank, axes)
        arguments = {i: rows.padded.at(value, broadcast(indices, value.shape)) for i, value in inner.items()}
        return axes.sequence in op.axes and isinstance(rows.padded.of(op.source, arguments), np.generic)
    if isinstance(op, Gemm):
        # The mask, or what is 0 where it is, times tokens: [batch, n, sequence] @ [batch, sequence, features].
        a, b = node.inputs[:2]
        others = node.inputs[fixed_operands(op) :]
        if a in rows.dependent or any(map(rows.has_holes, others)) or a.rank != b.rank or b not in rows.packed:
            return False
        axes = rows.packed[b].axes
        if axes.batch is None or axes.sequence != b.rank - 2:
            return False
        place = [Index.ANY] * a.rank
        place[axes.batch], place[-1] = Index.SEQUENCE, Index.KEY
        weight = rows.padded.at(a, broadcast(tuple(place), a.shape))
        return isinstance(weight, np.generic) and bool(weight == 0)
    return False


def _finished(graph: Graph, rows: Rows, outputs: list[Value], traits: Traits, count: int) -> Unpadded:
    new = Graph(graph.name, list(graph.inputs), outputs, list(graph.output_names), rows.nodes)
    new.remove_dead()
    merge_views(new, traits)
    fuse_gathers(new, traits)
    unpack_in_norms(new, traits)
    merge_views(new, traits)
    choose_orders(new, traits)
    print_after("unpad", new)
    read = {value for node in new.nodes for value in node.inputs} | set(new.outputs)
    hidden = {"rows": rows.rows, "positions": rows.positions, "places": rows.places, "starts": rows.starts}
    new.inputs = [value for value in (*graph.inputs, *hidden.values()) if value in read]
    used = {kind: value.name for kind, value in hidden.items() if value in read}
    shown = {
        name: (rows.packed[value].axes.all, float(rows.fill_of(value)))
        for name, value in zip(graph.output_names, graph.outputs, strict=True)
        if value in rows.dependent and value in rows.packed
    }
    return Unpadded(new, rows.mask.name, str(rows.tokens), used, shown, count)


def _free_name(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name
