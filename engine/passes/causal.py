"""The pass `recognise_causal`: an attention bias that only hides later keys becomes `causal`, and is never read.

The bias has to be nothing else: 0 for keys up to the query's position and a large negative number after it, from a
triangular constant (sliced to the sequence) or from a comparison of two ranges of positions.
"""

from __future__ import annotations

from dataclasses import replace

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
_LARGEST = 4096  # rows of a constant that are compared with a triangle


def recognise_causal(graph: Graph, _traits: Traits) -> None:
    """Drop the bias of every attention where `causal` says the same."""
    if not any(isinstance(node.op, Attention) and node.op.has_bias for node in graph.nodes):
        return
    editor = Editor(graph)
    terms = Terms(editor)
    known: dict[Value, bool] = {}
    for node in editor.nodes():
        op = node.op
        if not isinstance(op, Attention) or not op.has_bias or node.inputs[0].shape[-2] != node.inputs[1].shape[-2]:
            continue
        bias = node.inputs[3]
        if bias not in known:
            known[bias] = _is_causal(editor, terms, bias)
        if known[bias]:
            operands = Operands(node.inputs[:3])
            stores = tuple(operands.adopt(store, node) for store in op.stores)
            editor.update(node, replace(op, causal=True, has_bias=False, stores=stores), operands.inputs)
            editor.prune([bias])
    editor.finish()


def _is_causal(editor: Editor, terms: Terms, bias: Value) -> bool:
    data = _constant_corner(editor, bias)
    if data is not None:
        return _is_triangle(data)
    return _hides_later_keys(editor, terms, terms.of(bias))


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


def _is_triangle(data: np.ndarray) -> bool:
    size = len(data)
    if size < 2 or size > _LARGEST:
        return False
    later = np.triu(np.ones((size, size), np.bool_), 1)
    return bool(np.all(data[later] <= _MASKED) and not np.any(data[~later]))


def _hides_later_keys(editor: Editor, terms: Terms, e: Expr) -> bool:
    """where(key <= query, 0, masked), where(query < key, masked, 0), with positions from ranges."""
    e = simplified(e)
    if not isinstance(e, Apply) or e.op is not PointOp.WHERE:
        return False
    condition, chosen, other = e.args
    if not isinstance(condition, Apply) or condition.op not in (PointOp.LE, PointOp.LT):
        return False
    left, right = (_position(editor, terms.leaf(arg)) for arg in condition.args)
    if condition.op is PointOp.LE:
        return (left, right) == ("key", "query") and _is_open(chosen) and _is_masked(other)
    return (left, right) == ("query", "key") and _is_masked(chosen) and _is_open(other)


def _is_open(e: Expr) -> bool:
    return isinstance(e, Const) and e.value == 0


def _is_masked(e: Expr) -> bool:
    return isinstance(e, Const) and e.value <= _MASKED


def _position(editor: Editor, value: Value | Reduction | None) -> str | None:
    """ "key" or "query" for a value that is a range of positions along the last axis, or the one before it."""
    if not isinstance(value, Value):
        return None
    shape = value.shape
    source = editor.producer(value)
    while source is not None and isinstance(source.op, Reshape):
        source = editor.producer(source.inputs[0])
    if source is None or not isinstance(source.op, ShapeTensor) or source.op.values is not None:
        return None
    (size,) = source.op.shape
    if shape[-1:] == (size,) and all(dim == 1 for dim in shape[:-1]):
        return "key"
    return "query" if shape[-2:] == (size, 1) and all(dim == 1 for dim in shape[:-2]) else None
