"""Looking up by index, writing by index, and finding an index.

All gathers are one lookup along one axis; where the indices follow from their position (see `grid.py`), a view.
"""

from __future__ import annotations

import numpy as np

from engine.frontend import bounds, grid
from engine.frontend import formula as f
from engine.frontend.onnx_node import OnnxNode, source, store
from engine.frontend.operators.shape import positions
from engine.frontend.operators.slicing import concat, drop_axis, last, take
from engine.frontend.registry import Results, operator
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import Dim, Sym, product
from engine.ir.dtype import DType
from engine.ir.graph import Value


@operator("Gather")
def Gather(node: OnnxNode, data: Value, indices: Value) -> Value:
    axis = node.axis(node.integer("axis", 0), data.rank)
    if not indices.dtype.is_int:
        raise node.invalid(f"indices of type {indices.dtype.value}")
    known, size = node.known(indices), data.shape[axis]
    if known is not None and isinstance(size, int) and ((known < -size) | (known >= size)).any():
        raise node.invalid(f"an index out of range for an axis of {size}")
    return lookup(node, data, indices, axis)


def lookup(node: OnnxNode, data: Value, indices: Value, axis: int = 0) -> Value:
    """data.take(indices, axis); a view where the indices follow from their position."""
    before, size, after = data.shape[:axis], data.shape[axis], data.shape[axis + 1 :]
    pattern = node.builder.grid(indices)
    if isinstance(pattern, (int, Sym)) and not grid.depends_on(pattern):
        one = drop_axis(node, data, axis, last(size, pattern))
        apart = node.reshape(one, (*before, *(1,) * indices.rank, *after))
        return node.expand(apart, (*before, *indices.shape, *after))
    counted = grid.enumeration(pattern, indices.shape) if pattern is not None else None
    if counted is not None and bounds.at_least(counted[0], 0):
        first, count, axes = counted
        part = take(node, data, axis, first, count)
        spread = [dim if i in axes else 1 for i, dim in enumerate(indices.shape)]
        return node.expand(node.reshape(part, (*before, *spread, *after)), (*before, *indices.shape, *after))
    return node.add(ops.Gather(axis), data, indices)


def _wrapped(node: OnnxNode, indices: Value, size: Dim) -> Value:
    """Indices with those that count from the end made positive, as int64."""
    count = node.builder.sizes([size], ())
    whole = node.cast(indices, DType.I64)
    if isinstance(pattern := node.builder.grid(whole), (int, Sym)) and bounds.at_least(pattern, 0):
        return whole
    return node.pointwise(lambda i, n: f.where(f.less(i, 0), i + n, i), whole, count)


def _flat_index(node: OnnxNode, parts: list[tuple[Value, Dim]]) -> Value:
    """The sum of indices times their strides."""
    total: Value | None = None
    for index, stride in parts:
        scaled = index if stride == 1 else node.pointwise(lambda i, s: i * s, index, node.builder.sizes([stride], ()))
        total = scaled if total is None else node.pointwise(lambda a, b: a + b, total, scaled)
    assert total is not None
    return total


@operator("GatherElements")
def GatherElements(node: OnnxNode, data: Value, indices: Value) -> Value:
    """One lookup in the flattened data: the index along `axis`, and each element's own position along the others."""
    axis = node.axis(node.integer("axis", 0), data.rank)
    if indices.rank != data.rank or not data.rank:
        raise node.invalid(f"indices of rank {indices.rank} for data of rank {data.rank}")
    parts: list[tuple[Value, Dim]] = []
    for i in range(data.rank):
        stride = product(data.shape[i + 1 :])
        if i == axis:
            parts.append((_wrapped(node, indices, data.shape[i]), stride))
        elif indices.shape[i] != 1:
            parts.append((positions(node, indices.shape[i], i, data.rank), stride))
    return lookup(node, node.reshape(data, (product(data.shape),)), _flat_index(node, parts))


