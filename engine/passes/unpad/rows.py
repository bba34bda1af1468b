"""The graph that runs on packed tokens, under construction: values in their two forms, and what brings one to the
other.

A value is *plain* in the form of the original graph, or *packed*: the same axes, but 1 for the batch and the number of
tokens for the positions. Plain values that no packed attention has computed are the original's in every element; one
that is unpacked is so at real tokens, and has its `fill` at the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.ir import expr as ex
from engine.ir.dim import Dim, Sym, limits_within, minimum, product
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.graph import Graph, Node, Shape, Value, make_node
from engine.ir.ops import Gather, Op, Pointwise, Reshape, Slice, Transpose
from engine.passes.unpad.elements import Element, Elements, Index, Indices, Place
from engine.passes.unpad.masks import Refused
from engine.passes.views import inverse


@dataclass(frozen=True)
class Axes:
    """Which axis of a value is the batch's and which the positions'. `batch` None: the latter has both, sequence after
    sequence or, where `turned`, position after position."""

    batch: int | None
    sequence: int
    turned: bool = False

    def moved(self, by: int) -> Axes:
        return self.at(lambda axis: axis + by)

    def at(self, place: Callable[[int], int]) -> Axes:
        """The same axes, each where `place` says."""
        return replace(self, batch=None if self.batch is None else place(self.batch), sequence=place(self.sequence))

    @property
    def all(self) -> tuple[int, ...]:
        return (self.sequence,) if self.batch is None else (self.batch, self.sequence)


@dataclass(frozen=True)
class Packed:
    """A packed value and its axes. `fill`: what every padded element is in the original graph, None where unknown."""

    value: Value
    axes: Axes
    fill: np.generic[Any] | None = None


class Rows:
    """The new graph's nodes and values, by the values of the original graph."""

    def __init__(self, graph: Graph, mask: Value, tokens: Sym) -> None:
        batch, sequence = mask.shape
        self.batch, self.sequence, self.tokens = batch, sequence, tokens
        self.mask = mask
        self.nodes: list[Node] = []
        self.plain: dict[Value, Value] = {value: value for value in graph.inputs}
        self.packed: dict[Value, Packed] = {}
        self.dependent: set[Value] = set()
        """Values that a packed attention has a part in."""
        self._unpacked: dict[Value, Value] = {}
        self._positioned: dict[tuple[Value, int], Value] = {}
        self.rows = Value("packed.rows", DType.I64, (tokens,))
        self.positions = Value("packed.positions", DType.I64, (tokens,))
        self.places = Value("packed.places", DType.I64, (batch, sequence))
        self.starts = Value("packed.starts", DType.I32, (batch + 1,))
        self.padded = Elements(graph.producers(), mask, Place(real=False))
        """Elements of the original graph at padded positions."""

    def add(self, op: Op, inputs: Sequence[Value], name: str, origin: str) -> tuple[Value, ...]:
        node = make_node(op, inputs, name, origin)
        self.nodes.append(node)
        return node.outputs

    def in_plain(self, value: Value) -> Value:
        """`value` as the original graph has it. Raises Refused where it exists packed only."""
        if value.is_constant:
            return value
        if value not in self.plain:
            raise Refused(f"{value.name!r} is packed")
        return self.plain[value]

    def axes_of(self, shape: Shape) -> Axes | None:
        """The axes of batch and positions, where each is there once."""
        batch = [axis for axis, dim in enumerate(shape) if dim == self.batch]
        sequence = [axis for axis, dim in enumerate(shape) if dim == self.sequence]
        return Axes(batch[0], sequence[0]) if len(batch) == len(sequence) == 1 else None

    def in_packed(self, value: Value) -> Packed:
        """`value` packed: as it was computed, or by a lookup of its rows. Raises Refused where it has no rows, or a
        packed attention has a part in it and it has been reduced since."""
        if value not in self.packed:
            axes = self.axes_of(value.shape)
            if axes is None or value in self.dependent:
                raise Refused(f"{value.name!r} has no row for every token")
            self.packed[value] = Packed(self._looked_up(self.in_plain(value), axes), axes)
        return self.packed[value]

    def set_packed(self, value: Value, new: Value, axes: Axes, fill: Element, dependent: bool) -> None:
        known = fill if isinstance(fill, np.generic) else None  # a position is another one at every row
        self.packed[value] = Packed(new, axes, known)
        if dependent:
            self.dependent.add(value)
            self.padded.given[value] = known

    def shape(self, shape: Shape, axes: Axes) -> Shape:
        """The packed form of a shape."""
        new: dict[int, Dim] = {axes.sequence: self.tokens}
        if axes.batch is not None:
            new[axes.batch] = 1
        return tuple(new.get(axis, dim) for axis, dim in enumerate(shape))

    def covers(self, dim: Dim) -> bool:
        """Whether a dim is the sequence's size, wherever the graph can run: also where a table cuts it off."""
        return dim == self.sequence or any(
            limit > 1 and dim == minimum(limit, self.sequence) for _, limit in limits_within(dim)
        )

    def operand(self, value: Value, offset: int, axes: Axes) -> Value:
        """`value`, which meets a packed tensor with its first axis at axis `offset` of it, in the form that does so.

        Raises Refused where its rows are not those of the tensor.
        """

        def dim(axis: int | None) -> Dim:
            return value.shape[axis - offset] if axis is not None and 0 <= axis - offset < value.rank else 1

        batch, sequence = dim(axes.batch), dim(axes.sequence)
        if batch == 1 and sequence == 1:
            return self.in_plain(value)
        if value not in self.dependent and batch == 1 and axes.batch is not None and self.covers(sequence):
            return self._at_positions(value, axes.sequence - offset)
        found = self.in_packed(value)
        if found.axes.moved(offset) != axes:
            raise Refused(f"{value.name!r} meets rows of another order")
        return found.value

    def indices(self, rank: int, axes: Axes) -> Indices:
        """The place of a row's elements, in a tensor of `rank`."""
        found = [Index.ANY] * rank
        if axes.batch is not None:
            found[axes.batch], found[axes.sequence] = Index.SEQUENCE, Index.KEY
        return tuple(found)

    # From plain to packed

    def _looked_up(self, value: Value, axes: Axes) -> Value:
        """The rows of the real tokens of a plain value, in its axes."""
        flat = self._rows_first(value, axes, self.batch * self.sequence)
        index = self._reshaped(self.rows, (1, self.tokens))
        (found,) = self.add(Gather(0), (flat, index), f"{value.name}.packed", value.name)
        return self._rows_back(found, axes, value.rank)

    def _at_positions(self, value: Value, axis: int) -> Value:
        """What a plain value has along `axis`, once for each token: at its position."""
        if (value, axis) not in self._positioned:
            self._positioned[value, axis] = self._looked_up_at(value, axis)
        return self._positioned[value, axis]

    def _looked_up_at(self, value: Value, axis: int) -> Value:
        source = self.in_plain(value)
        if axis == 1 and value.shape[0] == 1 and value.rank > 2:
            # In the form in which a lookup can become a gathered operand.
            flat = self._reshaped(source, value.shape[1:])
            index = self._reshaped(self.positions, (1, self.tokens))
            return self.add(Gather(0), (flat, index), f"{value.name}.packed", value.name)[0]
        return self.add(Gather(axis), (source, self.positions), f"{value.name}.packed", value.name)[0]

    # From packed to plain

    def unpacked(self, value: Value) -> Value:
        """`value` as the original graph has it, padded positions filled."""
        if value not in self.dependent or value not in self.packed:
            return self.in_plain(value)
        if value in self._unpacked:
            return self._unpacked[value]
        found = self.packed[value]
        rank, axes = value.rank, found.axes
        if axes.turned:
            raise Refused(f"{value.name!r} has its positions before its sequences in one axis")
        flat = self._rows_first(found.value, axes, self.tokens)
        rest = flat.shape[1:] or (1,)
        table = self._reshaped(flat, (self.tokens, *rest))
        mask = self._reshaped(self.mask, (*self.mask.shape, *[1] * len(rest)))
        fill = self.fill_of(value)
        arg = ex.Arg(2, mask.dtype)
        real = arg if mask.dtype is DType.BOOL else ex.apply(PointOp.NOT, ex.apply(PointOp.EQ, arg, _zero(arg)))
        store = ex.apply(PointOp.WHERE, real, ex.Arg(0, table.dtype), ex.const(fill, table.dtype))
        op = Pointwise((store,), gathers=((0, 1),))
        (whole,) = self.add(op, (table, self.places, mask), f"{value.name}.unpacked", value.name)
        lead = (self.batch, self.sequence) if axes.batch is not None else (self.batch * self.sequence,)
        whole = self._reshaped(whole, (*lead, *flat.shape[1:]))
        self._unpacked[value] = self._transposed(whole, inverse(_order(axes, rank)))
        return self._unpacked[value]

    def fill_of(self, value: Value) -> float:
        """What padded positions of `value` are filled with when it is unpacked."""
        fill = self.packed[value].fill
        return 0.0 if fill is None else float(fill)

    def has_holes(self, value: Value) -> bool:
        """Whether the plain form of `value` is the original's at real tokens only."""
        return value in self.dependent and value in self.packed and self.packed[value].fill is None

    def first_tokens(self, value: Value) -> Value:
        """The first token of every sequence, of a packed value: its plain form with one position."""
        found = self.packed[value]
        axes = found.axes
        if axes.batch is None:
            raise Refused(f"{value.name!r}: batch and positions are one axis")
        flat = self._rows_first(found.value, axes, self.tokens)
        starts = self.add(Slice((0,), (self.batch,), (1,)), (self.starts,), "packed.first", value.name)[0]
        (rows,) = self.add(Gather(0), (flat, starts), f"{value.name}.first", value.name)
        rows = self._reshaped(rows, (self.batch, 1, *flat.shape[1:]))
        return self._transposed(rows, inverse(_order(axes, value.rank)))

    def _rows_first(self, value: Value, axes: Axes, count: Dim) -> Value:
        """`value` with its rows, of which there are `count`, along the first axis."""
        turned = self._transposed(value, _order(axes, value.rank))
        return self._reshaped(turned, (count, *turned.shape[len(axes.all) :]))

    def _rows_back(self, rows: Value, axes: Axes, rank: int) -> Value:
        """[1, tokens, …] with its axes where a value of `rank` has them."""
        return self._transposed(rows, inverse(_order(axes, rank)))

    def _transposed(self, value: Value, perm: tuple[int, ...]) -> Value:
        if perm == tuple(range(len(perm))):
            return value
        return self.add(Transpose(perm), (value,), value.name, value.name)[0]

    def _reshaped(self, value: Value, shape: Shape) -> Value:
        assert product(shape) == product(value.shape), f"{value!r} to {shape}"
        return value if shape == value.shape else self.add(Reshape(shape), (value,), value.name, value.name)[0]


def _order(axes: Axes, rank: int) -> tuple[int, ...]:
    """The permutation that brings the rows' axes to the front."""
    return (*axes.all, *(axis for axis in range(rank) if axis not in axes.all))


def _zero(arg: ex.Arg) -> ex.Const:
    return ex.const(0, arg.dtype)
