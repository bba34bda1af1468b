"""Looking up by index. The rare forms (GatherND, ScatterElements, TopK, …) have no function: they become `Opaque`."""

from __future__ import annotations

from engine.frontend import formula as f
from engine.frontend.onnx_node import OnnxNode
from engine.frontend.operators.shape import positions
from engine.frontend.operators.slicing import drop_axis, last
from engine.frontend.registry import operator
from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.graph import Value


@operator("Gather")
def Gather(node: OnnxNode, data: Value, indices: Value) -> Value:
    axis = node.axis(node.integer("axis", 0), data.rank)
    if not indices.dtype.is_int:
        raise node.invalid(f"indices of type {indices.dtype.value}")
    known = node.known(indices)
    if known is not None and known.size:
        size = data.shape[axis]
        if isinstance(size, int) and not (known.min() >= -size and known.max() < size):
            raise node.invalid(f"an index out of range for an axis of {size}")
        if known.ndim == 0:
            return drop_axis(node, data, axis, last(size, int(known)))
    return node.add(ops.Gather(axis), data, indices)


@operator("OneHot")
def OneHot(node: OnnxNode, indices: Value, depth: Value, values: Value) -> Value:
    (size,) = node.dims(node.cast(depth, DType.I64), "depth")
    if values.shape != (2,):
        raise node.invalid(f"values of shape {list(map(str, values.shape))}, not [2]")
    axis = node.axis(node.integer("axis", -1), indices.rank + 1)
    whole = node.cast(indices, DType.I64)
    spread = node.reshape(whole, (*whole.shape[:axis], 1, *whole.shape[axis:]))
    line = positions(node, size, axis, spread.rank)
    count = node.builder.sizes([size], ())
    off, on = (drop_axis(node, values, 0, i) for i in range(2))

    def formula(i: f.Term, p: f.Term, n: f.Term, hot: f.Term, cold: f.Term) -> f.Term:
        return f.where(f.equal(f.where(f.less(i, 0), i + n, i), p), hot, cold)

    return node.pointwise(formula, spread, line, count, on, off)