@operator("GatherND")
def GatherND(node: OnnxNode, data: Value, indices: Value) -> Value:
    """One lookup in the data with its leading axes flattened."""
    batch = node.integer("batch_dims", 0)
    depth = indices.shape[-1] if indices.rank else 0
    if not isinstance(depth, int) or not 1 <= depth <= data.rank - batch or not 0 <= batch < indices.rank:
        raise node.invalid(f"indices of shape {list(indices.shape)} for data of rank {data.rank}")
    parts: list[tuple[Value, Dim]] = []
    leading = batch + depth
    for i in range(leading):
        stride = product(data.shape[i + 1 : leading])
        if i < batch:
            parts.append((positions(node, data.shape[i], i, indices.rank - 1), stride))
        else:
            component = drop_axis(node, indices, indices.rank - 1, i - batch)
            parts.append((_wrapped(node, component, data.shape[i]), stride))
    flat = node.reshape(data, (product(data.shape[:leading]), *data.shape[leading:]))
    return lookup(node, flat, _flat_index(node, parts))


@operator("ScatterElements")
@operator("Scatter")  # its old name
def ScatterElements(node: OnnxNode, data: Value, indices: Value, updates: Value) -> Value:
    return _scatter(node, node.axis(node.integer("axis", 0), data.rank), data, indices, updates)


@operator("ScatterND")
def ScatterND(node: OnnxNode, data: Value, indices: Value, updates: Value) -> Value:
    return _scatter(node, None, data, indices, updates)


def _scatter(node: OnnxNode, axis: int | None, data: Value, indices: Value, updates: Value) -> Value:
    if not indices.dtype.is_int or updates.dtype is not data.dtype:
        raise node.invalid(f"indices of type {indices.dtype.value}, updates of {updates.dtype.value}")
    reduction = node.choice("reduction", "none", "add", "mul", "max", "min")
    kind = ops.ScatterKind.REPLACE if reduction == "none" else ops.ScatterKind(reduction)
    if kind is not ops.ScatterKind.REPLACE and not (data.dtype.is_float or data.dtype.is_int):
        raise node.invalid(f"reduction {reduction!r} of {data.dtype.value}")
    return node.add(ops.Scatter(axis, kind), data, indices, updates)


@operator("TensorScatter")
def TensorScatter(node: OnnxNode, cache: Value, update: Value, starts: Value | None = None) -> Value:
    """The rows of `update` along an axis of a cache, in every image of the batch from its own place on."""
    axis = node.axis(node.integer("axis", -2), cache.rank)
    circular = node.choice("mode", "linear", "circular") == "circular"
    if not axis or update.rank != cache.rank or update.dtype is not cache.dtype:
        raise node.invalid(f"axis {axis}, an update of rank {update.rank} and type {update.dtype.value}")
    batch, count = cache.shape[0], update.shape[axis]
    first = node.reshape(starts, (batch, 1)) if starts is not None else node.constant([[0]], DType.I64)
    line = node.pointwise(lambda i, s: i + s.cast(DType.I64), positions(node, count, 1, 2), first)
    if circular:
        size = node.builder.sizes([cache.shape[axis]], ())
        line = node.pointwise(lambda i, n: f.apply(ex.PointOp.MOD, i, n), line, size)
    # Scatter takes the axes that it selects from in front.
    perm = (0, axis, *(i for i in range(1, cache.rank) if i != axis))
    image = node.expand(positions(node, batch, 0, 2), (batch, count))
    places = [node.reshape(node.expand(index, (batch, count)), (batch, count, 1)) for index in (image, line)]
    whole, rows = node.transpose(cache, perm), node.transpose(update, perm)
    result = node.add(ops.Scatter(None), whole, concat(node, places, 2), rows)
    return node.transpose(result, [perm.index(i) for i in range(cache.rank)])


@operator("ReverseSequence")
def ReverseSequence(node: OnnxNode, x: Value, lengths: Value) -> Value:
    """Of every sequence the first elements, as many as its length, in the other order: a lookup of whole rows."""
    batch_axis, time_axis = node.integer("batch_axis", 1), node.integer("time_axis", 0)
    if {batch_axis, time_axis} != {0, 1} or x.rank < 2:
        raise node.invalid(f"batch_axis {batch_axis} and time_axis {time_axis} of a tensor of rank {x.rank}")
    steps = positions(node, x.shape[time_axis], time_axis, 2)
    own = positions(node, x.shape[batch_axis], batch_axis, 2)
    lengths = node.reshape(lengths, [x.shape[0] if batch_axis == 0 else 1, x.shape[1] if batch_axis == 1 else 1])
    inner = node.builder.sizes([x.shape[1]], ())

    def formula(t: f.Term, b: f.Term, length: f.Term, n: f.Term) -> f.Term:
        turned = f.where(f.less(t, length), length - 1 - t, t)
        return turned * n + b if time_axis == 0 else b * n + turned

    index = node.pointwise(formula, steps, own, node.cast(lengths, DType.I64), inner)
    return lookup(node, node.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:])), index)


