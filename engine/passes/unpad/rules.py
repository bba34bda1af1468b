"""Operators on packed rows: for each the proof that a row of its result depends on the same row of its operands alone,
and the operator that does the same to packed ones. Called by the pass `unpad` for one node at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.ir import expr as ex
from engine.ir.dim import Dim
from engine.ir.graph import Node, Shape, Value
from engine.ir.ops import (
    Attention,
    Concat,
    Conv,
    Expand,
    Gather,
    Gemm,
    Norm,
    Op,
    Pad,
    Pointwise,
    Reduce,
    Reshape,
    RowFactors,
    Slice,
    Softmax,
    Transpose,
)
from engine.ir.ops.light import operand_shape
from engine.ir.regroup import axis_groups
from engine.passes.operands import fixed_operands, gathers_of, stores_of
from engine.passes.unpad.elements import Element, broadcast
from engine.passes.unpad.masks import Refused, hides_only
from engine.passes.unpad.rows import Axes, Rows


@dataclass(frozen=True)
class _Made:
    """The operator on packed operands, and the axes of its results."""

    op: Op
    inputs: tuple[Value, ...]
    axes: Axes


def pack(rows: Rows, node: Node) -> None:
    """Compute `node` on packed rows. Raises Refused where its rows are not each other's business alone."""
    made = _packed(rows, node)
    dependent = any(value in rows.dependent for value in node.inputs)
    fills = _fills(rows, node, made.axes) if dependent else (None,) * len(node.outputs)
    _put(rows, node, made, fills, dependent)


def pack_attention(rows: Rows, node: Node) -> None:
    """Compute an attention on packed sequences. Raises Refused where its bias is more than a mask, or an operand has
    not a row for every token."""
    op = node.op
    assert isinstance(op, Attention)
    causal = hides_only(node, rows.mask, rows.padded.producers)
    operands = []
    for value in node.inputs[:3]:
        found = rows.in_packed(value)
        if found.axes != Axes(0, 2):
            raise Refused(f"attention {node.origin!r}: {value.name!r} is not [batch, heads, sequence, features]")
        operands.append(found.value)
    axes = Axes(0, 2)
    others = _adapted(rows, node, range(op.operands, len(node.inputs)), 4, axes)
    # A row of a real query is never masked as a whole: it sees itself.
    packed = replace(op, has_bias=False, causal=causal, packed=True, masked_rows_zero=False)
    _put(rows, node, _Made(packed, (*operands, rows.starts, *others), axes), (None,) * len(node.outputs), True)


def _put(rows: Rows, node: Node, made: _Made, fills: tuple[Element, ...], dependent: bool) -> None:
    results = rows.add(made.op, made.inputs, node.outputs[0].name, node.origin)
    for value, new, fill in zip(node.outputs, results, fills, strict=True):
        if new.shape != rows.shape(value.shape, made.axes):
            raise Refused(f"{node.op.name} {node.origin!r}: {list(value.shape)} would become {list(new.shape)}")
        rows.set_packed(value, new, made.axes, fill, dependent)


def _packed(rows: Rows, node: Node) -> _Made:
    op = node.op
    match op:
        case Pointwise() | Norm() | Softmax() | Reduce():
            return _expression(rows, node)
        case Gemm():
            return _gemm(rows, node, op)
        case Conv():
            return _conv(rows, node, op)
        case RowFactors():
            found = rows.in_packed(node.inputs[0])
            _demand(node.inputs[0].rank - 1 not in found.axes.all, node, "goes over positions or sequences")
            return _Made(op, (found.value,), found.axes)
        case Reshape():
            return _reshape(rows, node, op)
        case Transpose():
            found = rows.in_packed(node.inputs[0])
            return _Made(op, (found.value,), found.axes.at(op.perm.index))
        case Slice():
            found = rows.in_packed(node.inputs[0])
            whole = all(
                op.starts[axis] == 0 and op.steps[axis] == 1 and op.sizes[axis] == node.inputs[0].shape[axis]
                for axis in found.axes.all
            )
            _demand(whole, node, "takes some positions of a sequence")
            return _Made(replace(op, sizes=rows.shape(op.sizes, found.axes)), (found.value,), found.axes)
        case Expand():
            axes = _axes(rows, node, len(op.shape))
            source = node.inputs[0]
            value = rows.operand(source, len(op.shape) - source.rank, axes)
            return _Made(Expand(rows.shape(op.shape, axes)), (value,), axes)
        case Concat():
            axes = _axes(rows, node, node.output.rank)
            _demand(op.axis not in axes.all, node, "joins positions or sequences")
            return _Made(op, tuple(_same_rows(rows, node, value, axes) for value in node.inputs), axes)
        case Pad():
            found = rows.in_packed(node.inputs[0])
            _demand(all(op.pads[axis] == (0, 0) for axis in found.axes.all), node, "moves positions")
            return _Made(op, (found.value,), found.axes)
        case Gather():
            return _gather(rows, node, op)
    raise Refused(f"{op.name} {node.origin!r} mixes positions")


