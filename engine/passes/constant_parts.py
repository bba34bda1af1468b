"""The pass `select_constant_parts`: a constant among the parts of a concatenation (the class token before the patches)
is never stored; the point-wise node that reads the whole selects it instead.

Storing it would take a step of its own in every run, for intermediates share their memory. Its place stays in the
concatenation, undefined, so that the other parts are written where they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from engine.ir import expr as ex
from engine.ir.expr import PointOp
from engine.ir.graph import Graph, Node, Value, constant
from engine.ir.ops import Concat, Expand, Pointwise, Undefined
from engine.passes.editor import Editor
from engine.passes.operands import Operands, stores_of, with_expressions
from engine.passes.traits import Traits

_MOST = 4  # constants that are selected from, one comparison each


@dataclass(frozen=True)
class _Part:
    """Part number `index`, which lies at `start` along the axis and is `content` (of size 1 there), broadcast."""

    index: int
    start: int
    content: Value


def select_constant_parts(graph: Graph, _traits: Traits) -> None:
    """Rewrite every concatenation with constant parts that one point-wise node alone reads."""
    editor = Editor(graph)
    for node in editor.nodes():
        user = editor.only_user(node.output) if isinstance(node.op, Concat) and len(node.inputs) > 1 else None
        if user is None or not isinstance(user.op, Pointwise) or user.op.gathers:
            continue
        parts = _constant_parts(editor, node)
        if 0 < len(parts) <= min(_MOST, len(node.inputs) - 1):
            _select(editor, node, user, parts)
    editor.finish()


def _constant_parts(editor: Editor, node: Node) -> list[_Part]:
    """The constants, each one row along the axis; none where the places of the rows depend on a symbol."""
    op = node.op
    assert isinstance(op, Concat)
    sizes = [value.shape[op.axis] for value in node.inputs]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes):
        return []
    starts = [0, *accumulate(known)]
    parts = []
    for i, value in enumerate(node.inputs):
        before = editor.producer(value)
        source = before.inputs[0] if before is not None and isinstance(before.op, Expand) else value
        if source.is_constant and known[i] == 1:
            parts.append(_Part(i, starts[i], source))
    return parts


def _select(editor: Editor, node: Node, user: Node, parts: list[_Part]) -> None:
    op, old = node.op, node.output
    assert isinstance(op, Concat)
    like = next(value for i, value in enumerate(node.inputs) if i not in {part.index for part in parts})
    inputs = list(node.inputs)
    for part in parts:
        inputs[part.index] = editor.add(Undefined(inputs[part.index].shape), (like,), old.name, node.origin).output
    whole = editor.add(op, inputs, old.name, node.origin).output
    operands = Operands()
    selected = operands.arg(whole)
    rows = np.arange(int(str(old.shape[op.axis]))).reshape(-1, *[1] * (old.rank - op.axis - 1))
    for part in parts:
        is_part = operands.arg(constant(f"{old.name}.is_part", rows == part.start))
        selected = ex.apply(PointOp.WHERE, is_part, operands.arg(part.content), selected)
    stores = tuple(operands.adopt(store, user, {old: selected}) for store in stores_of(user.op))
    editor.update(user, with_expressions(user.op, stores), operands.inputs)
    editor.prune([old])
