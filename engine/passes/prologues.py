"""The passes that bring point-wise nodes and embedding lookups into the operator after them.

`fuse_prologues`: what a norm, softmax or reduction is taken of becomes its `source`; where other nodes need that value
too (a residual sum before a norm), the norm stores it beside its own result. `fuse_gathers`: a lookup of rows of a
table becomes a gathered operand of the point-wise node or norm that reads it.
"""

from __future__ import annotations

from engine.ir import expr as ex
from engine.ir.graph import Graph, Node
from engine.ir.ops import Gather, Norm, Pointwise, Reduce, Softmax
from engine.ir.ops.light import iteration_shape
from engine.passes.editor import Editor, joined_origin
from engine.passes.operands import Operands, alike, gathers_of, stores_of, with_expressions
from engine.passes.simplify import simplified
from engine.passes.traits import Traits

_MOST_INPUTS = 12


def fuse_gathers(graph: Graph, _traits: Traits) -> None:
    """Lookups along axis 0 of a table move into the one norm or point-wise node that reads the rows."""
    editor = Editor(graph)
    for node in editor.nodes():
        if isinstance(node.op, Gather) and node.op.axis == 0 and editor.alive(node):
            user = editor.only_user(node.output)
            if user is not None and isinstance(user.op, Norm | Pointwise):
                _fuse_gather(editor, node, user)
    editor.finish()


def _fuse_gather(editor: Editor, node: Node, user: Node) -> None:
    table, index = node.inputs
    gathered = {by for _, by in gathers_of(user.op)}
    # A scalar index is no lookup but a slice; and what is an index here already cannot be looked up itself.
    if table.rank < 2 or index.rank < 1 or any(user.inputs[i] is node.output for i in gathered):
        return
    operands = Operands()
    stand_in = ex.Arg(operands.place(table, index), table.dtype)
    source = getattr(user.op, "source", None)
    given = {node.output: stand_in}
    source = None if source is None else operands.adopt(source, user, given)
    stores = tuple(operands.adopt(store, user, given) for store in stores_of(user.op))
    if len(operands.inputs) <= _MOST_INPUTS:
        op = with_expressions(user.op, stores, source, operands.gathers)
        editor.update(user, op, operands.inputs, origin=joined_origin(node, user))
        editor.remove(node)


def fuse_prologues(graph: Graph, _traits: Traits) -> None:
    """Point-wise nodes move into the source of the norm, softmax or reduction that reads them."""
    editor = Editor(graph)
    for node in editor.nodes():
        if isinstance(node.op, Norm | Softmax | Reduce) and editor.alive(node):
            for value in node.inputs:
                producer = editor.producer(value)
                if producer is not None and _fuse(editor, producer, node):
                    break
    editor.finish()


def _fuse(editor: Editor, producer: Node, node: Node) -> bool:
    op = node.op
    assert isinstance(op, Norm | Softmax | Reduce)
    if not isinstance(producer.op, Pointwise) or len(producer.op.stores) != 1:
        return False
    if producer.op.gathers and not isinstance(op, Norm):
        return False
    value = producer.output
    read = [i for i in ex.arguments(op.source) if node.inputs[i] is value]
    shape = iteration_shape("source", (op.source,), node.inputs, gathers_of(op))
    if not read or not alike(value.shape, shape) or read[0] in dict(gathers_of(op)):
        return False
    keeps = editor.only_user(value) is not node
    if keeps and (not isinstance(op, Norm) or len(op.stores) > 1 or not _reads_only_there(editor, producer, node)):
        return False
    operands = Operands()
    inner = operands.adopt(producer.op.stores[0], producer)
    source = simplified(operands.adopt(op.source, node, {value: inner}))
    stores = tuple(operands.adopt(store, node, {value: inner}) for store in op.stores)
    if len(operands.inputs) > _MOST_INPUTS:
        return False
    outputs = node.outputs
    editor.remove(producer)
    if keeps:
        stores, outputs = (*stores, inner), (*outputs, value)
    new = with_expressions(op, stores, source, operands.gathers)
    editor.update(node, new, operands.inputs, outputs, joined_origin(producer, node))
    return True


def _reads_only_there(editor: Editor, producer: Node, node: Node) -> bool:
    """Whether no input of `node` besides the value itself is computed from it: one node would wait for itself."""
    return not editor.depends([value for value in node.inputs if value is not producer.output], producer)