def _demand(holds: bool, node: Node, otherwise: str) -> None:
    if not holds:
        raise Refused(f"{node.op.name} {node.origin!r} {otherwise}")


def _same_rows(rows: Rows, node: Node, value: Value, axes: Axes) -> Value:
    found = rows.in_packed(value)
    _demand(found.axes == axes, node, "joins rows of different orders")
    return found.value


def _axes(rows: Rows, node: Node, rank: int) -> Axes:
    """The axes of the rows in the space of `rank` axes over which `node` goes: those of its packed operands."""
    for value in node.inputs:
        if value in rows.dependent and value in rows.packed:
            return rows.packed[value].axes.moved(rank - value.rank)
    shapes: list[Shape] = [value.shape for value in node.outputs]
    shapes += [operand_shape(i, node.inputs, gathers_of(node.op)) for i in range(len(node.inputs))]
    for shape in shapes:
        axes = rows.axes_of(shape)
        if axes is not None and len(shape) == rank:
            return axes
    raise Refused(f"{node.op.name} {node.origin!r} has no row for every token")


def _expression(rows: Rows, node: Node) -> _Made:
    op = node.op
    assert isinstance(op, Pointwise | Norm | Softmax | Reduce)
    read = ex.arguments(op.source) if not isinstance(op, Pointwise) else ex.arguments(*op.stores)
    _demand(bool(read), node, "reads nothing")
    rank = max(len(operand_shape(i, node.inputs, gathers_of(op))) for i in read)
    axes = _axes(rows, node, rank)
    reduced = {Norm: "axes", Reduce: "axes"}.get(type(op))
    over: tuple[int, ...] = getattr(op, reduced) if reduced else (op.axis,) if isinstance(op, Softmax) else ()
    _demand(not set(over) & set(axes.all), node, "goes over positions or sequences")
    if isinstance(op, Reduce):
        after = axes
        tail = set(ex.arguments(*op.stores))
        if not op.keepdims:
            after = axes.at(lambda axis: axis - sum(other < axis for other in over))
            _demand(not tail & set(read), node, "reads an operand before and after it reduces")
        apart = dict.fromkeys(tail - set(read), (node.outputs[0].rank, after))
        return _Made(op, _adapted(rows, node, range(len(node.inputs)), rank, axes, apart), after)
    return _Made(op, _adapted(rows, node, range(len(node.inputs)), rank, axes), axes)


def _adapted(
    rows: Rows,
    node: Node,
    which: range,
    rank: int,
    axes: Axes,
    apart: dict[int, tuple[int, Axes]] | None = None,
) -> tuple[Value, ...]:
    """The inputs `which` of a node, as they meet packed rows in a space of `rank` axes; those `apart` in another
    one."""
    tables = dict(gathers_of(node.op))
    offsets = {by: rank - len(operand_shape(table, node.inputs, gathers_of(node.op))) for table, by in tables.items()}
    found = []
    for i in which:
        value = node.inputs[i]
        own_rank, own_axes = (apart or {}).get(i, (rank, axes))
        if i in tables:
            # What a table has beside its rows lies behind the axes of the index.
            index = node.inputs[tables[i]]
            first = offsets[tables[i]] + index.rank
            behind = [axis - first + 1 for axis in own_axes.all if axis >= first]
            _demand(all(value.shape[axis] == 1 for axis in behind), node, "looks positions up")
            found.append(rows.in_plain(value))
        else:
            found.append(rows.operand(value, offsets.get(i, own_rank - value.rank), own_axes))
    return tuple(found)


def _gemm(rows: Rows, node: Node, op: Gemm) -> _Made:
    a, b = node.inputs[:2]
    rank = node.outputs[0].rank
    found = rows.in_packed(a)
    axes = found.axes.moved(rank - a.rank)
    _demand(rank - 1 not in axes.all, node, "sums over positions")
    _demand(b not in rows.dependent or b not in rows.packed, node, "multiplies tokens with tokens")
    lead = [b.shape[axis - rank + b.rank] for axis in axes.all if axis < rank - 2 and axis >= rank - b.rank]
    _demand(all(dim == 1 for dim in lead), node, "has another matrix for every position or sequence")
    factors = [rows.in_packed(value) for value in node.inputs[2 : op.operands]]
    _demand(all(one.axes == found.axes for one in factors), node, "divides rows of another order")
    others = _adapted(rows, node, range(op.operands, len(node.inputs)), rank, axes)
    return _Made(op, (found.value, rows.in_plain(b), *(one.value for one in factors), *others), axes)


