"""Norms of packed rows whose results are only unpacked: they are taken of the rows where these are unpacked to, so that
the normalised rows are written once, padded, instead of written, read again and written. Of padded positions the norm
of the first row is computed and not used. Called by the pass `unpad`."""

from __future__ import annotations

from engine.ir import expr as ex
from engine.ir.dim import Dim, product
from engine.ir.graph import Graph, Node, Value
from engine.ir.ops import Norm, Pointwise, Reshape
from engine.passes.editor import Editor, joined_origin
from engine.passes.operands import Operands, alike
from engine.passes.traits import Traits


def unpack_in_norms(graph: Graph, traits: Traits) -> None:
    """Norms along the last axis move behind the only lookup of their rows, where the target says that pays."""
    if not traits.gathered_norms:
        return
    editor = Editor(graph)
    for node in editor.nodes():
        if isinstance(node.op, Pointwise) and len(node.op.gathers) == 1 and len(node.outputs) == 1:
            table, by = node.op.gathers[0]
            norm = _only_looked_up(editor, node.inputs[table], node)
            if norm is not None and node.inputs[by].rank >= 1:
                _move(editor, norm, node)
    editor.finish()


def _only_looked_up(editor: Editor, table: Value, user: Node) -> Node | None:
    """The norm whose one result, perhaps with its leading axes as one, is `table`, which only `user` reads."""
    if editor.only_user(table) is not user:
        return None
    producer = editor.producer(table)
    if producer is not None and isinstance(producer.op, Reshape):
        value = producer.inputs[0]
        if editor.only_user(value) is not producer:
            return None
        producer = editor.producer(value)
    if producer is None or not isinstance(producer.op, Norm) or producer.op.gathers or len(producer.outputs) != 1:
        return None
    shape = producer.output.shape
    rows_first = table.rank == 2 and table.shape == (product(shape[:-1]), shape[-1])
    return producer if rows_first and producer.op.axes == (len(shape) - 1,) else None


def _move(editor: Editor, norm: Node, lookup: Node) -> None:
    """`lookup`, a point-wise node, becomes the norm of the rows that it looks up."""
    op = norm.op
    assert isinstance(op, Norm)
    assert isinstance(lookup.op, Pointwise)
    table, index = lookup.op.gathers[0]
    by, shape = lookup.inputs[index], norm.output.shape
    if not alike(lookup.output.shape, (*by.shape, shape[-1])):
        return
    read = {norm.inputs[i] for i in ex.arguments(op.source, *op.stores)}
    if not all(_is_of_rows(value, shape) or _is_alike_in_rows(value, by.rank + 1) for value in read):
        return
    operands, rows = Operands(), _Rows(editor, product(shape[:-1]))

    def of_norm(leaf: ex.Expr) -> ex.Expr:
        if not isinstance(leaf, ex.Arg):
            return leaf
        value = norm.inputs[leaf.index]
        if _is_of_rows(value, shape):
            return ex.Arg(operands.place(rows.of(value, norm), by), leaf.dtype)
        return ex.Arg(operands.place(value), leaf.dtype)

    source, store = (ex.rewrite(e, of_norm) for e in (op.source, op.stores[0]))

    def of_lookup(leaf: ex.Expr) -> ex.Expr:
        if not isinstance(leaf, ex.Arg):
            return leaf
        return store if leaf.index == table else ex.Arg(operands.place(lookup.inputs[leaf.index]), leaf.dtype)

    stores = (ex.rewrite(lookup.op.stores[0], of_lookup),)
    moved = Norm(op.kind, (by.rank,), op.epsilon, source, operands.gathers, stores)
    editor.update(lookup, moved, operands.inputs, origin=joined_origin(norm, lookup))
    editor.prune([norm.output])


class _Rows:
    """Operands of the norm with their rows along one axis, as they are looked up."""

    def __init__(self, editor: Editor, count: Dim) -> None:
        self._editor, self._count = editor, count
        self._found: dict[Value, Value] = {}

    def of(self, value: Value, norm: Node) -> Value:
        if value.rank == 2:
            return value
        if value not in self._found:
            shape = (self._count, value.shape[-1])
            self._found[value] = self._editor.add(Reshape(shape), (value,), value.name, norm.origin).output
        return self._found[value]


def _is_of_rows(value: Value, shape: tuple[Dim, ...]) -> bool:
    """Whether it has every row of a tensor of `shape`, be it one number for each."""
    return value.rank == len(shape) and value.shape[:-1] == shape[:-1] and product(shape[:-1]) != 1


def _is_alike_in_rows(value: Value, rank: int) -> bool:
    """Whether it is the same for all rows."""
    return value.rank <= rank and all(dim == 1 for dim in value.shape[:-1])
