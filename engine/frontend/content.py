"""What is known of a small tensor's content while a model is read: numbers, or sizes not known before run time.

Exporters compute the targets of Reshape, Expand or Slice from the shapes of other tensors with ordinary operators.
`evaluate` runs those operators on arrays whose elements are numbers, `Dim`s or `Ratio`s, so that nothing of that
arithmetic stays in the graph. The builder calls it for every node it is about to add. It answers None wherever the
result is not certain; the node then stays in the graph and is computed from data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from engine.frontend.elements import ELEMENT_OPERATIONS, Element, Ratio, Undecided, map_elements, objects
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import Sym
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.graph import Value

Array = np.ndarray[Any, Any]

MAX_NUMBERS = 65536  # elements of a constant that is folded here; larger ones are the folding pass's work
MAX_SIZES = 2048  # elements of a tensor of symbolic sizes
_QUANTISED = (DType.F8E4M3, DType.I8, DType.U8)


def evaluate(op: ops.Op, inputs: Sequence[Value], contents: Sequence[Array | None]) -> list[Array] | None:
    """The results of `op`, as arrays of numbers or object arrays of elements; None where they are not certain."""
    run = _RUNNERS.get(type(op))
    if run is None or any(content is None for content in contents):
        return None
    if isinstance(op, ops.Pointwise) and any(value.dtype in _QUANTISED for value in inputs):
        return None  # never a size; and what dequantises a small weight is to be seen, as of a large one
    known = [content for content in contents if content is not None]
    symbolic = any(content.dtype == object for content in known)
    shapes = [shape for _, shape in op.infer(inputs)]
    limit = MAX_SIZES if symbolic else MAX_NUMBERS
    for shape in shapes:
        sizes = [size for size in shape if isinstance(size, int)]
        if len(sizes) < len(shape) or prod(sizes) > limit:
            return None
    if symbolic:
        known = [content.astype(object) for content in known]
    try:
        results = run(op, known)
    except (Undecided, OverflowError, ZeroDivisionError):
        return None
    if results is None:
        return None
    return [_settled(array, dtype) for array, (dtype, _) in zip(results, op.infer(inputs), strict=True)]


def _settled(array: Array, dtype: DType) -> Array:
    """A plain array where every element is a number."""
    if array.dtype != object:
        return array
    if any(isinstance(element, (Sym, Ratio)) for element in array.flat):
        return array
    return array.astype(dtype.numpy)


# Views and moves: NumPy does them on numbers and on objects alike.


def _slice(op: ops.Slice, inputs: list[Array]) -> list[Array] | None:
    result = inputs[0]
    for axis, (start, size, step) in enumerate(zip(op.starts, op.sizes, op.steps, strict=True)):
        if isinstance(start, Sym) or isinstance(size, Sym):
            return None
        result = np.take(result, start + step * np.arange(size), axis=axis)
    return [result]


def _gather(op: ops.Gather, inputs: list[Array]) -> list[Array] | None:
    index = inputs[1]
    if any(isinstance(element, (Sym, Ratio)) for element in index.flat):
        return None
    index = index.astype(np.int64)
    size = inputs[0].shape[op.axis]
    if index.size and not (-size <= index.min() and index.max() < size):
        return None
    return [np.asarray(np.take(inputs[0], index, axis=op.axis), inputs[0].dtype)]


def _scatter(op: ops.Scatter, inputs: list[Array]) -> list[Array] | None:
    data, index, updates = inputs
    if op.kind is not ops.ScatterKind.REPLACE or any(isinstance(element, (Sym, Ratio)) for element in index.flat):
        return None
    result = op.apply(data, index.astype(np.int64), updates)
    return None if result is None else [result]


def _running(op: ops.Running, inputs: list[Array]) -> list[Array] | None:
    return None if inputs[0].dtype == object else [op.apply(inputs[0])]


def _shape_tensor(op: ops.ShapeTensor, _inputs: list[Array]) -> list[Array] | None:
    shape = tuple(int(size) for size in op.shape if isinstance(size, int))
    if op.values is None:
        return [np.arange(shape[0]).astype(op.dtype.numpy)]
    return [objects(op.values, shape)]


def _reduce(op: ops.Reduce, inputs: list[Array]) -> list[Array] | None:
    symbolic = any(array.dtype == object for array in inputs)
    source = map_elements(op.source, inputs) if symbolic else ex.evaluate(op.source, inputs)
    if op.kind is ops.ReduceKind.MEAN and symbolic:
        return None
    if not source.size:
        return None
    if symbolic:
        combine: Callable[[Any, Any], Any] = _COMBINE[op.kind]
        acc = source
        for axis in reversed(op.axes):
            parts = [np.take(acc, i, axis=axis) for i in range(acc.shape[axis])]
            total = parts[0]
            for part in parts[1:]:
                total = np.asarray(np.frompyfunc(combine, 2, 1)(total, part), object)
            acc = np.expand_dims(np.asarray(total, object), axis) if op.keepdims else np.asarray(total, object)
        return [map_elements(store, inputs, acc) for store in op.stores]
    wide = source.astype(np.float64) if source.dtype.kind == "f" else source
    acc = np.asarray(_NUMPY_REDUCE[op.kind](wide, axis=op.axes, keepdims=op.keepdims)).astype(source.dtype)
    return [ex.evaluate(store, inputs, acc) for store in op.stores]


_NUMPY_REDUCE: dict[ops.ReduceKind, Callable[..., Any]] = {
    ops.ReduceKind.SUM: np.sum,
    ops.ReduceKind.MEAN: np.mean,
    ops.ReduceKind.MAX: np.max,
    ops.ReduceKind.MIN: np.min,
    ops.ReduceKind.PROD: np.prod,
}


def _pointwise(op: ops.Pointwise, inputs: list[Array]) -> list[Array] | None:
    if op.gathers:
        return None
    symbolic = any(array.dtype == object for array in inputs)
    shape = np.broadcast_shapes(*(inputs[i].shape for i in ex.arguments(*op.stores)))
    results = [map_elements(store, inputs) if symbolic else ex.evaluate(store, inputs) for store in op.stores]
    return [np.broadcast_to(result, shape) for result in results]


_COMBINE: dict[ops.ReduceKind, Callable[[Element, Element], Element]] = {
    ops.ReduceKind.SUM: ELEMENT_OPERATIONS[PointOp.ADD],
    ops.ReduceKind.PROD: ELEMENT_OPERATIONS[PointOp.MUL],
    ops.ReduceKind.MAX: ELEMENT_OPERATIONS[PointOp.MAX],
    ops.ReduceKind.MIN: ELEMENT_OPERATIONS[PointOp.MIN],
}
_RUNNERS: dict[type[ops.Op], Callable[[Any, list[Array]], list[Array] | None]] = {
    ops.Reshape: lambda op, inputs: [inputs[0].reshape(op.shape)],
    ops.Transpose: lambda op, inputs: [np.transpose(inputs[0], op.perm)],
    ops.Expand: lambda op, inputs: [np.broadcast_to(inputs[0], op.shape)],
    ops.Concat: lambda op, inputs: [np.concatenate(inputs, axis=op.axis)],
    ops.Slice: _slice,
    ops.Gather: _gather,
    ops.Scatter: _scatter,
    ops.Running: _running,
    ops.ShapeTensor: _shape_tensor,
    ops.Reduce: _reduce,
    ops.Pointwise: _pointwise,
}
