"""The pass `merge_siblings`: products of one input with constant weights become one wide product (Q, K, V above all),
convolutions of one input and one geometry one wide convolution (the branches of a residual block).

Their epilogues have to be the same expression, up to a clamp around it (a ReLU in one branch, none in the other: the
limits become constants per column). Constants that run along the columns are laid side by side, as the weights are, and
a product without a bias among some that have one gets zeros. The results are slices of the wide one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.ir import expr as ex
from engine.ir.expr import Apply, Const, Expr, PointOp
from engine.ir.graph import Graph, Node, Value, constant
from engine.ir.ops import Concat, Conv, Gemm, Op, Slice, View
from engine.passes.editor import Editor, joined_origin
from engine.passes.operands import stores_of, with_expressions
from engine.passes.traits import Traits
from engine.passes.views import view

_ALIGNED = 8  # channels: a slice of a convolution's result begins where vectors of eight do


@dataclass(frozen=True)
class _Sibling:
    """A product. `store` numbers the constants it reads from 0; `rows` holds them, one number per column; `low` and
    `high` are the clamp around it."""

    node: Node
    store: Expr
    columns: int
    rows: tuple[np.ndarray, ...]
    low: float
    high: float


def merge_siblings(graph: Graph, _traits: Traits) -> None:
    """Merge every group of siblings."""
    editor = Editor(graph)
    groups: dict[Hashable, list[_Sibling]] = {}
    for node in editor.nodes():
        found = _sibling(editor, node)
        if found is not None:
            groups.setdefault((node.inputs[0], _geometry(node), found.store), []).append(found)
    for group in groups.values():
        if len(group) > 1:
            _merge(editor, group)
    editor.finish()


def has_sibling(editor: Editor, node: Node) -> bool:
    """Whether another product reads the same input in the same way: what it stores decides whether they merge."""
    if _columns(editor, node) is None:
        return False
    others = (user for user in editor.users(node.inputs[0]) if user is not node)
    return any(_columns(editor, other) is not None and _geometry(other) == _geometry(node) for other in others)


def _geometry(node: Node) -> Hashable:
    """What has to be equal beside the epilogue."""
    plain = with_expressions(node.op, ())
    return (plain, node.inputs[1].shape[2:]) if isinstance(plain, Conv) else plain


def _sibling(editor: Editor, node: Node) -> _Sibling | None:
    columns = _columns(editor, node)
    if columns is None or len(node.outputs) != 1 or editor.is_output(node.output):
        return None
    core, low, high = _unclamped(stores_of(node.op)[0])
    rows: dict[int, int] = {}
    data: list[np.ndarray] = []
    for index in ex.arguments(core):
        row = _row(node, index, columns)
        if row is None:
            return None
        rows[index] = len(data)
        data.append(row)
    store = ex.renumber(core, rows)
    if isinstance(store, ex.Acc):
        data.append(np.zeros(columns, store.dtype.numpy))
        store = ex.apply(PointOp.ADD, store, ex.Arg(0, store.dtype))
    return _Sibling(node, store, columns, tuple(data), low, high)


def _columns(editor: Editor, node: Node) -> int | None:
    """The columns (of a convolution: channels) of the result, where `node` is a product that may have siblings."""
    op = node.op
    if not isinstance(op, Gemm | Conv):
        return None
    x, weight = node.inputs[:2]
    if weight.data is None or x.is_constant:
        return None
    if isinstance(op, Gemm):
        return weight.data.shape[-1] if weight.rank == 2 else None
    channels = weight.data.shape[0]
    users = editor.users(node.outputs[0])
    # Where a convolution writes into a concatenation, or is reshaped, a slice of a wide result would have to be copied.
    moved = any(isinstance(user.op, Concat | View) for user in users)
    return None if op.groups != 1 or op.transposed or channels % _ALIGNED or moved else channels


def _row(node: Node, index: int, columns: int) -> np.ndarray | None:
    """Input `index`, of an epilogue, as one number per column; None where it is something else."""
    data = node.inputs[index].data
    if index < 2 or data is None or data.size not in (1, columns):
        return None
    # Along the columns: the last axis of a matrix, in an image the one before the spatial axes.
    axis = -1 if isinstance(node.op, Gemm) else 1 - node.outputs[0].rank
    if data.size > 1 and (data.ndim < -axis or data.shape[axis] != columns):
        return None
    return np.broadcast_to(data.reshape(-1), (columns,))


def _unclamped(e: Expr) -> tuple[Expr, float, float]:
    """(inner, low, high) where `e` is min(max(inner, low), high), or one of the two, or neither."""
    e, high = _limited(e, PointOp.MIN, np.inf)
    e, low = _limited(e, PointOp.MAX, -np.inf)
    return e, low, high


def _limited(e: Expr, kind: PointOp, without: float) -> tuple[Expr, float]:
    """(inner, limit) where `e` is kind(inner, limit)."""
    if not isinstance(e, Apply) or e.op is not kind or not e.dtype.is_float:
        return e, without
    inner, limit = e.args
    return (inner, float(limit.value)) if isinstance(limit, Const) else (e, without)


def _merge(editor: Editor, group: list[_Sibling]) -> None:
    nodes = [sibling.node for sibling in group]
    first = nodes[0]
    origin = joined_origin(*nodes)
    weights = [data for node in nodes if (data := node.inputs[1].data) is not None]
    wide = constant(first.inputs[1].name, np.concatenate(weights, axis=1 if isinstance(first.op, Gemm) else 0))
    store, rows = _joined_store(group)
    shape = (-1, *[1] * (first.output.rank - 2)) if isinstance(first.op, Conv) else (-1,)
    constants = [constant(f"{wide.name}.{i}", row.reshape(shape)) for i, row in enumerate(rows)]
    result = editor.add(
        with_expressions(first.op, (store,)), (first.inputs[0], wide, *constants), first.output.name, origin
    ).output
    start = 0
    for sibling in group:
        part = _part(first.op, sibling.node.output, start)
        editor.redirect(sibling.node.output, view(editor, part, result, origin))
        editor.remove(sibling.node)
        start += sibling.columns


def _joined_store(group: Sequence[_Sibling]) -> tuple[Expr, list[np.ndarray]]:
    """The epilogue of the wide product, and the constants that it reads, numbered from 2."""
    first = group[0]
    rows = [np.concatenate(parts) for parts in zip(*(sibling.rows for sibling in group), strict=True)]
    store = ex.renumber(first.store, {i: i + 2 for i in range(len(rows))})
    is_sum = isinstance(store, Apply) and store.op is PointOp.ADD and isinstance(store.args[0], ex.Acc)
    if is_sum and not any(np.any(row) for row in rows):
        store, rows = ex.Acc(store.dtype), []
    for kind, limits in (
        (PointOp.MAX, [sibling.low for sibling in group]),
        (PointOp.MIN, [sibling.high for sibling in group]),
    ):
        limit: Expr = ex.const(limits[0], store.dtype)
        if len(set(limits)) > 1:
            limit = ex.Arg(len(rows) + 2, store.dtype)
            per_column = [np.full(sibling.columns, at) for sibling, at in zip(group, limits, strict=True)]
            rows.append(np.concatenate(per_column).astype(store.dtype.numpy))
        if np.isfinite(limits).any():
            store = ex.apply(kind, store, limit)
    return store, rows


def _part(op: Op, value: Value, start: int) -> Slice:
    """The slice of the wide result that is `value`."""
    axis = value.rank - 1 if isinstance(op, Gemm) else 1
    starts = tuple(start if i == axis else 0 for i in range(value.rank))
    return Slice(starts, value.shape, (1,) * value.rank)
