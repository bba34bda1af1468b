"""What one element of a tensor is, as a function of the mask at its place: the proof behind the pass `unpad`.

`Elements.at` follows an element back through the graph, from an index given in symbols ("this sequence, this key") to
the mask, to constants and to ranges of positions. What it finds is a number, a position (which can only be compared
with another), or unknown (None); so what holds for every sequence, length and place is decided by the few cases of a
`Place`: whether the key is real, and whether it lies before, at or after the query. Real tokens come first in every
sequence (`engine/packing.py` packs by no other mask), so their number, a sum over the mask, is a position as well.
Reads the graph, changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.graph import Node, Shape, Value
from engine.ir.ops import (
    Expand,
    Gather,
    Pointwise,
    Reduce,
    ReduceKind,
    Reshape,
    ShapeTensor,
    Slice,
    Transpose,
    broadcast_shapes,
)
from engine.ir.regroup import axis_groups

_LARGEST = 4096
"""Rows of a constant matrix that is compared with a triangle."""
_DEPTH = 200


class Index(Enum):
    """Where along an axis."""

    FIRST = "first"  # 0: also where an axis has one element
    SEQUENCE = "sequence"  # which row of the batch
    QUERY = "query"  # a real position
    KEY = "key"  # any position
    LENGTH = "length"  # the number of real positions of the sequence, which is the first padded one
    ANY = "any"  # anywhere: heads, features


class Relation(Enum):
    """Where the key lies, seen from the query."""

    BEFORE = "before"
    AT = "at"
    AFTER = "after"


@dataclass(frozen=True)
class Place:
    """A case: whether the key is a real token, and where it lies."""

    real: bool
    relation: Relation = Relation.AT


Element: TypeAlias = "np.generic[Any] | Index | None"
"""A number, the position that an `Index` stands for, or unknown."""
Indices: TypeAlias = tuple[Index, ...]


@dataclass
class Elements:
    """Elements of the values of one graph in one place. `mask` is the input of zeros and ones, [batch, sequence]."""

    producers: Mapping[Value, Node]
    mask: Value
    place: Place
    given: dict[Value, Element] = field(default_factory=dict)
    """What is known of the elements of some values already."""
    _known: dict[tuple[Value, Indices], Element] = field(default_factory=dict)

    def at(self, value: Value, indices: Indices, depth: int = 0) -> Element:
        """The element of `value` at `indices`, one for each of its axes."""
        key = (value, indices)
        if key not in self._known:
            self._known[key] = self._find(value, indices, depth + 1) if depth < _DEPTH else None
        return self._known[key]

    def beside(self, value: Value, indices: Indices, depth: int = 0) -> Element:
        """The element of `value`, which is broadcast, that meets the element at `indices` of the result."""
        return self.at(value, broadcast(indices, value.shape), depth)

    def of(self, e: ex.Expr, arguments: Mapping[int, Element], accumulator: Element = None) -> Element:
        """The value of an expression whose arguments are known as far as `arguments` says, and its `accumulator`."""
        done: dict[ex.Expr, Element] = {}
        for part in ex.walk(e):
            if isinstance(part, ex.Arg):
                done[part] = arguments.get(part.index)
            elif isinstance(part, ex.Const):
                done[part] = part.dtype.numpy.type(part.value)
            elif isinstance(part, ex.Apply):
                done[part] = self._applied(part, [done[arg] for arg in part.args])
            else:
                done[part] = accumulator
        return done[e]

    def _find(self, value: Value, indices: Indices, depth: int) -> Element:
        if value in self.given:
            return self.given[value]
        if value is self.mask:
            return self._masked(value.dtype, indices)
        if value.data is not None:
            return self._constant(value.data, indices)
        node = self.producers.get(value)
        if node is None:
            return None
        op = node.op
        if isinstance(op, Pointwise) and not op.gathers:
            arguments = {i: self.beside(node.inputs[i], indices, depth) for i in ex.arguments(*op.stores)}
            return self.of(op.stores[node.outputs.index(value)], arguments)
        if isinstance(op, Transpose):
            placed = dict(zip(op.perm, indices, strict=True))
            return self.at(node.inputs[0], tuple(placed[axis] for axis in range(len(indices))), depth)
        if isinstance(op, Expand):
            return self.beside(node.inputs[0], indices, depth)
        if isinstance(op, Reshape):
            before = reshaped(node.inputs[0].shape, value.shape, indices)
            return None if before is None else self.at(node.inputs[0], before, depth)
        if isinstance(op, Slice):
            return self._sliced(op, node.inputs[0], indices, depth)
        if isinstance(op, Gather):
            return self._gathered(op, node, indices, depth)
        if isinstance(op, Reduce):
            return self._reduced(op, node, node.outputs.index(value), indices)
        if isinstance(op, ShapeTensor) and op.values is None and indices[0] is not Index.ANY:
            return indices[0] if indices[0] is not Index.FIRST else value.dtype.numpy.type(0)
        return None

    def _masked(self, dtype: DType, indices: Indices) -> Element:
        if indices[0] is not Index.SEQUENCE or indices[1] not in (Index.FIRST, Index.QUERY, Index.KEY):
            return None
        # The first token of a sequence and every query are real.
        real = self.place.real if indices[1] is Index.KEY else True
        return _number(np.asarray(real, dtype.numpy))

    def _constant(self, data: np.ndarray, indices: Indices) -> Element:
        if data.dtype == object:
            return None
        first = data[tuple(0 if index is Index.FIRST else slice(None) for index in indices)]
        free = [index for index in indices if index is not Index.FIRST]
        if first.size and (first == first.reshape(-1)[0]).all():
            return _number(first.reshape(-1)[:1])
        if free in ([Index.KEY], [Index.QUERY]) and np.array_equal(first, np.arange(len(first))):
            return free[0]
        if sorted(free, key=lambda index: index.value) == [Index.KEY, Index.QUERY]:
            return self._of_matrix(first if free[0] is Index.QUERY else first.T)
        return None

    def _of_matrix(self, data: np.ndarray) -> Element:
        """The element of a constant [queries, keys] that is the same wherever the key lies so."""
        if data.shape[0] != data.shape[1] or not 2 <= len(data) <= _LARGEST:
            return None
        rows, columns = np.ogrid[: len(data), : len(data)]
        match self.place.relation:
            case Relation.BEFORE:
                part = data[np.broadcast_to(columns < rows, data.shape)]
            case Relation.AT:
                part = data.diagonal()
            case _:
                part = data[np.broadcast_to(columns > rows, data.shape)]
        return _number(part[:1]) if (part == part[0]).all() else None

    def _sliced(self, op: Slice, source: Value, indices: Indices, depth: int) -> Element:
        # Index 0 of what a slice shows is its start; any other place is the source's only where nothing is left out.
        before = tuple(
            index if start == 0 and (step == 1 or index is Index.FIRST) else Index.ANY
            for index, start, step in zip(indices, op.starts, op.steps, strict=True)
        )
        return self.at(source, before, depth)

    def _gathered(self, op: Gather, node: Node, indices: Indices, depth: int) -> Element:
        data, by = node.inputs
        index = self.at(by, indices[op.axis : op.axis + by.rank], depth)
        if isinstance(index, np.generic):
            if index != 0:
                return None
            index = Index.FIRST
        elif index is None:
            index = Index.ANY
        return self.at(data, (*indices[: op.axis], index, *indices[op.axis + by.rank :]), depth)

    def _reduced(self, op: Reduce, node: Node, output: int, indices: Indices) -> Element:
        """The sum over all positions of a sequence of what is 1 at real ones and 0 at padded ones."""
        read = {i: node.inputs[i] for i in ex.arguments(op.source)}
        # A key that is meant already is not the one that the sum goes over.
        if op.kind is not ReduceKind.SUM or len(op.axes) != 1 or not read or Index.KEY in indices:
            return None
        shape = broadcast_shapes("Reduce", *(value.shape for value in read.values()))
        (axis,) = op.axes
        is_exact = op.source.dtype.itemsize >= 4
        if shape[axis] != self.mask.shape[1] or not is_exact or ex.arguments(*op.stores):
            return None
        inner = (*indices[:axis], Index.KEY, *indices[axis + 1 if op.keepdims else axis :])
        for real in (True, False):
            for relation in Relation:
                # What is `given` holds in one place; elsewhere it is not known.
                place = Elements(self.producers, self.mask, Place(real, relation), dict.fromkeys(self.given))
                one = place.of(op.source, {i: place.beside(value, inner) for i, value in read.items()})
                if not isinstance(one, np.generic) or one != real:
                    return None
        return self.of(op.stores[output], {}, Index.LENGTH)

    def _applied(self, e: ex.Apply, arguments: list[Element]) -> Element:
        if all(isinstance(argument, np.generic) for argument in arguments):
            leaves = tuple(ex.Arg(i, arg.dtype) for i, arg in enumerate(e.args))
            arrays = [np.asarray(argument) for argument in arguments]
            return _number(ex.evaluate(ex.Apply(e.op, leaves, e.dtype), arrays))
        match e.op:
            case PointOp.CAST if isinstance(arguments[0], Index) and (e.dtype.is_int or e.dtype.is_float):
                return arguments[0]
            case PointOp.EQ | PointOp.LT | PointOp.LE:
                return self._compared(e.op, arguments[0], arguments[1])
            case PointOp.WHERE if isinstance(arguments[0], np.generic):
                return arguments[1] if arguments[0] else arguments[2]
            case PointOp.MUL if e.dtype.is_float or e.dtype.is_int:
                # Of a token that is finite: an infinite one would have made the whole result NaN.
                return next((a for a in arguments if isinstance(a, np.generic) and a == 0), None)
            case PointOp.AND:
                return next((a for a in arguments if isinstance(a, np.generic) and not a), None)
            case PointOp.OR:
                return next((a for a in arguments if isinstance(a, np.generic) and a), None)
            case PointOp.ADD:
                # A range shifted by nothing.
                a, b = arguments
                shifted = a if isinstance(b, np.generic) and b == 0 else b
                still = isinstance(shifted, Index) and any(isinstance(x, np.generic) and x == 0 for x in arguments)
                return shifted if still else None
        return None

    def _compared(self, op: PointOp, a: Element, b: Element) -> Element:
        if not isinstance(a, Index) or not isinstance(b, Index):
            return None
        if a is b and a in (Index.KEY, Index.QUERY, Index.SEQUENCE, Index.LENGTH):
            return np.bool_(op is not PointOp.LT)
        if Index.LENGTH in (a, b):
            return self._beside_length(op, a, b)
        if {a, b} != {Index.KEY, Index.QUERY}:
            return None
        relation = self.place.relation
        equal = relation is Relation.AT
        less = relation is (Relation.BEFORE if a is Index.KEY else Relation.AFTER)
        return np.bool_({PointOp.EQ: equal, PointOp.LT: less, PointOp.LE: less or equal}[op])

    def _beside_length(self, op: PointOp, a: Index, b: Index) -> Element:
        """A position compared with the number of real ones, which is more than any real one and no more than any padded
        one."""
        position = a if b is Index.LENGTH else b
        if position is Index.QUERY or (position is Index.KEY and self.place.real):
            return np.bool_(op is not PointOp.EQ and position is a)
        if position is Index.KEY and (op, position is a) in ((PointOp.LT, True), (PointOp.LE, False)):
            return np.bool_(position is b)
        return None


def _number(array: np.ndarray) -> Element:
    """The element of an array of one."""
    number: np.generic[Any] = array.reshape(-1)[0]
    return number


def broadcast(indices: Indices, shape: Shape) -> Indices:
    """The indices of an operand of `shape` that meets the element at `indices`."""
    own = indices[len(indices) - len(shape) :]
    return tuple(Index.FIRST if dim == 1 else index for dim, index in zip(shape, own, strict=True))


def reshaped(before: Shape, after: Shape, indices: Indices) -> Indices | None:
    """The indices before a reshape that only adds and drops axes of one element, or regroups axes that no matter which
    element of is meant; None for another."""
    groups = axis_groups(before, after)
    if groups is None:
        return None
    found: list[Index] = []
    for old, new in groups:
        own = {indices[axis] for axis in new if after[axis] != 1}
        if len(old) == 1 and len(new) == 1:
            found.append(indices[new[0]] if after[new[0]] != 1 else Index.FIRST)
        elif all(before[axis] == 1 for axis in old) or own <= {Index.FIRST}:
            found += [Index.FIRST] * len(old)
        elif own == {Index.ANY}:
            found += [Index.ANY] * len(old)
        else:
            kept = [axis for axis in old if before[axis] != 1]
            sizes = [axis for axis in new if after[axis] != 1]
            if len(kept) != 1 or len(sizes) != 1:
                return None
            found += [indices[sizes[0]] if axis == kept[0] else Index.FIRST for axis in old]
    return tuple(found)
