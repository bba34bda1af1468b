"""Views: building them in merged form, and the pass `merge_views`, which leaves as few of them as the data flow allows.

`view` is how every pass makes a view: it looks at what it would be put on, merges with a view there, and returns the
source itself where nothing changes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.ir.dim import Dim
from engine.ir.graph import Graph, Node, Shape, Value
from engine.ir.ops import Concat, Expand, Gather, Pad, Reduce, Reshape, Slice, Transpose, View
from engine.ir.regroup import axis_groups
from engine.passes.editor import Editor
from engine.passes.traits import Traits


def reshape(editor: Editor, value: Value, shape: Shape, origin: str) -> Value:
    return view(editor, Reshape(shape), value, origin)


def transpose(editor: Editor, value: Value, perm: tuple[int, ...], origin: str) -> Value:
    return view(editor, Transpose(perm), value, origin)


def view(editor: Editor, op: View, value: Value, origin: str) -> Value:
    """`op` of `value`, merged with the view that makes `value` where two are as good as one."""
    merged, value = _merged(editor, op, value)
    if merged is None:
        return value
    for user in editor.users(value):
        if user.op == merged:
            return user.output
    return editor.add(merged, (value,), value.name, origin).output


def _merged(editor: Editor, op: View, value: Value) -> tuple[View | None, Value]:
    """The one view and its source that `op` of `value` comes to; no view where it comes to the source itself."""
    while True:
        op = _canonical(op, value.shape)
        ((_, shape),) = op.infer((value,))
        if not _changes(op, value.shape, shape):
            return None, value
        before = editor.producer(value)
        if before is None or not isinstance(before.op, View):
            return op, value
        joined = _compose(op, before.op)
        if joined is None:
            return op, value
        op, value = joined, before.inputs[0]


def _changes(op: View, before: Shape, after: Shape) -> bool:
    if before != after:
        return True
    if isinstance(op, Transpose):
        return op.perm != tuple(range(len(op.perm)))
    if isinstance(op, Slice):
        # The same size: nothing but the whole axis fits, read forwards or backwards.
        return any(step < 0 and size != 1 for step, size in zip(op.steps, op.sizes, strict=True)) or any(
            start != 0 and size == 0 for start, size in zip(op.starts, op.sizes, strict=True)
        )
    return False


def _canonical(op: View, shape: Shape) -> View:
    """A transposition that moves only axes of size 1, or an expansion that only adds axes, is a reshape."""
    if isinstance(op, Transpose):
        moved = [axis for axis in op.perm if shape[axis] != 1]
        if moved == sorted(moved) and op.perm != tuple(sorted(op.perm)):
            return Reshape(tuple(shape[axis] for axis in op.perm))
    if isinstance(op, Expand) and op.shape == (*[1] * (len(op.shape) - len(shape)), *shape):
        return Reshape(op.shape)
    return op


def _compose(op: View, before: View) -> View | None:
    """`op` after `before` as one view."""
    if isinstance(op, Reshape) and isinstance(before, Reshape):
        return op
    if isinstance(op, Transpose) and isinstance(before, Transpose):
        return Transpose(tuple(before.perm[axis] for axis in op.perm))
    if isinstance(op, Expand) and isinstance(before, Expand):
        return op
    if isinstance(op, Slice) and isinstance(before, Slice):
        starts = tuple(b + s * step for b, s, step in zip(before.starts, op.starts, before.steps, strict=True))
        steps = tuple(a * b for a, b in zip(op.steps, before.steps, strict=True))
        return Slice(starts, op.sizes, steps)
    return None


def merge_views(graph: Graph, _traits: Traits) -> None:
    """Merge and drop views, and write as views what moves data without need."""
    editor = Editor(graph)
    for node in editor.nodes():
        if not editor.alive(node):
            continue
        replacement = _replacement(editor, node)
        if replacement is not None and replacement is not node.output:
            editor.redirect(node.output, replacement)
            editor.prune([node.output])
    editor.finish()


def _replacement(editor: Editor, node: Node) -> Value | None:
    op = node.op
    if isinstance(op, View):
        return _simpler_view(editor, node, op)
    if isinstance(op, Concat):
        parts = [value for value in node.inputs if value.shape[op.axis] != 0]
        if len(parts) == 1:
            return parts[0]
    if isinstance(op, Pad) and not any(b or e for b, e in op.pads):
        return node.inputs[0]
    if isinstance(op, Gather):
        return _gather_as_slice(editor, node, op)
    return None


def _simpler_view(editor: Editor, node: Node, op: View) -> Value | None:
    source = node.inputs[0]
    before = editor.producer(source)
    if (
        isinstance(op, Reshape)
        and before is not None
        and isinstance(before.op, Reduce)
        and not before.op.keepdims
        and editor.single_use(source)
    ):
        kept = replace(before.op, keepdims=True)
        if all(op.shape == shape for _, shape in kept.infer(before.inputs)) and len(kept.stores) == 1:
            return editor.add(kept, before.inputs, node.output.name, before.origin).output
    if _merged(editor, op, source) != (op, source):
        return view(editor, op, source, node.origin)
    return _split_before_transposition(editor, node)


def _split_before_transposition(editor: Editor, node: Node) -> Value | None:
    """Reshape(Transpose(Reshape(x))) where the last only splits axes: Transpose(Reshape(x)), cut finely at once.

    So batch · heads, made one axis for the sake of a library, comes apart again without a copy.
    """
    op, middle = node.op, editor.producer(node.inputs[0])
    if not isinstance(op, Reshape) or middle is None or not isinstance(middle.op, Transpose):
        return None
    first = editor.producer(middle.inputs[0])
    parts = _splits(middle.output.shape, op.shape)
    if first is None or not isinstance(first.op, Reshape) or parts is None:
        return None
    back = inverse(middle.op.perm)
    fine = tuple(op.shape[i] for axis in back for i in parts[axis])
    starts = [sum(len(parts[other]) for other in back[:place]) for place in range(len(back))]
    perm = tuple(starts[middle.op.perm[axis]] + i for axis in range(len(parts)) for i in range(len(parts[axis])))
    split = view(editor, Reshape(fine), first.inputs[0], first.origin)
    return view(editor, Transpose(perm), split, node.origin)


def _splits(before: Shape, after: Shape) -> list[range] | None:
    """For every axis of `before` the axes of `after` that it is split into; None where the reshape does more."""
    groups = axis_groups(before, after)
    if groups is None or [list(old) for old, _ in groups] != [[axis] for axis in range(len(before))]:
        return None
    return [new for _, new in groups]


def _gather_as_slice(editor: Editor, node: Node, op: Gather) -> Value | None:
    """Gather with constant indices a, a + s, a + 2s … (one index above all) is a slice."""
    data, indices = node.inputs
    size: Dim = data.shape[op.axis]
    if indices.data is None or indices.rank > 1 or indices.data.size == 0:
        return None
    flat = indices.data.reshape(-1)
    steps = np.unique(np.diff(flat))
    if len(steps) > 1 or (len(steps) == 1 and steps[0] == 0) or (flat.min() < 0 <= flat.max()):
        return None
    start: Dim = int(flat[0]) if flat[0] >= 0 else size + int(flat[0])
    # Indices that are not known to lie inside stay a Gather: it is there that a bad one is reported.
    if isinstance(size, int) and not (-size <= flat.min() and flat.max() < size):
        return None
    step = int(steps[0]) if len(steps) else 1
    starts, sizes, strides = [0] * data.rank, list(data.shape), [1] * data.rank
    ranges = Slice(
        tuple(start if i == op.axis else s for i, s in enumerate(starts)),
        tuple(len(flat) if i == op.axis else s for i, s in enumerate(sizes)),
        tuple(step if i == op.axis else s for i, s in enumerate(strides)),
    )
    return reshape(editor, view(editor, ranges, data, node.origin), node.output.shape, node.origin)


def inverse(perm: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes `perm`."""
    return tuple(perm.index(axis) for axis in range(len(perm)))
