"""The pass `recognise_causal`: an attention bias that only hides keys by their distance from the query becomes `causal`
or a `window`, and is never read.

The bias has to be nothing else: 0 for the keys of a band around the query's position and a large negative number
elsewhere, from a constant (sliced to the sequence) or from comparisons of two ranges of positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite

import numpy as np

from engine.ir.expr import Apply, Const, Expr, PointOp
from engine.ir.graph import Graph, Value
from engine.ir.ops import Attention, Expand, Reshape, ShapeTensor, Slice
from engine.passes.editor import Editor
from engine.passes.operands import Operands
from engine.passes.simplify import simplified
from engine.passes.terms import Reduction, Terms
from engine.passes.traits import Traits

_MASKED = -1e4
_LARGEST = 4096  # rows of a constant that are compared with a band


@dataclass(frozen=True)
class Band:
    """The keys from `before` positions in front of the query to `after` behind it; None: all on that side."""

    before: int | None = None
    after: int | None = None

    def within(self, other: Band) -> Band:
        """What both show."""
        return Band(_least(self.before, other.before), _least(self.after, other.after))

    def of(self, op: Attention, traits: Traits) -> Attention | None:
        """The operator that hides the same without its bias; None where there is none."""
        before, after = self.before, self.after
        if before is not None and before < 0:
            return None
        if after == 0:
            causal, window = True, before
        elif before == after or (op.causal and after is None):
            causal, window = op.causal, before
        else:
            return None
        if window is not None and not traits.windows:
            return None
        sizes = [size for size in (op.window, None if window is None else window + 1) if size is not None]
        return replace(op, causal=op.causal or causal, window=min(sizes, default=None), has_bias=False)


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def recognise_causal(graph: Graph, traits: Traits) -> None:
    """Drop the bias of every attention where `causal` and `window` say the same."""
    if not any(isinstance(node.op, Attention) and node.op.has_bias for node in graph.nodes):
        return
    editor = Editor(graph)
    terms = Terms(editor)
    known: dict[Value, Band | None] = {}
    for node in editor.nodes():
        op = node.op
        if not isinstance(op, Attention) or not op.has_bias or node.inputs[0].shape[-2] != node.inputs[1].shape[-2]:
            continue
        bias = node.inputs[3]
        if bias not in known:
            known[bias] = _band_of(editor, terms, bias)
        band = known[bias]
        made = None if band is None else band.of(op, traits)
        if made is not None:
            operands = Operands(node.inputs[:3])
            stores = tuple(operands.adopt(store, node) for store in op.stores)
            editor.update(node, replace(made, stores=stores), operands.inputs)
            editor.prune([bias])
    editor.finish()


def _band_of(editor: Editor, terms: Terms, bias: Value) -> Band | None:
    data = _constant_corner(editor, bias)
    if data is not None:
        return _band_of_constant(data)
    return _Reader(editor, terms).bias(terms.of(bias))


def _constant_corner(editor: Editor, value: Value) -> np.ndarray | None:
    """The square constant of which `value` is the top left corner, as a matrix."""
    for _ in range(4):
        if value.data is not None:
            data = value.data
            square = data.ndim >= 2 and data.shape[-1] == data.shape[-2] and data.size == data.shape[-1] ** 2
            return data.reshape(data.shape[-2:]) if square else None
        node = editor.producer(value)
        if node is None:
            return None
        is_corner = isinstance(node.op, Slice) and not any(node.op.starts) and all(step == 1 for step in node.op.steps)
        is_unsqueezed = isinstance(node.op, Reshape) and node.op.shape[-2:] == node.inputs[0].shape[-2:]
        if not (is_corner or is_unsqueezed or isinstance(node.op, Expand)):
            return None
        value = node.inputs[0]
    return None


def _band_of_constant(data: np.ndarray) -> Band | None:
    size = len(data)
    if size < 2 or size > _LARGEST:
        return None
    seen = data == 0
    if not np.all(seen | (data <= _MASKED)) or not seen[0, 0]:
        return None
    before, after = (int(np.count_nonzero(line)) - 1 for line in (seen[:, 0], seen[0]))
    band = np.tri(size, k=after, dtype=np.bool_) & ~np.tri(size, k=-before - 1, dtype=np.bool_)
    if not np.array_equal(seen, band):
        return None
    return Band(None if before == size - 1 else before, None if after == size - 1 else after)


class _Reader:
    """Reads a band from an expression over ranges of positions."""

    def __init__(self, editor: Editor, terms: Terms) -> None:
        self._editor = editor
        self._terms = terms

    def bias(self, e: Expr) -> Band | None:
        """What a bias shows: where(seen, 0, masked), where(hidden, masked, 0), or a sum of such."""
        e = simplified(e)
        if not isinstance(e, Apply):
            return None
        if e.op is PointOp.ADD:
            return _both(*(self.bias(arg) for arg in e.args))
        if e.op is PointOp.CAST and e.dtype.is_float:
            return self.bias(e.args[0])
        if e.op is not PointOp.WHERE:
            return None
        condition, chosen, other = e.args
        if _is_open(chosen) and _is_masked(other):
            return self._condition(condition, seen=True)
        if _is_masked(chosen) and _is_open(other):
            return self._condition(condition, seen=False)
        return None

    def _condition(self, e: Expr, seen: bool) -> Band | None:
        """The keys for which `e` is `seen`."""
        if not isinstance(e, Apply):
            return None
        if e.op is PointOp.NOT:
            return self._condition(e.args[0], not seen)
        if e.op is (PointOp.AND if seen else PointOp.OR):
            return _both(*(self._condition(arg, seen) for arg in e.args))
        if e.op not in (PointOp.LE, PointOp.LT):
            return None
        left, right = e.args
        if not seen:  # not a ≤ b is b < a
            left, right = right, left
        limit = 0 if (e.op is PointOp.LE) == seen else -1
        if isinstance(left, Apply) and left.op is PointOp.ABS:
            return _both(*(self._at_most(left.args[0], right, sign, limit) for sign in (1, -1)))
        return self._at_most(left, right, 1, limit)

    def _at_most(self, left: Expr, right: Expr, sign: int, limit: int) -> Band | None:
        """The keys for which sign · left − right ≤ limit."""
        a, b = self._line(left), self._line(right)
        if a is None or b is None:
            return None
        key, query, constant = (sign * x - y for x, y in zip(a, b, strict=True))
        match key, query:
            case 1, -1:
                return Band(after=limit - constant)
            case -1, 1:
                return Band(before=limit - constant)
            case 0, 0 if constant <= limit:
                return Band()
        return None

    def _line(self, e: Expr) -> tuple[int, int, int] | None:
        """(a, b, c) where `e` is a · key + b · query + c."""
        if not (e.dtype.is_float or (e.dtype.is_signed and e.dtype.itemsize >= 4)):  # a difference would wrap around
            return None
        if isinstance(e, Const):
            return (0, 0, int(e.value)) if isfinite(e.value) and e.value == int(e.value) else None
        if isinstance(e, Apply):
            parts = [self._line(arg) for arg in e.args]
            match e.op, parts:
                case PointOp.CAST, [(a, b, c)]:
                    return a, b, c
                case PointOp.NEG, [(a, b, c)]:
                    return -a, -b, -c
                case PointOp.ADD, [(a, b, c), (i, j, k)]:
                    return a + i, b + j, c + k
                case PointOp.SUB, [(a, b, c), (i, j, k)]:
                    return a - i, b - j, c - k
            return None
        position = self._position(self._terms.leaf(e))
        return None if position is None else _POSITIONS[position]

    def _position(self, value: Value | Reduction | None) -> str | None:
        """ "key" or "query" for a value that is a range of positions along the last axis, or the one before it."""
        if not isinstance(value, Value):
            return None
        shape = value.shape
        source = self._editor.producer(value)
        while source is not None and isinstance(source.op, Reshape):
            source = self._editor.producer(source.inputs[0])
        if source is None or not isinstance(source.op, ShapeTensor) or source.op.values is not None:
            return None
        (size,) = source.op.shape
        if shape[-1:] == (size,) and all(dim == 1 for dim in shape[:-1]):
            return "key"
        return "query" if shape[-2:] == (size, 1) and all(dim == 1 for dim in shape[:-2]) else None


_POSITIONS = {"key": (1, 0, 0), "query": (0, 1, 0)}


def _both(*bands: Band | None) -> Band | None:
    """What all of them show."""
    found = Band()
    for band in bands:
        if band is None:
            return None
        found = found.within(band)
    return found


def _is_open(e: Expr) -> bool:
    return isinstance(e, Const) and e.value == 0


def _is_masked(e: Expr) -> bool:
    return isinstance(e, Const) and e.value <= _MASKED