@operator("TopK", since=10)
def TopK(node: OnnxNode, x: Value, k: Value) -> Results:
    (count,) = node.dims(k, "k")
    return _top_k(node, x, count, bool(node.integer("largest", 1)))


@operator("TopK")
def TopK_1(node: OnnxNode, x: Value) -> Results:
    return _top_k(node, x, node.integer("k"), True)


def _top_k(node: OnnxNode, x: Value, count: Dim, largest: bool) -> Results:
    """Sorted also where the model does not ask for it: any order is right then."""
    if not (x.dtype.is_float or x.dtype.is_int):
        raise node.invalid(f"elements of type {x.dtype.value}")
    return node.add_all(ops.TopK(node.axis(node.integer("axis", -1), x.rank), count, largest), x)


@operator("CumSum")
def CumSum(node: OnnxNode, x: Value, axis: Value) -> Value:
    return _running(node, x, axis, ops.RunningKind.SUM)


@operator("CumProd")
def CumProd(node: OnnxNode, x: Value, axis: Value) -> Value:
    return _running(node, x, axis, ops.RunningKind.PROD)


def _running(node: OnnxNode, x: Value, axis: Value, kind: ops.RunningKind) -> Value:
    over = node.axis(int(node.scalar(axis, "axis")), x.rank)
    if not (x.dtype.is_float or x.dtype.is_int):
        raise node.invalid(f"elements of type {x.dtype.value}")
    op = ops.Running(kind, over, bool(node.integer("exclusive", 0)), bool(node.integer("reverse", 0)))
    return node.add(op, x)


@operator("ArgMax")
def ArgMax(node: OnnxNode, x: Value) -> Value:
    return _position(node, x, ops.ReduceKind.MAX)


@operator("ArgMin")
def ArgMin(node: OnnxNode, x: Value) -> Value:
    return _position(node, x, ops.ReduceKind.MIN)


def _position(node: OnnxNode, x: Value, kind: ops.ReduceKind) -> Value:
    """The first (or last) position at which the extreme stands: two reductions."""
    axis = node.axis(node.integer("axis", 0), x.rank)
    best = node.add(ops.Reduce(kind, (axis,), True, source(x.dtype), store(x.dtype)), x)
    line = positions(node, x.shape[axis], axis, x.rank)
    final = bool(node.integer("select_last_index", 0))
    value, extreme, place = f.Term(ex.Arg(0, x.dtype)), f.Term(ex.Arg(1, x.dtype)), f.Term(ex.Arg(2, DType.I64))
    found = f.where(f.equal(value, extreme), place, -1 if final else int(np.iinfo(np.int64).max))
    pick = ops.ReduceKind.MAX if final else ops.ReduceKind.MIN
    op = ops.Reduce(pick, (axis,), bool(node.integer("keepdims", 1)), found.expr, store(DType.I64))
    return node.add(op, x, best, line)


@operator("OneHot")
def OneHot(node: OnnxNode, indices: Value, depth: Value, values: Value) -> Value:
    (size,) = node.dims(node.cast(depth, DType.I64), "depth")
    if values.shape != (2,):
        raise node.invalid(f"values of shape {list(values.shape)}, not [2]")
    axis = node.axis(node.integer("axis", -1), indices.rank + 1)
    whole = node.cast(indices, DType.I64)
    spread = node.reshape(whole, (*whole.shape[:axis], 1, *whole.shape[axis:]))
    line = positions(node, size, axis, spread.rank)
    count = node.builder.sizes([size], ())
    off, on = (drop_axis(node, values, 0, i) for i in range(2))

    def formula(i: f.Term, p: f.Term, n: f.Term, hot: f.Term, cold: f.Term) -> f.Term:
        return f.where(f.equal(f.where(f.less(i, 0), i + n, i), p), hot, cold)

    return node.pointwise(formula, spread, line, count, on, off)
