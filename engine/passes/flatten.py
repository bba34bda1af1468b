"""The passes that move views out of the way of products and epilogues.

`flatten_gemms`: a product does not care how its rows are grouped, so a reshape of the rows before it goes behind it,
where it meets the exporter's reshape back and both vanish. `sink_views`: a reshape or transposition between an operator
and the point-wise node after it goes behind the point-wise node, which can then become the operator's epilogue.
"""

from __future__ import annotations

from engine.ir.dim import Dim
from engine.ir.graph import Graph, Node, Shape, Value
from engine.ir.ops import Gemm, Pointwise, Reshape, Transpose, View
from engine.ir.regroup import axis_groups
from engine.passes.editor import Editor
from engine.passes.operands import FUSED_OPS, HEAVY_OPS
from engine.passes.traits import Traits
from engine.passes.views import inverse, reshape, transpose, view


def flatten_gemms(graph: Graph, _traits: Traits) -> None:
    """Gemm(Reshape(x), w) → Reshape(Gemm(x, w)) where the reshape only groups the rows in another way."""
    editor = Editor(graph)
    for node in editor.nodes():
        if isinstance(node.op, Gemm) and len(node.outputs) == 1 and node.inputs[1].rank == 2:
            _flatten(editor, node)
    editor.finish()


def _flatten(editor: Editor, node: Node) -> None:
    before = editor.producer(node.inputs[0])
    if before is None or not isinstance(before.op, Reshape):
        return
    x = before.inputs[0]
    if x.rank < 2 or x.shape[-1] != node.inputs[0].shape[-1]:
        return
    old = node.output
    shape = (*x.shape[:-1], old.shape[-1])
    extra = [undone(editor, value, Reshape(old.shape), shape, old.shape, node.origin) for value in node.inputs[2:]]
    known = [value for value in extra if value is not None]
    if len(known) < len(extra):
        return
    made = editor.add(node.op, (x, node.inputs[1], *known), old.name, node.origin).output
    editor.redirect(old, reshape(editor, made, old.shape, node.origin))
    editor.prune([old])


def sink_views(graph: Graph, _traits: Traits) -> None:
    """Pointwise(View(x), …) → View(Pointwise(x, …)), once per point-wise node and chain of views."""
    editor = Editor(graph)
    for node in editor.nodes():
        if not editor.alive(node) or not isinstance(node.op, Pointwise) or node.op.gathers or len(node.outputs) != 1:
            continue
        current: Node | None = node
        chain = _chain(editor, node)
        while current is not None and chain:
            current = _sink(editor, current, chain.pop(0))
    editor.finish()


def _chain(editor: Editor, node: Node) -> list[Node]:
    """The views, last one first, between an operator worth reaching and this node; [] where there is none."""
    best: list[Node] = []
    for value in node.inputs:
        chain: list[Node] = []
        before = editor.producer(value)
        while before is not None and isinstance(before.op, Reshape | Transpose) and editor.single_use(before.output):
            chain.append(before)
            before = editor.producer(before.inputs[0])
        if not chain or before is None or value.shape != node.output.shape:
            continue
        if not editor.single_use(chain[-1].inputs[0]) or not isinstance(before.op, (*FUSED_OPS, Pointwise)):
            continue
        if isinstance(before.op, HEAVY_OPS):
            return chain
        # For a light operator it is not worth putting new views on other tensors of full size.
        if all(_is_small(editor, other, value.shape) for other in node.inputs if other is not value):
            best = best or chain
    return best


def _is_small(editor: Editor, value: Value, shape: Shape) -> bool:
    """Whether a view of this operand costs nothing: a constant, a broadcast, or a view that may be undone."""
    before = editor.producer(value)
    return value.is_constant or value.shape != shape or (before is not None and isinstance(before.op, View))


def _sink(editor: Editor, node: Node, step: Node) -> Node | None:
    """Move one view behind `node`; the node that took its place, or None where its other operands do not allow it."""
    op, x, seen = step.op, step.inputs[0], step.output
    assert isinstance(op, View)
    inputs: list[Value] = []
    for value in node.inputs:
        new = x if value is seen else undone(editor, value, op, x.shape, seen.shape, node.origin)
        if new is None:
            editor.prune(inputs)
            return None
        inputs.append(new)
    old = node.output
    made = editor.add(node.op, inputs, old.name, node.origin)
    editor.redirect(old, view(editor, op, made.output, node.origin))
    editor.prune([old])
    return made


def undone(editor: Editor, value: Value, op: View, before: Shape, after: Shape, origin: str) -> Value | None:
    """What to read beside a tensor of shape `before` for `value` beside its view `op`, of shape `after`; or None."""
    if value.data is not None and value.data.size == 1:
        return value if value.rank <= len(before) else reshape(editor, value, (), origin)
    if isinstance(op, Transpose):
        full = reshape(editor, value, (*[1] * (len(after) - value.rank), *value.shape), origin)
        return transpose(editor, full, inverse(op.perm), origin)
    if value.shape == after:
        return reshape(editor, value, before, origin)
    padded = (*[1] * (len(after) - value.rank), *value.shape)
    regrouped = _regrouped(padded, before, after)
    return None if regrouped is None else reshape(editor, value, regrouped, origin)


def _regrouped(shape: Shape, before: Shape, after: Shape) -> Shape | None:
    """The shape that broadcasts against `before` as `shape` does against its reshape `after`.

    In each group of axes that the reshape leaves apart `shape` has to be all ones, or all of the group.
    """
    groups = axis_groups(before, after)
    if groups is None:
        return None
    result: list[Dim] = []
    for old, new in groups:
        part = shape[new.start : new.stop]
        if all(dim == 1 for dim in part):
            result += [1] * len(old)
        elif part == after[new.start : new.stop]:
            result += before[old.start : old.stop]
        else:
            return None
    return tuple(result)
