"""The pass `find_rolls`: what is cut in two and joined the other way round (`torch.roll`, the shifted windows of a
Swin) is one `Pad`, for several axes at once."""

from __future__ import annotations

from engine.ir.dim import Dim
from engine.ir.graph import Graph, Node, Value
from engine.ir.ops import Concat, Pad, PadMode, Slice
from engine.passes.editor import Editor
from engine.passes.traits import Traits

Pads = tuple[tuple[int, int], ...]


def find_rolls(graph: Graph, _traits: Traits) -> None:
    """Concat(x[k:], x[:k]) → Pad(x), and a roll of a roll along another axis → one."""
    editor = Editor(graph)
    for node in editor.nodes():
        if isinstance(node.op, Concat) and len(node.inputs) == 2 and editor.alive(node):
            _roll(editor, node, node.op.axis)
    editor.finish()


def _roll(editor: Editor, node: Node, axis: int) -> None:
    front, back = (_part(editor, value, axis) for value in node.inputs)
    if front is None or back is None or front[0] is not back[0]:
        return
    x, start, size = front
    _, begin, rest = back
    if begin != 0 or start != rest or size + rest != x.shape[axis] or not isinstance(size, int):
        return
    pads: Pads = tuple((size, -size) if i == axis else (0, 0) for i in range(x.rank))
    before = editor.producer(x)
    op = before.op if before is not None else None
    if before is not None and isinstance(op, Pad) and op.mode is PadMode.ROLL and op.pads[axis] == (0, 0):
        x, pads = before.inputs[0], tuple(a if any(a) else b for a, b in zip(op.pads, pads, strict=True))
    old = node.output
    made = editor.add(Pad(pads, PadMode.ROLL), (x,), old.name, node.origin)
    editor.redirect(old, made.output)
    editor.prune([old])


def _part(editor: Editor, value: Value, axis: int) -> tuple[Value, Dim, Dim] | None:
    """(Source, start, size) of a part along one axis that is whole along the others."""
    node = editor.producer(value)
    if node is None or not isinstance(node.op, Slice) or any(step != 1 for step in node.op.steps):
        return None
    x = node.inputs[0]
    whole = all(i == axis or size == x.shape[i] for i, size in enumerate(node.op.sizes))
    return (x, node.op.starts[axis], node.op.sizes[axis]) if whole else None