def _conv(rows: Rows, node: Node, op: Conv) -> _Made:
    """A convolution that is a product with the channels of every position alone."""
    x, weight = node.inputs[:2]
    is_product = op.is_pointwise and not op.transposed and all(dim == 1 for dim in weight.shape[2:])
    _demand(is_product, node, "mixes positions")
    _demand(weight not in rows.dependent, node, "multiplies tokens with tokens")
    found = rows.in_packed(x)
    _demand(1 not in found.axes.all, node, "sums over positions")
    others = _adapted(rows, node, range(fixed_operands(op), len(node.inputs)), x.rank, found.axes)
    return _Made(op, (found.value, rows.in_plain(weight), *others), found.axes)


def _reshape(rows: Rows, node: Node, op: Reshape) -> _Made:
    before, after = node.inputs[0].shape, node.output.shape
    found = rows.in_packed(node.inputs[0])
    groups = axis_groups(before, after)
    _demand(groups is not None, node, "regroups positions")
    axes = _regrouped(rows, found.axes, groups or [], before, after)
    if axes is None:
        raise Refused(f"Reshape {node.origin!r} makes one axis of rows and others")
    return _Made(Reshape(rows.shape(op.shape, axes)), (found.value,), axes)


def _regrouped(rows: Rows, axes: Axes, groups: list[tuple[range, range]], before: Shape, after: Shape) -> Axes | None:
    """Where the axes of the rows are after a reshape. Axes of one element may come and go beside them."""

    def new(axis: int) -> list[int]:
        return next([place for place in new if after[place] != 1] for old, new in groups if axis in old)

    def old(axis: int) -> list[int]:
        return next([place for place in old if before[place] != 1] for old, _ in groups if axis in old)

    def single(axis: int, dim: Dim) -> int | None:
        own = new(axis)
        return own[0] if old(axis) == [axis] and len(own) == 1 and after[own[0]] == dim else None

    if axes.batch is None:
        both = new(axes.sequence)
        if old(axes.sequence) != [axes.sequence]:
            return None
        if len(both) == 1:
            return replace(axes, sequence=both[0])
        wanted = (rows.sequence, rows.batch) if axes.turned else (rows.batch, rows.sequence)
        if len(both) != 2 or (after[both[0]], after[both[1]]) != wanted:
            return None
        return Axes(both[1], both[0]) if axes.turned else Axes(both[0], both[1])
    pair = old(axes.sequence)
    if pair in ([axes.batch, axes.sequence], [axes.sequence, axes.batch]):
        merged = new(axes.sequence)
        return Axes(None, merged[0], turned=pair[0] == axes.sequence) if len(merged) == 1 else None
    batch, sequence = single(axes.batch, rows.batch), single(axes.sequence, rows.sequence)
    return Axes(batch, sequence) if batch is not None and sequence is not None else None


def _gather(rows: Rows, node: Node, op: Gather) -> _Made:
    data, by = node.inputs
    if data in rows.dependent:
        found = rows.in_packed(data)
        _demand(op.axis not in found.axes.all, node, "looks positions up")
        axes = found.axes.at(lambda axis: axis + (by.rank - 1 if axis > op.axis else 0))
        _demand(by not in rows.dependent, node, "looks up what it computed")
        return _Made(op, (found.value, rows.in_plain(by)), axes)
    index = rows.in_packed(by)
    return _Made(op, (rows.in_plain(data), index.value), index.axes.moved(op.axis))


def _fills(rows: Rows, node: Node, axes: Axes) -> tuple[Element, ...]:
    """What the results of `node` are at padded positions in the original graph, where that is known."""
    op = node.op
    stores = stores_of(op)
    if stores:
        indices = rows.indices(node.outputs[0].rank, axes)
        arguments: dict[int, Element] = {}
        tables = {table for table, _ in gathers_of(op)}
        for i in ex.arguments(*stores):
            value = node.inputs[i]
            own = broadcast(indices, value.shape) if value.rank <= len(indices) else None
            arguments[i] = None if own is None or i in tables else rows.padded.at(value, own)
        known = (rows.padded.of(store, arguments) for store in stores)
        return (*known, *(None,) * (len(node.outputs) - len(stores)))
    if isinstance(op, Reshape | Transpose | Slice | Expand) and node.inputs[0] in rows.packed:
        return (rows.packed[node.inputs[0]].fill,)
    return (None,) * len(node.outputs)
