"""The pass `fold`: constant sub-graphs evaluated, identities and dead code removed, equal nodes and constants merged.

Folding may not inflate a model: a result larger than what it is made of and than `_LARGEST` bytes, or a broadcast of a
small constant above `_LARGEST_EXPANSION`, stays a node (a broadcast view costs nothing where it is, and megabytes as a
weight).
"""

from __future__ import annotations

from collections.abc import Hashable
from math import prod

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node, Value
from engine.ir.ops import Expand, Op, Opaque, Pointwise, Undefined
from engine.passes.editor import Editor
from engine.passes.evaluate import evaluate
from engine.passes.traits import Traits

_LARGEST = 64 << 20
_LARGEST_EXPANSION = 64 << 10
_ALONE = (Opaque, Undefined)  # a random number may differ from the next, and every gap has a place of its own


def fold(graph: Graph, _traits: Traits) -> None:
    """Evaluate what is constant, drop what is useless, merge what is equal; one sweep in topological order."""
    editor = Editor(graph)
    _merge_constants(editor)
    seen: dict[tuple[Op, tuple[int, ...]], Node] = {}
    for node in editor.nodes():
        if _fold_constant(editor, node) or _drop_identity(editor, node) or isinstance(node.op, _ALONE):
            continue
        key = (node.op, tuple(map(id, node.inputs)))
        twin = seen.setdefault(key, node)
        if twin is not node:
            for mine, theirs in zip(node.outputs, twin.outputs, strict=True):
                editor.redirect(mine, theirs)
            editor.remove(node)
    editor.finish()
    graph.remove_dead()


def _fold_constant(editor: Editor, node: Node) -> bool:
    if not all(value.is_constant for value in node.inputs) or not _may_grow(node):
        return False
    results = evaluate(node, [value.data for value in node.inputs if value.data is not None])
    if results is None:
        return False
    for value, data in zip(node.outputs, results, strict=True):
        editor.redirect(value, Value(value.name, value.dtype, data.shape, data=data))
    editor.remove(node)
    return True


def _may_grow(node: Node) -> bool:
    given = sum(value.data.nbytes for value in dict.fromkeys(node.inputs) if value.data is not None)
    largest = _LARGEST_EXPANSION if isinstance(node.op, Expand) else max(_LARGEST, given)
    for value in node.outputs:
        if value.dtype is DType.STRING:
            return False
        sizes = [dim for dim in value.shape if isinstance(dim, int)]
        if len(sizes) < value.rank or prod(sizes) * value.dtype.itemsize > largest:
            return False
    return True


def _drop_identity(editor: Editor, node: Node) -> bool:
    """A point-wise node that only hands its input on. Where that is a graph output, the plan writes the copy."""
    op = node.op
    if not isinstance(op, Pointwise) or op.gathers or len(op.stores) != 1 or not isinstance(op.stores[0], ex.Arg):
        return False
    source = node.inputs[op.stores[0].index]
    if source.shape != node.output.shape or source.dtype is not node.output.dtype:
        return False
    editor.redirect(node.output, source)
    editor.remove(node)
    return True


def _merge_constants(editor: Editor) -> None:
    """One value for constants with equal content, told apart by a sample before any large comparison."""
    seen: dict[Hashable, list[Value]] = {}
    for value in dict.fromkeys(v for node in editor.nodes() for v in node.inputs if v.data is not None):
        data = value.data
        if data is None or value.dtype is DType.STRING:
            continue
        flat = data.reshape(-1) if data.flags.c_contiguous else data[tuple(slice(0, 4) for _ in data.shape)].reshape(-1)
        sample = flat[:: max(1, flat.size // 16)][:32]
        for twin in seen.setdefault((value.dtype, value.shape, sample.tobytes()), []):
            if twin.data is not None and _equal_bytes(twin.data, data):
                editor.redirect(value, twin)
                break
        else:
            seen[value.dtype, value.shape, sample.tobytes()].append(value)


def _equal_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    if a is b:
        return True
    # Bytes, not values: 0.0 and -0.0 differ, and NaN equals itself.
    x, y = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (a, b))
    return np.array_equal(x, y)
