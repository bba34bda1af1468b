"""The pass `merge_siblings`: products of one input with constant weights become one wide product (Q, K, V above all).

Their epilogues have to be the same expression; constants in it that run along the columns are laid side by side, as the
weights are, and a product without a bias among some that have one gets zeros. The results are slices of the wide one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.ir import expr as ex
from engine.ir.expr import Expr, PointOp
from engine.ir.graph import Graph, Node, Value, constant
from engine.ir.ops import Gemm, Slice
from engine.passes.editor import Editor, joined_origin
from engine.passes.traits import Traits
from engine.passes.views import view


@dataclass(frozen=True)
class _Sibling:
    """A product. `store` numbers the constants it reads from 0; `rows` holds them, one number per column."""

    node: Node
    store: Expr
    columns: int
    rows: tuple[np.ndarray, ...]


def merge_siblings(graph: Graph, _traits: Traits) -> None:
    """Merge every group of siblings."""
    editor = Editor(graph)
    groups: dict[tuple[Value, Expr], list[_Sibling]] = {}
    for node in editor.nodes():
        found = _sibling(editor, node)
        if found is not None:
            groups.setdefault((node.inputs[0], found.store), []).append(found)
    for group in groups.values():
        if len(group) > 1:
            _merge(editor, group)
    editor.finish()


def _sibling(editor: Editor, node: Node) -> _Sibling | None:
    op = node.op
    if not isinstance(op, Gemm) or len(op.stores) != 1 or editor.is_output(node.output):
        return None
    a, weight = node.inputs[:2]
    columns = weight.shape[-1]
    if weight.data is None or weight.rank != 2 or a.is_constant or not isinstance(columns, int):
        return None
    rows: dict[int, int] = {}
    data: list[np.ndarray] = []
    for index in ex.arguments(*op.stores):
        constant = node.inputs[index].data
        if index < 2 or constant is None or constant.size not in (1, columns):
            return None
        if constant.size > 1 and constant.shape[-1] != columns:
            return None
        rows[index] = len(data)
        data.append(np.broadcast_to(constant.reshape(-1), (columns,)))
    store = ex.renumber(op.stores[0], rows)
    if isinstance(store, ex.Acc):
        data.append(np.zeros(columns, store.dtype.numpy))
        store = ex.apply(PointOp.ADD, store, ex.Arg(0, store.dtype))
    return _Sibling(node, store, columns, tuple(data))


def _merge(editor: Editor, group: list[_Sibling]) -> None:
    first = group[0]
    nodes = [sibling.node for sibling in group]
    origin = joined_origin(*nodes)
    weights = [data for node in nodes if (data := node.inputs[1].data) is not None]
    wide = constant(nodes[0].inputs[1].name, np.concatenate(weights, axis=1))
    rows = [np.concatenate(parts) for parts in zip(*(sibling.rows for sibling in group), strict=True)]
    store = ex.renumber(first.store, {i: i + 2 for i in range(len(rows))})
    if isinstance(first.node.op, Gemm) and not any(np.any(row) for row in rows) and _is_sum(first.store):
        store, rows = ex.Acc(first.store.args[0].dtype), []  # type: ignore[union-attr]
    constants = [constant(f"{wide.name}.{i}", row) for i, row in enumerate(rows)]
    result = editor.add(Gemm((store,)), (nodes[0].inputs[0], wide, *constants), nodes[0].output.name, origin).output
    start = 0
    for sibling in group:
        shape = sibling.node.output.shape
        part = Slice((*[0] * (len(shape) - 1), start), shape, (1,) * len(shape))
        editor.redirect(sibling.node.output, view(editor, part, result, origin))
        editor.remove(sibling.node)
        start += sibling.columns


def _is_sum(store: Expr) -> bool:
    """Whether the epilogue only adds a bias."""
    return isinstance(store, ex.Apply) and store.op is PointOp.ADD and isinstance(store.args[0], ex.Acc)
