"""The passes on chains of point-wise nodes: scalars into expressions, broadcasts out of the way, chains into one node.

A producer is fused into its reader where nothing is computed or read twice for it: it has that one reader and the
reader's shape. Cheap producers (a cast, a scale) of tensors that no other fusion wants are recomputed in every reader.
"""

from __future__ import annotations

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node, Value
from engine.ir.ops import Expand, Pointwise, Slice, View
from engine.passes.editor import Editor, joined_origin
from engine.passes.operands import (
    FUSED_OPS,
    Operands,
    alike,
    fixed_operands,
    gathers_of,
    stores_of,
    with_expressions,
    with_same_shape,
)
from engine.passes.simplify import simplified
from engine.passes.traits import Traits
from engine.passes.views import reshape, view

_LONGEST = 64  # distinct operations of one expression: longer ones gain nothing and cost compile time
_MOST_INPUTS = 16
_LARGEST_UNIFORM = 1 << 16  # elements of a constant that are compared with each other
_CHEAP = 2  # arithmetic operations that may be repeated for every element of a broadcast or for every reader
_COSTLY = ex.UNARY_FLOAT | {ex.PointOp.DIV, ex.PointOp.POW, ex.PointOp.MOD, ex.PointOp.FMOD}


def inline_literals(graph: Graph, _traits: Traits) -> None:
    """Constants of one element, or with all elements equal, become literals of the expressions that read them."""
    editor = Editor(graph)
    uniform: dict[Value, ex.Const | None] = {}
    for node in editor.nodes():
        if isinstance(node.op, (Pointwise, *FUSED_OPS)) and not gathers_of(node.op):
            for value in node.inputs:
                if value not in uniform:
                    uniform[value] = _uniform(value)
            if any(uniform[value] is not None for value in node.inputs):
                _inline_literals(editor, node, uniform)
    editor.finish()


def _uniform(value: Value) -> ex.Const | None:
    data = value.data
    if data is None or value.dtype is DType.STRING or not 0 < data.size <= _LARGEST_UNIFORM:
        return None
    first = data.reshape(-1)[0]
    return ex.const(first.item(), value.dtype) if data.size == 1 or bool(np.all(data == first)) else None


def _inline_literals(editor: Editor, node: Node, uniform: dict[Value, ex.Const | None]) -> None:
    op = node.op
    given: dict[Value, ex.Expr] = {value: found for value in node.inputs if (found := uniform[value]) is not None}
    operands = Operands(node.inputs[: fixed_operands(op)])
    source: ex.Expr | None = getattr(op, "source", None)
    source = None if source is None else simplified(operands.adopt(source, node, given))
    stores = tuple(simplified(operands.adopt(store, node, given)) for store in stores_of(op))
    shaping = stores if isinstance(op, Pointwise) else (source,) if source is not None else ()
    # A prologue, or a point-wise node, takes its shape from the arguments it reads: it must keep one, and the shape.
    if any(not ex.arguments(e) for e in shaping):
        return
    new = with_expressions(op, stores, source)
    if with_same_shape(new, operands.inputs, node):
        editor.update(node, new, operands.inputs)


def drop_expands(graph: Graph, _traits: Traits) -> None:
    """Point-wise nodes read what was expanded, not the expansion; where that makes them smaller, it comes after."""
    editor = Editor(graph)
    for node in editor.nodes():
        if isinstance(node.op, Pointwise) and not node.op.gathers and len(node.outputs) == 1:
            _drop_expands(editor, node)
    editor.finish()


def _drop_expands(editor: Editor, node: Node) -> None:
    inputs = tuple(_before_expand(editor, value) for value in node.inputs)
    if inputs == node.inputs:
        return
    ((_, shape),) = node.op.infer(inputs)
    old = node.output
    if shape == old.shape:
        editor.update(node, inputs=inputs)
        return
    smaller = editor.add(node.op, inputs, old.name, node.origin).output
    editor.redirect(old, view(editor, Expand(old.shape), smaller, node.origin))
    editor.remove(node)


