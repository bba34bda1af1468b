"""NumPy evaluation of single nodes on constants: what constant folding runs. Light operators, and small products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.graph import Node
from engine.ir.ops import (
    Concat,
    Expand,
    Gather,
    Gemm,
    Pad,
    Pointwise,
    Reduce,
    ReduceKind,
    Reshape,
    Running,
    Scatter,
    ShapeTensor,
    Slice,
    Transpose,
)

Array = np.ndarray


def evaluate(node: Node, inputs: Sequence[Array]) -> list[Array] | None:
    """The results of `node` for constant inputs, or None where it is not of a kind that is folded."""
    runner = _RUNNERS.get(type(node.op))
    results = runner(node.op, inputs) if runner is not None else None
    if results is None:
        return None
    return [np.asarray(a).astype(v.dtype.numpy, copy=False) for a, v in zip(results, node.outputs, strict=True)]


def _pointwise(op: Pointwise, inputs: Sequence[Array]) -> list[Array]:
    arrays = list(inputs)
    for table, index in op.gathers:
        arrays[table] = inputs[table][inputs[index]]
    shape = np.broadcast_shapes(*(arrays[i].shape for i in ex.arguments(*op.stores)))
    return [np.broadcast_to(ex.evaluate(store, arrays), shape) for store in op.stores]


_REDUCERS: dict[ReduceKind, Callable[..., Any]] = {
    ReduceKind.SUM: np.sum,
    ReduceKind.MEAN: np.mean,
    ReduceKind.MAX: np.max,
    ReduceKind.MIN: np.min,
    ReduceKind.PROD: np.prod,
}


def _reduce(op: Reduce, inputs: Sequence[Array]) -> list[Array] | None:
    source = ex.evaluate(op.source, inputs)
    source = np.broadcast_to(source, np.broadcast_shapes(*(inputs[i].shape for i in ex.arguments(op.source))))
    if source.size == 0:
        return None  # what an empty extremum is depends on the type: left to the kernels
    wide = source.astype(np.float64) if DType.of(source.dtype).is_float else source
    acc = np.asarray(_REDUCERS[op.kind](wide, axis=op.axes, keepdims=op.keepdims)).astype(source.dtype)
    return [np.broadcast_to(ex.evaluate(store, inputs, acc), acc.shape) for store in op.stores]


def _gemm(op: Gemm, inputs: Sequence[Array]) -> list[Array] | None:
    a, b = inputs[:2]
    if a.size * b.shape[-1] > 1 << 24:
        return None
    wide = np.float64 if DType.of(a.dtype).is_float else np.int64
    product = np.matmul(a.astype(wide), b.astype(wide))
    return [np.broadcast_to(ex.evaluate(s, inputs, product.astype(_acc_dtype(s, a))), product.shape) for s in op.stores]


def _acc_dtype(store: ex.Expr, like: Array) -> np.dtype:
    return next((leaf.dtype.numpy for leaf in ex.walk(store) if isinstance(leaf, ex.Acc)), like.dtype)


def _pad(op: Pad, inputs: Sequence[Array]) -> list[Array] | None:
    if any(b < 0 or e < 0 for b, e in op.pads):
        return None
    mode: Any = op.mode.value
    return [np.pad(inputs[0], op.pads, mode, **({"constant_values": op.value} if mode == "constant" else {}))]


def _slice(op: Slice, inputs: Sequence[Array]) -> list[Array] | None:
    index = []
    starts, sizes = _concrete(op.starts), _concrete(op.sizes)
    if starts is None or sizes is None:
        return None
    for start, size, step in zip(starts, sizes, op.steps, strict=True):
        stop = start + size * step
        index.append(slice(start, stop if stop >= 0 else None, step))
    return [inputs[0][tuple(index)]]


def _shape_tensor(op: ShapeTensor, _inputs: Sequence[Array]) -> list[Array] | None:
    shape = _concrete(op.shape)
    if shape is None:
        return None
    if op.values is None:
        return [np.arange(shape[0])]
    values = _concrete(op.values)
    return None if values is None else [np.array(values, np.int64).reshape(shape)]


def _concrete(dims: Sequence[object]) -> tuple[int, ...] | None:
    known = tuple(dim for dim in dims if isinstance(dim, int))
    return known if len(known) == len(dims) else None


def _reshape(op: Reshape, inputs: Sequence[Array]) -> list[Array] | None:
    shape = _concrete(op.shape)
    return None if shape is None else [inputs[0].reshape(shape)]


def _scatter(op: Scatter, inputs: Sequence[Array]) -> list[Array] | None:
    result = op.apply(*inputs)
    return None if result is None else [result]


def _expand(op: Expand, inputs: Sequence[Array]) -> list[Array] | None:
    shape = _concrete(op.shape)
    return None if shape is None else [np.broadcast_to(inputs[0], shape)]


_RUNNERS: dict[type, Callable[[Any, Sequence[Array]], list[Array] | None]] = {
    Pointwise: _pointwise,
    Reduce: _reduce,
    Gemm: _gemm,
    Pad: _pad,
    Slice: _slice,
    ShapeTensor: _shape_tensor,
    Reshape: _reshape,
    Expand: _expand,
    Scatter: _scatter,
    Running: lambda op, inputs: [op.apply(inputs[0])],
    Concat: lambda op, inputs: [np.concatenate(inputs, op.axis)],
    Gather: lambda op, inputs: [np.take(inputs[0], inputs[1], op.axis)],
    Transpose: lambda op, inputs: [np.transpose(inputs[0], op.perm)],
}
