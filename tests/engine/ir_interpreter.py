"""A plain NumPy interpreter of the IR: the oracle for tests of the frontend, the passes, the plan and the targets.

`run(graph, feeds)` computes every node in its textbook form, heavy parts in float64, point-wise parts with
`expr.evaluate` in the dtypes that the expressions say. It checks every result against the shape and dtype that the
graph declares. It is slow on purpose: nothing here shares code or tricks with a target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import evaluate, is_symbol, symbols
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node, Value

Array = np.ndarray[Any, Any]
Sizes = dict[str, int]


def run(graph: Graph, feeds: Mapping[str, Array], sizes: Mapping[str, int] | None = None) -> dict[str, Array]:
    """The outputs of `graph` by output name. Symbols get their sizes from the shapes of `feeds`, or from `sizes`."""
    results = run_values(graph, feeds, sizes)
    return {name: results[value] for name, value in zip(graph.output_names, graph.outputs, strict=True)}


def run_values(graph: Graph, feeds: Mapping[str, Array], sizes: Mapping[str, int] | None = None) -> dict[Value, Array]:
    """The content of every value that the graph computes, reads or returns."""
    bound = bind_sizes(graph, feeds) | dict(sizes or {})
    content: dict[Value, Array] = {value: np.asarray(feeds[value.name]) for value in graph.inputs}
    for value in (v for v in (*graph.outputs, *(i for node in graph.nodes for i in node.inputs)) if v.data is not None):
        content[value] = np.asarray(value.data)
    for node in graph.nodes:
        results = run_node(node, [content[value] for value in node.inputs], bound)
        for value, array in zip(node.outputs, results, strict=True):
            content[value] = _checked(node, value, array, bound)
    return content


def bind_sizes(graph: Graph, feeds: Mapping[str, Array]) -> Sizes:
    """The size of every symbol that is a bare dimension of an input. Raises AssertionError where inputs disagree."""
    sizes: Sizes = {}
    for value in graph.inputs:
        shape = np.shape(feeds[value.name])
        assert len(shape) == value.rank, f"{value!r} fed with shape {shape}"
        for dim, size in zip(value.shape, shape, strict=True):
            if is_symbol(dim):
                assert sizes.setdefault(str(dim), size) == size, f"{value!r} fed with shape {shape}; {dim} was {sizes}"
            elif isinstance(dim, int):
                assert dim == size, f"{value!r} fed with shape {shape}"
    return sizes


def run_node(node: Node, inputs: Sequence[Array], sizes: Sizes) -> list[Array]:
    """The results of one node for concrete inputs."""
    return _RUNNERS[type(node.op)](node.op, inputs, sizes, node)


def _checked(node: Node, value: Value, array: Array, sizes: Sizes) -> Array:
    assert array.dtype == value.dtype.numpy, f"{node.origin} {node.op.name}: {value!r} computed as {array.dtype}"
    known = all(isinstance(dim, int) or symbols(dim) <= sizes.keys() for dim in value.shape)
    expected = tuple(evaluate(dim, sizes) for dim in value.shape) if known else array.shape
    assert array.shape == expected, f"{node.origin} {node.op.name}: {value!r} has shape {array.shape}, not {expected}"
    return array


def _stores(stores: Sequence[ex.Expr], inputs: Sequence[Array], acc: Array) -> list[Array]:
    """The epilogue: the accumulator, rounded to the dtype that the expressions give it, through every store."""
    results = []
    for store in stores:
        dtypes = {leaf.dtype for leaf in ex.walk(store) if isinstance(leaf, ex.Acc)}
        rounded = acc.astype(dtypes.pop().numpy) if dtypes else acc
        value = ex.evaluate(store, list(inputs), rounded)
        results.append(np.array(np.broadcast_to(value, acc.shape), order="C"))
    return results


def _wide(array: Array) -> Array:
    """Floats as float64, integers as int64, so that products and sums are exact or nearly so."""
    return array.astype(np.float64 if DType.of(array.dtype).is_float else np.int64)


def _gathered(inputs: Sequence[Array], gathers: tuple[tuple[int, int], ...]) -> list[Array]:
    arrays = list(inputs)
    for table, index in gathers:
        arrays[table] = inputs[table][inputs[index]]
    return arrays


def _gemm(op: ops.Gemm, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    acc = np.matmul(_wide(inputs[0]), _wide(inputs[1]))
    if op.divided:
        acc *= _wide(inputs[2])
    results = _stores(op.stores, inputs, acc)
    return results if op.factors is None else [*results, *_factors(results[0], op.factors, op.offsets)]


def _row_factors(op: ops.RowFactors, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    return _factors(inputs[0], op.epsilon, op.offsets)


def _factors(x: Array, epsilon: float, offsets: bool) -> list[Array]:
    """1 / √(variance + epsilon) of rows, and with `offsets` their mean times that."""
    wide = _wide(x)
    factors = 1 / np.sqrt(wide.var(axis=-1, keepdims=True) + epsilon)
    found = [factors, factors * wide.mean(axis=-1, keepdims=True)]
    return [one.astype(np.float32) for one in found[: 1 + offsets]]


def _conv(op: ops.Conv, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    x, w = _wide(inputs[0]), _wide(inputs[1])
    acc = _conv_transposed(op, x, w) if op.transposed else _conv_forward(op, x, w)
    return _stores(op.stores, inputs, acc)


def _conv_mean(op: ops.ConvMean, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    first = op.conv.stores[0]
    unrounded = first.args[0] if isinstance(first, ex.Apply) and first.op is ex.PointOp.CAST else first
    *results, averaged = _conv(replace(op.conv, stores=(*op.conv.stores, unrounded)), inputs, sizes, node)
    mean = _wide(averaged).mean(axis=tuple(range(2, averaged.ndim)), keepdims=True)
    return [*results, *_stores((op.mean,), (), mean)]


def _conv_max(op: ops.ConvMax, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    sums = _conv_forward(op.conv, _wide(inputs[0]), _wide(inputs[1]))
    pool = replace(op.pool, stores=(ex.Acc(DType.F64),))
    (acc,) = _pool(pool, (sums,), sizes, node)
    return _stores(op.stores, inputs, acc)


def _conv_block(op: ops.ConvBlock, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    x = inputs[0]
    for conv, w in zip((op.expand, op.depthwise, op.project), inputs[1:4], strict=True):
        (x,) = _conv(conv, (x, w, *inputs[2:]), sizes, node)  # stores count the inputs of the whole
    return [x]


def _excitation(op: ops.Excitation, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    x, w1, w2 = (_wide(array).reshape(array.shape[:2]) for array in inputs[:3])
    pixel = (1,) * (inputs[0].ndim - 2)
    (hidden,) = _stores((op.hidden,), inputs, (x @ w1.T).reshape(len(x), len(w1), *pixel))
    acc = _wide(hidden).reshape(len(x), len(w1)) @ w2.T
    return _stores(op.stores, inputs, acc.reshape(len(x), len(w2), *pixel))


def _conv_excitation(op: ops.ConvExcitation, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    *results, mean = _conv_mean(op.conv_mean, inputs[: op.given], sizes, node)
    return [*results, *_excitation(op.excitation, (mean, *inputs[op.given :]), sizes, node)]


def _conv_forward(op: ops.Conv, x: Array, w: Array) -> Array:
    n, c = x.shape[:2]
    o, per_group, *kernel = w.shape
    out = [
        (size + b + e - (k - 1) * d - 1) // s + 1
        for size, (b, e), k, d, s in zip(x.shape[2:], op.pads, kernel, op.dilations, op.strides, strict=True)
    ]
    x = _pad_or_crop(x, ((0, 0), (0, 0), *op.pads))
    acc = np.zeros((n, op.groups, o // op.groups, *out))
    grouped = x.reshape(n, op.groups, c // op.groups, *x.shape[2:])
    weights = w.reshape(op.groups, o // op.groups, per_group, *kernel)
    for tap in product(*map(range, kernel)):
        window: Any = tuple(
            slice(t * d, t * d + (size - 1) * s + 1, s)
            for t, d, s, size in zip(tap, op.dilations, op.strides, out, strict=True)
        )
        acc += np.einsum("ngc...,goc->ngo...", grouped[_at(*window)], weights[_at(*tap)])
    return acc.reshape(n, o, *out)


def _at(*index: Any) -> Any:
    """The index of the trailing axes."""
    return (..., *index)


def _conv_transposed(op: ops.Conv, x: Array, w: Array) -> Array:
    n, c = x.shape[:2]
    _, per_group, *kernel = w.shape
    extra = op.output_padding or (0,) * len(kernel)
    full = [
        (size - 1) * s + (k - 1) * d + 1 + max(0, more)
        for size, s, k, d, more in zip(x.shape[2:], op.strides, kernel, op.dilations, extra, strict=True)
    ]
    acc = np.zeros((n, op.groups, per_group, *full))
    grouped = x.reshape(n, op.groups, c // op.groups, *x.shape[2:])
    weights = w.reshape(op.groups, c // op.groups, per_group, *kernel)
    for tap in product(*map(range, kernel)):
        window: Any = tuple(
            slice(t * d, t * d + (size - 1) * s + 1, s)
            for t, d, s, size in zip(tap, op.dilations, op.strides, x.shape[2:], strict=True)
        )
        acc[_at(*window)] += np.einsum("ngc...,gco->ngo...", grouped, weights[_at(*tap)])
    acc = acc.reshape(n, op.groups * per_group, *full)
    return _pad_or_crop(acc, ((0, 0), (0, 0), *((-b, -e) for b, e in op.pads)))


def _pad_or_crop(x: Array, pads: Sequence[tuple[int, int]], mode: str = "constant", value: Any = 0) -> Array:
    """`np.pad` in which negative numbers crop; the padding is added first, as ONNX does."""
    grow = [(max(0, b), max(0, e)) for b, e in pads]
    x = np.pad(x, grow, mode=mode, **({"constant_values": value} if mode == "constant" else {}))  # type: ignore[call-overload]
    return x[tuple(slice(max(0, -b), size - max(0, -e)) for size, (b, e) in zip(x.shape, pads, strict=True))]


def _attention(op: ops.Attention, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    q, k, v = (_wide(x) for x in inputs[:3])
    if op.packed:
        return _packed_attention(op, inputs, sizes, node)
    if q.ndim == 4:
        k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    with np.errstate(all="ignore"):
        scores = op.scale * np.matmul(q, np.swapaxes(k, -1, -2))
        if op.has_bias:
            scores = scores + _wide(inputs[3])
        if op.causal:
            scores = np.where(np.tri(*scores.shape[-2:]) > 0, scores, -np.inf)
        if op.window is not None:
            queries, keys = (np.arange(size) for size in scores.shape[-2:])
            scores = np.where(np.abs(queries[:, None] - keys) < op.window, scores, -np.inf)
        weights = _softmax(scores, -1)
        if op.masked_rows_zero:
            weights = np.where(np.all(scores == -np.inf, axis=-1, keepdims=True), 0.0, weights)
    return _stores(op.stores, inputs, np.matmul(weights, v))


def _packed_attention(op: ops.Attention, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    """Each sequence by itself, without an epilogue; that comes last, over all tokens."""
    q, k, v, starts = *(_wide(x) for x in inputs[:3]), inputs[3]
    single = replace(op, packed=False, stores=(ex.Acc(DType.F64),))
    acc = np.zeros((*q.shape[:-1], v.shape[-1]))
    for first, end in pairwise(starts):
        tokens = [x[:, :, first:end] for x in (q, k, v)]
        (acc[:, :, first:end],) = _attention(single, tokens, sizes, node)
    return _stores(op.stores, inputs, acc)


def _softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - np.max(x, axis=axis, keepdims=True, initial=-np.inf))
    return np.asarray(e / np.sum(e, axis=axis, keepdims=True))


def _pointwise(op: ops.Pointwise, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    arrays = _gathered(inputs, op.gathers)
    shape = np.broadcast_shapes(*(arrays[i].shape for i in ex.arguments(*op.stores)))
    return _stores(op.stores, arrays, np.zeros(shape))


def _source(source: ex.Expr, inputs: Sequence[Array]) -> Array:
    shape = np.broadcast_shapes(*(inputs[i].shape for i in ex.arguments(source)))
    return np.broadcast_to(ex.evaluate(source, list(inputs)), shape)


def _norm(op: ops.Norm, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    arrays = _gathered(inputs, op.gathers)
    x = _source(op.source, arrays).astype(np.float64)
    if op.kind is ops.NormKind.LAYER:
        centred = x - x.mean(axis=op.axes, keepdims=True)
        acc = centred / np.sqrt(np.mean(centred**2, axis=op.axes, keepdims=True) + op.epsilon)
    elif op.kind is ops.NormKind.RMS:
        acc = x / np.sqrt(np.mean(x**2, axis=op.axes, keepdims=True) + op.epsilon)
    else:
        acc = x / np.maximum(np.sqrt(np.sum(x**2, axis=op.axes, keepdims=True)), op.epsilon)
    return _stores(op.stores, arrays, acc)


def _softmax_op(op: ops.Softmax, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    x = _source(op.source, inputs).astype(np.float64)
    with np.errstate(all="ignore"):
        if op.log:
            shifted = x - np.max(x, axis=op.axis, keepdims=True, initial=-np.inf)
            acc = shifted - np.log(np.sum(np.exp(shifted), axis=op.axis, keepdims=True))
        else:
            acc = _softmax(x, op.axis)
    return _stores(op.stores, inputs, acc)


_REDUCERS: dict[ops.ReduceKind, Callable[..., Any]] = {
    ops.ReduceKind.SUM: np.sum,
    ops.ReduceKind.MEAN: np.mean,
    ops.ReduceKind.MAX: np.max,
    ops.ReduceKind.MIN: np.min,
    ops.ReduceKind.PROD: np.prod,
}


def _reduce(op: ops.Reduce, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    x = _source(op.source, inputs)
    accumulated = x if op.kind in {ops.ReduceKind.MAX, ops.ReduceKind.MIN} else _wide(x)
    empty: dict[str, Any] = {}
    if op.kind in {ops.ReduceKind.MAX, ops.ReduceKind.MIN}:
        empty = {"initial": _lowest(x.dtype) if op.kind is ops.ReduceKind.MAX else _highest(x.dtype)}
    acc = np.asarray(_REDUCERS[op.kind](accumulated, axis=op.axes, keepdims=op.keepdims, **empty))
    return _stores(op.stores, inputs, acc)


def _lowest(dtype: np.dtype[Any]) -> Any:
    return -np.inf if DType.of(dtype).is_float else np.False_ if dtype == np.bool_ else np.iinfo(dtype).min


def _highest(dtype: np.dtype[Any]) -> Any:
    return np.inf if DType.of(dtype).is_float else np.True_ if dtype == np.bool_ else np.iinfo(dtype).max


def _pool(op: ops.Pool, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    x = inputs[0]
    out = [int(evaluate(dim, {})) for dim in op.infer([Value("", DType.of(x.dtype), x.shape)])[0][1][2:]]
    is_max = op.kind is ops.PoolKind.MAX
    # Room for every window, the last of which may reach beyond the padded input (ceil_mode).
    reach = [
        (o - 1) * s + (k - 1) * d + 1 - size - b
        for o, s, k, d, size, (b, _) in zip(out, op.strides, op.kernel, op.dilations, x.shape[2:], op.pads, strict=True)
    ]
    pads = ((0, 0), (0, 0), *((b, max(e, r)) for (b, e), r in zip(op.pads, reach, strict=True)))
    padded = np.pad(x if is_max else _wide(x), pads, constant_values=_lowest(x.dtype) if is_max else 0)
    # An element counts for an average where it is real, or declared padding with count_include_pad.
    declared = ((0, 0), (0, 0), *op.pads) if op.count_include_pad else ((0, 0),) * x.ndim
    counted = np.pad(np.ones_like(x, np.float64), declared, constant_values=1.0)
    offset = [0 if op.count_include_pad else b for b, _ in op.pads]
    counts = np.zeros(padded.shape)
    counts[_at(*(slice(o, o + n) for o, n in zip(offset, counted.shape[2:], strict=True)))] = counted
    acc: Array | None = None
    total = np.zeros((*x.shape[:2], *out))
    for tap in product(*map(range, op.kernel)):
        window = _at(
            *(
                slice(t * d, t * d + (size - 1) * s + 1, s)
                for t, d, s, size in zip(tap, op.dilations, op.strides, out, strict=True)
            )
        )
        part = padded[window]
        total += counts[window]
        acc = part if acc is None else np.maximum(acc, part) if is_max else acc + part
    assert acc is not None
    return _stores(op.stores, inputs, acc if is_max else acc / total)


def _concat(op: ops.Concat, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    return [np.concatenate(inputs, axis=op.axis)]


def _undefined(op: ops.Undefined, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    poison = np.nan if inputs[0].dtype.kind == "f" else 77  # nothing may come of it
    return [np.full(tuple(evaluate(dim, sizes) for dim in op.shape), poison, inputs[0].dtype)]


def _pad(op: ops.Pad, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    if op.mode is ops.PadMode.CONSTANT:
        return [_pad_or_crop(inputs[0], op.pads, op.mode.value, op.value)]
    if op.mode is ops.PadMode.ROLL:
        return [np.roll(inputs[0], [begin for begin, _ in op.pads], range(len(op.pads)))]
    # What is cropped is gone before the rest is reflected or repeated, as in ONNX Runtime; ONNX leaves it open.
    cropped = _pad_or_crop(inputs[0], [(min(0, begin), min(0, end)) for begin, end in op.pads])
    return [_pad_or_crop(cropped, [(max(0, begin), max(0, end)) for begin, end in op.pads], op.mode.value)]


def _gather(op: ops.Gather, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    return [np.asarray(np.take(inputs[0], inputs[1], axis=op.axis))]


def _scatter(op: ops.Scatter, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    data, indices, updates = inputs
    acc = data.copy() if op.kind is ops.ScatterKind.REPLACE else _wide(data)
    if op.axis is None:
        place: Any = tuple(np.moveaxis(indices, -1, 0))
    else:
        place = tuple(indices if i == op.axis else position for i, position in enumerate(np.indices(indices.shape)))
    if op.kind is ops.ScatterKind.REPLACE:
        acc[place] = updates
    else:
        combine: Any = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}[op.kind.value]
        combine.at(acc, place, updates.astype(acc.dtype))
    return [acc.astype(data.dtype)]


def _running(op: ops.Running, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    x = _wide(inputs[0]) if DType.of(inputs[0].dtype).is_float else inputs[0]
    x = np.flip(x, op.axis) if op.reverse else x
    running: Any = {ops.RunningKind.SUM: np.add, ops.RunningKind.PROD: np.multiply}[op.kind]
    acc = running.accumulate(x, axis=op.axis, dtype=x.dtype)
    if op.exclusive:
        first = np.full_like(np.take(x, [0], op.axis) if x.size else x, running.identity)
        acc = np.concatenate([first, np.take(acc, np.arange(x.shape[op.axis] - 1), op.axis)], op.axis)
    return [(np.flip(acc, op.axis) if op.reverse else acc).astype(inputs[0].dtype)]


def _top_k(op: ops.TopK, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    x, k = inputs[0], evaluate(op.k, sizes)
    key = x.astype(np.float64) if DType.of(x.dtype).is_float else x  # where NaN is sorted last
    # A stable sort of what is turned round keeps equal elements in their order when it is turned back.
    order = np.argsort(np.flip(key, op.axis) if op.largest else key, axis=op.axis, kind="stable")
    if op.largest:
        order = np.flip(x.shape[op.axis] - 1 - order, op.axis)
    best = np.take(order, np.arange(k), axis=op.axis)
    return [np.take_along_axis(x, best, axis=op.axis), best.astype(np.int64)]


def _resize(op: ops.Resize, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    acc = _wide(inputs[0])
    for axis, (dim, given) in enumerate(zip(op.shape, op.scales, strict=True)):
        size, before = evaluate(dim, sizes), acc.shape[axis]
        scale = given if given is not None else size / before
        if size == before and scale == 1:
            continue
        weights = _resize_weights(op, before, size, scale)
        acc = np.moveaxis(np.tensordot(weights, acc, axes=(1, axis)), 0, axis)
    return _stores(op.stores, inputs, acc)


def _resize_weights(op: ops.Resize, before: int, size: int, scale: float) -> Array:
    """The [size, before] matrix of one axis."""
    i = np.arange(size, dtype=np.float64)
    x = {
        "half_pixel": (i + 0.5) / scale - 0.5,
        "pytorch_half_pixel": (i + 0.5) / scale - 0.5 if scale * before > 1 else np.zeros_like(i),
        "align_corners": i * (before - 1) / (scale * before - 1) if scale * before != 1 else np.zeros_like(i),
        "asymmetric": i / scale,
        "half_pixel_symmetric": before / 2 * (1 - size / (scale * before)) + (i + 0.5) / scale - 0.5,
    }[op.coordinates]
    weights = np.zeros((size, before))
    rows = np.arange(size)
    if op.mode is ops.ResizeMode.NEAREST:
        near = {
            "floor": np.floor(x),
            "ceil": np.ceil(x),
            "round_prefer_floor": np.ceil(x - 0.5),
            "round_prefer_ceil": np.floor(x + 0.5),
        }[op.rounding]
        weights[rows, np.clip(near, 0, before - 1).astype(int)] = 1
        return weights
    base = np.floor(x).astype(int)
    t = x - base
    if op.antialias or op.exclude_outside:
        return _filtered(op, x, before, min(scale, 1.0) if op.antialias else 1.0)
    if op.mode is ops.ResizeMode.LINEAR:
        taps = {0: 1 - t, 1: t}
    else:
        a = op.cubic_coefficient

        def near_tap(d: Array) -> Array:
            return ((a + 2) * d - (a + 3)) * d * d + 1

        def far_tap(d: Array) -> Array:
            return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

        taps = {-1: far_tap(t + 1), 0: near_tap(t), 1: near_tap(1 - t), 2: far_tap(2 - t)}
    for offset, weight in taps.items():
        np.add.at(weights, (rows, np.clip(base + offset, 0, before - 1)), weight)
    return weights


def _filtered(op: ops.Resize, x: Array, before: int, shrunk: float) -> Array:
    """Every element's weight by its distance; those beyond the edge are added to the edge's, or left out."""
    margin = int(np.ceil(3 / shrunk)) + 1
    places = np.arange(-margin, before + margin)
    d, a = np.abs(places - x[:, None]) * shrunk, op.cubic_coefficient
    if op.mode is ops.ResizeMode.LINEAR:
        weights = np.clip(1 - d, 0, None)
    else:
        inner, outer = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        weights = np.where(d <= 1, inner, np.where(d < 2, outer, 0))
    if not op.exclude_outside:
        weights[:, margin] += weights[:, :margin].sum(axis=1)
        weights[:, margin + before - 1] += weights[:, margin + before :].sum(axis=1)
    inside = weights[:, margin : margin + before]
    return np.asarray(inside / inside.sum(axis=1, keepdims=True))


def _shape_tensor(op: ops.ShapeTensor, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    shape = [evaluate(dim, sizes) for dim in op.shape]
    if op.values is None:
        return [np.arange(shape[0]).astype(op.dtype.numpy)]
    return [np.array([evaluate(dim, sizes) for dim in op.values]).astype(op.dtype.numpy).reshape(shape)]


def _opaque(op: ops.Opaque, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    proto = onnx.NodeProto.FromString(op.node)
    names = [name for name in proto.input if name]
    graph = onnx.helper.make_graph(
        [proto],
        "opaque",
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in zip(names, inputs, strict=True)
        ],
        [onnx.helper.make_empty_tensor_value_info(name) for name in proto.output if name],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(*pair) for pair in op.opsets])
    results = ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))
    return [
        np.asarray(array, value.dtype.numpy if value.dtype is DType.STRING else None)
        for array, value in zip(results, node.outputs, strict=True)
    ]


def _reshape(op: ops.Reshape, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    return [inputs[0].reshape([evaluate(dim, sizes) for dim in op.shape])]


def _transpose(op: ops.Transpose, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    return [np.transpose(inputs[0], op.perm)]


def _slice(op: ops.Slice, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    result = inputs[0]
    for axis, (start, size, step) in enumerate(zip(op.starts, op.sizes, op.steps, strict=True)):
        index = evaluate(start, sizes) + step * np.arange(evaluate(size, sizes))
        assert index.size == 0 or (index.min() >= 0 and index.max() < result.shape[axis]), f"{op} of {result.shape}"
        result = np.take(result, index, axis=axis)
    return [result]


def _expand(op: ops.Expand, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    return [np.broadcast_to(inputs[0], [evaluate(dim, sizes) for dim in op.shape])]


def _recurrent(op: ops.Recurrent, inputs: Sequence[Array], sizes: Sizes, node: Node) -> list[Array]:
    x, r, h, *extra = (_wide(array) for array in inputs)
    c = extra[0] if op.cell is ops.Cell.LSTM else np.zeros_like(h)
    every = np.zeros((*x.shape[:3], h.shape[-1]))
    h, c = h.copy(), c.copy()
    for direction, i in product(range(x.shape[1]), range(x.shape[0])):
        t = len(x) - 1 - i if direction == op.reversed else i
        before = h[direction]
        gates = np.split(x[t, direction], op.cell.gates, -1)
        recurrent = np.split(before @ r[direction].T, op.cell.gates, -1)
        match op.cell:
            case ops.Cell.LSTM:
                enter, leave, keep, new = (a + b for a, b in zip(gates, recurrent, strict=True))
                c[direction] = _sigmoid(keep) * c[direction] + _sigmoid(enter) * np.tanh(new)
                h[direction] = _sigmoid(leave) * np.tanh(c[direction])
            case ops.Cell.GRU:
                update, reset = (_sigmoid(gates[gate] + recurrent[gate]) for gate in range(2))
                new = np.tanh(gates[2] + reset * (recurrent[2] + extra[0][direction]))
                h[direction] = (1 - update) * new + update * before
            case _:
                total = gates[0] + recurrent[0]
                h[direction] = np.tanh(total) if op.cell is ops.Cell.RNN_TANH else np.maximum(total, 0)
        every[t, direction] = h[direction]
    results = [every, h, c] if op.cell is ops.Cell.LSTM else [every, h]
    return [result.astype(inputs[0].dtype) for result in results]


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


_RUNNERS: dict[type[ops.Op], Callable[[Any, Sequence[Array], Sizes, Node], list[Array]]] = {
    ops.Gemm: _gemm,
    ops.Conv: _conv,
    ops.ConvExcitation: _conv_excitation,
    ops.ConvBlock: _conv_block,
    ops.ConvMax: _conv_max,
    ops.ConvMean: _conv_mean,
    ops.Excitation: _excitation,
    ops.Recurrent: _recurrent,
    ops.Attention: _attention,
    ops.Pointwise: _pointwise,
    ops.Norm: _norm,
    ops.Softmax: _softmax_op,
    ops.Reduce: _reduce,
    ops.RowFactors: _row_factors,
    ops.Pool: _pool,
    ops.Concat: _concat,
    ops.Undefined: _undefined,
    ops.Pad: _pad,
    ops.Gather: _gather,
    ops.Scatter: _scatter,
    ops.TopK: _top_k,
    ops.Running: _running,
    ops.Resize: _resize,
    ops.ShapeTensor: _shape_tensor,
    ops.Opaque: _opaque,
    ops.Reshape: _reshape,
    ops.Transpose: _transpose,
    ops.Slice: _slice,
    ops.Expand: _expand,
}