def _before_expand(editor: Editor, value: Value) -> Value:
    node = editor.producer(value)
    return node.inputs[0] if node is not None and isinstance(node.op, Expand) else value


def hoist_slices(graph: Graph, _traits: Traits) -> None:
    """Slices of constants that a point-wise node reads move behind it, so that it can be folded (causal masks)."""
    editor = Editor(graph)
    for node in editor.nodes():
        if isinstance(node.op, Pointwise) and not node.op.gathers and len(node.outputs) == 1:
            _hoist_slice(editor, node)
    editor.finish()


def _hoist_slice(editor: Editor, node: Node) -> None:
    if len(node.inputs) != 1:
        return
    before = editor.producer(node.inputs[0])
    slices: list[Node] = []
    while before is not None and isinstance(before.op, View) and not isinstance(before.op, Expand):
        slices.insert(0, before)
        before = editor.producer(before.inputs[0])
    if not slices or not slices[0].inputs[0].is_constant or not any(isinstance(s.op, Slice) for s in slices):
        return
    value = editor.add(node.op, (slices[0].inputs[0],), node.output.name, node.origin).output
    for step in slices:
        assert isinstance(step.op, View)
        value = view(editor, step.op, value, step.origin)
    editor.redirect(node.output, reshape(editor, value, node.output.shape, node.origin))
    editor.remove(node)


def fuse_pointwise(graph: Graph, _traits: Traits) -> None:
    """Fuse chains and diamonds of point-wise nodes, in topological order."""
    editor = Editor(graph)
    for node in editor.nodes():
        if editor.alive(node) and isinstance(node.op, Pointwise) and not node.op.gathers:
            while (producer := _fusable(editor, node)) is not None:
                _fuse(editor, producer, node)
    editor.finish()


def _fusable(editor: Editor, node: Node) -> Node | None:
    for value in node.inputs:
        producer = editor.producer(value)
        if (
            producer is not None
            and isinstance(producer.op, Pointwise)
            and not producer.op.gathers
            and len(producer.op.stores) == 1
            and not editor.is_output(value)
            and (_is_free(editor, producer, node) or _is_cheap(editor, producer))
            and _fits(producer, node)
        ):
            return producer
    return None


def _is_free(editor: Editor, producer: Node, node: Node) -> bool:
    return editor.only_user(producer.output) is node and alike(producer.output.shape, node.outputs[0].shape)


def _is_cheap(editor: Editor, producer: Node) -> bool:
    """Few operations on one tensor that is no result of an operator with an epilogue, for all readers to repeat."""
    op = producer.op
    assert isinstance(op, Pointwise)
    if ex.flops(*op.stores) > _CHEAP or any(isinstance(e, ex.Apply) and e.op in _COSTLY for e in ex.walk(*op.stores)):
        return False
    computed = [value for value in producer.inputs if not value.is_constant]
    origins = [editor.producer(value) for value in computed]
    if len(computed) > 1 or any(o is not None and isinstance(o.op, FUSED_OPS) for o in origins):
        return False
    return all(isinstance(user.op, Pointwise) and not user.op.gathers for user in editor.users(producer.output))


def _fits(producer: Node, node: Node) -> bool:
    if len(dict.fromkeys((*producer.inputs, *node.inputs))) > _MOST_INPUTS:
        return False
    return sum(1 for _ in ex.walk(*stores_of(producer.op), *stores_of(node.op))) <= _LONGEST


def _fuse(editor: Editor, producer: Node, node: Node) -> None:
    operands = Operands()
    inner = operands.adopt(stores_of(producer.op)[0], producer)
    stores = tuple(operands.adopt(store, node, {producer.output: inner}) for store in stores_of(node.op))
    value = producer.output
    editor.update(node, with_expressions(node.op, stores), operands.inputs, origin=joined_origin(producer, node))
    editor.prune([value])
