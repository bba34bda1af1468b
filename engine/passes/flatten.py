"""The passes that move views out of the way of products and epilogues.

`flatten_gemms`: a product does not care how its rows are grouped or in which order they come, so a reshape or a
transposition of the rows before it goes behind it, where it meets the exporter's own back and both vanish.
`spread_rows`: a product reads rows as they lie and writes them where they belong: a permutation of several axes of rows
before it (an image that becomes windows) goes behind it; where one is behind it (windows that become an image), the
product gets the axes of rows apart, and what is added to the image is its epilogue's.
`sink_views`: a reshape or transposition between an operator and the point-wise node after it goes behind the point-wise
node, which can then become the operator's epilogue.
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

_MOST_HOPS = 4  # reshapes there and back, a bias


def flatten_gemms(graph: Graph, _traits: Traits) -> None:
    """Views of the first operand that only group or permute rows go behind the product."""
    editor = Editor(graph)
    for node in editor.nodes():
        current: Node | None = node
        while current is not None:
            op = current.op
            if not isinstance(op, Gemm) or len(current.outputs) != 1 or current.inputs[1].rank != 2:
                break
            current = _regrouped_rows(editor, current) or _permuted_rows(editor, current)
    editor.finish()


def _regrouped_rows(editor: Editor, node: Node) -> Node | None:
    """Gemm(Reshape(x), w) → Reshape(Gemm(x', w)), with the rows grouped as in x. x' is x, its last axes made one where
    they are the columns (heads · head_dim)."""
    a = node.inputs[0]
    before = editor.producer(a)
    if before is None or not isinstance(before.op, Reshape):
        return None
    x = before.inputs[0]
    first = _first_of_columns(x.shape, a.shape)
    if first is None or x.shape[:first] == a.shape[:-1]:
        return None
    rows = x.shape[:first]
    return _moved_behind(
        editor, node, Reshape(node.output.shape), reshape(editor, x, (*rows, a.shape[-1]), before.origin),
        (*rows, node.output.shape[-1]),
    )  # fmt: skip


def _first_of_columns(before: Shape, after: Shape) -> int | None:
    """The first of the axes of `before` that a reshape to `after` makes the last axis, all rows being before it."""
    if len(before) >= 2 and before[-1] == after[-1]:
        return len(before) - 1
    for old, new in axis_groups(before, after) or ():
        if new.stop == len(after) and len(new) == 1 and old.start >= 1 and old.stop == len(before):
            return old.start
    return None


def _permuted_rows(editor: Editor, node: Node) -> Node | None:
    """Gemm(Transpose(x), w) → Transpose(Gemm(x, w)) where only rows change places; also where the heads are made the
    columns in between and the rows are put back later: they then stay in the order in which x has them.

    For two axes of rows only, batch and sequence, which exporters swap and swap back. With more of them (windows of an
    image) what comes behind the product may need the new order in memory.
    """
    a = node.inputs[0]
    merge = editor.producer(a)
    if merge is None or a.rank != 3:
        return None
    if isinstance(merge.op, Transpose):
        perm, x = merge.op.perm, merge.inputs[0]
        if perm[-1] != len(perm) - 1:
            return None
        return _moved_behind(editor, node, Transpose(perm), x, (*x.shape[:-1], node.output.shape[-1]))
    before = editor.producer(merge.inputs[0])
    if not isinstance(merge.op, Reshape) or before is None or not isinstance(before.op, Transpose):
        return None
    count, perm = a.rank - 1, before.op.perm
    rows = perm[:count]
    if before.output.shape[:count] != a.shape[:-1] or list(rows) == sorted(rows) or not _is_swapped(editor, node):
        return None
    ordered = transpose(editor, before.inputs[0], (*sorted(rows), *perm[count:]), before.origin)
    x = reshape(editor, ordered, (*ordered.shape[:count], a.shape[-1]), merge.origin)
    swap = Transpose((1, 0, 2))
    return _moved_behind(editor, node, swap, x, (*x.shape[:-1], node.output.shape[-1]))


def _is_swapped(editor: Editor, node: Node) -> bool:
    """Whether the two axes of rows of a product are swapped behind it, before anything else than a bias is added."""
    value = node.output
    for _ in range(_MOST_HOPS):
        user = editor.only_user(value)
        if user is None:
            return False
        if isinstance(user.op, Transpose):
            return value.shape == node.output.shape and user.op.perm == (1, 0, 2)
        is_bias = isinstance(user.op, Pointwise) and sum(not operand.is_constant for operand in user.inputs) == 1
        if not (is_bias or isinstance(user.op, Reshape)) or len(user.outputs) > 1:
            return False
        value = user.output
    return False


def _moved_behind(editor: Editor, node: Node, op: Reshape | Transpose, x: Value, shape: Shape) -> Node | None:
    """The product of `x`, of shape `shape`, with `op` behind it in the place of `node`; None where other operands do
    not allow it."""
    old = node.output
    extra = [undone(editor, value, op, shape, old.shape, node.origin) for value in node.inputs[2:]]
    known = [value for value in extra if value is not None]
    if len(known) < len(extra):
        editor.prune([x, *known])
        return None
    made = editor.add(node.op, (x, node.inputs[1], *known), old.name, node.origin)
    editor.redirect(old, view(editor, op, made.output, node.origin))
    editor.prune([old])
    return made


def spread_rows(graph: Graph, traits: Traits) -> None:
    """Gemm(Transpose(x), w) → Transpose(Gemm(x, w)), and Reshape(Transpose(Reshape(Gemm(a, w)))) →
    Reshape(Transpose(Gemm(Reshape(a), w))), both of rows only."""
    if not traits.permuted_rows:
        return
    editor = Editor(graph)
    for node in editor.nodes():
        if isinstance(node.op, Gemm) and len(node.outputs) == 1 and node.inputs[1].rank == 2:
            before = editor.producer(node.inputs[0])
            if node.output.rank > 3 and before is not None and isinstance(before.op, Transpose):
                _read_as_it_lies(editor, node, before.op, before.inputs[0])
            else:
                _spread(editor, node)
    editor.finish()


def _read_as_it_lies(editor: Editor, node: Node, turn: Transpose, x: Value) -> None:
    if turn.perm[-1] == x.rank - 1 and not editor.is_output(node.output):
        _moved_behind(editor, node, turn, x, (*x.shape[:-1], node.output.shape[-1]))


def _spread(editor: Editor, node: Node) -> None:
    old = node.output
    split = editor.only_user(old)
    turn = editor.only_user(split.output) if split is not None and isinstance(split.op, Reshape) else None
    if split is None or turn is None or not isinstance(turn.op, Transpose) or editor.is_output(old):
        return
    apart, last = split.output.shape, split.output.rank - 1
    back = editor.only_user(turn.output)
    if apart[-1] != old.shape[-1] or turn.op.perm[-1] != last or back is None or not isinstance(back.op, Reshape):
        return
    extra: list[Value] = []
    for value in node.inputs[2:]:
        if value.shape == old.shape:
            extra.append(reshape(editor, value, apart, node.origin))
        elif all(dim == 1 for dim in value.shape[:-1]):
            extra.append(value)
        else:
            editor.prune(extra)
            return
    a = reshape(editor, node.inputs[0], (*apart[:-1], node.inputs[0].shape[-1]), node.origin)
    made = editor.add(node.op, (a, node.inputs[1], *extra), old.name, node.origin)
    editor.redirect(split.output, made.output)
    editor.prune([split.output, old])
    for user in editor.users(back.output):
        if isinstance(user.op, Pointwise) and not user.op.gathers and len(user.outputs) == 1:
            _sink_all(editor, user)
            return


def sink_views(graph: Graph, _traits: Traits) -> None:
    """Pointwise(View(x), …) → View(Pointwise(x, …)), once per point-wise node and chain of views."""
    editor = Editor(graph)
    for node in editor.nodes():
        if not editor.alive(node) or not isinstance(node.op, Pointwise) or node.op.gathers or len(node.outputs) != 1:
            continue
        _sink_all(editor, node)
    editor.finish()


def _sink_all(editor: Editor, node: Node) -> None:
    """Move the views between an operator and a point-wise node behind the latter."""
    current: Node | None = node
    chain = _chain(editor, node)
    while current is not None and chain:
        current = _sink(editor, current, chain.pop(0))


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
