"""Pools over windows and over whole images; LRN, which is a pool over channels."""

from __future__ import annotations

import math

from engine.frontend import formula as f
from engine.frontend.onnx_node import OnnxNode, compute_dtype, source, store
from engine.frontend.operators.convolution import same_by_hand, window
from engine.frontend.operators.unpooling import max_pool_with_places
from engine.frontend.registry import Results, operator
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import product
from engine.ir.expr import PointOp
from engine.ir.graph import Value


@operator("MaxPool")
def MaxPool(node: OnnxNode, x: Value) -> Results:
    if len(node.outputs) > 1 and node.outputs[1]:
        return max_pool_with_places(node, x)
    return _pool(node, x, ops.PoolKind.MAX, False)


@operator("AveragePool")
def AveragePool(node: OnnxNode, x: Value) -> Value:
    return _pool(node, x, ops.PoolKind.AVERAGE, bool(node.integer("count_include_pad", 0)))


def _pool(node: OnnxNode, x: Value, kind: ops.PoolKind, include: bool, stores: tuple[ex.Expr, ...] = ()) -> Value:
    if kind is ops.PoolKind.MAX and x.dtype.is_float:
        x, node = same_by_hand(node, x, node.integers("kernel_shape"), -math.inf)
    moves = window(node, x, node.integers("kernel_shape"))
    ceil_mode = bool(node.integer("ceil_mode", 0)) and node.text("auto_pad", "NOTSET") == "NOTSET"
    for (begin, end), kernel, dilation in zip(moves.pads, moves.kernel, moves.dilations, strict=True):
        if min(begin, end) < 0 or max(begin, end) > (kernel - 1) * dilation:
            raise node.invalid(f"pads {moves.pads} for a kernel of {moves.kernel}")
    op = ops.Pool(
        kind, moves.kernel, moves.strides, moves.pads, moves.dilations, ceil_mode, include, stores or store(x.dtype)
    )
    return node.add(op, x)


@operator("GlobalAveragePool")
def GlobalAveragePool(node: OnnxNode, x: Value) -> Value:
    return _global(node, x, ops.ReduceKind.MEAN)


@operator("GlobalMaxPool")
def GlobalMaxPool(node: OnnxNode, x: Value) -> Value:
    return _global(node, x, ops.ReduceKind.MAX)


def _global(node: OnnxNode, x: Value, kind: ops.ReduceKind) -> Value:
    return node.add(ops.Reduce(kind, tuple(range(2, x.rank)), True, source(x.dtype), store(x.dtype)), x)


@operator("LpPool")
def LpPool(node: OnnxNode, x: Value) -> Value:
    """(Σ |x|ᵖ)^(1/p): the average with padding counted, times the size of the window."""
    p = float(node.integer("p", 2))
    count = float(product(node.integers("kernel_shape")))  # type: ignore[arg-type]
    powers = node.float_pointwise(lambda t: f.apply(PointOp.POW, f.absolute(t), p), x)
    mean = f.Term(ex.Acc(compute_dtype(x.dtype)))
    root = f.apply(PointOp.POW, mean * count, 1 / p).cast(x.dtype)
    return _pool(node, powers, ops.PoolKind.AVERAGE, True, (root.expr,))


@operator("GlobalLpPool")
def GlobalLpPool(node: OnnxNode, x: Value) -> Value:
    p = float(node.integer("p", 2))
    powered = f.apply(PointOp.POW, f.absolute(f.Term(source(x.dtype))), p)
    root = f.apply(PointOp.POW, f.Term(ex.Acc(powered.dtype)), 1 / p).cast(x.dtype)
    axes = tuple(range(2, x.rank))
    return node.add(ops.Reduce(ops.ReduceKind.SUM, axes, True, powered.expr, (root.expr,)), x)


@operator("LRN")
def LRN(node: OnnxNode, x: Value) -> Value:
    """x / (bias + alpha · mean of x² over `size` neighbouring channels)^beta, missing channels counting as 0."""
    size = node.integer("size")
    if size < 1 or x.rank < 3:
        raise node.invalid(f"size {size} with an input of rank {x.rank}")
    alpha, beta, bias = node.number("alpha", 1e-4), node.number("beta", 0.75), node.number("bias", 1.0)
    squares = node.float_pointwise(lambda t: t * t, x)
    rows = node.reshape(squares, (x.shape[0], 1, x.shape[1], product(x.shape[2:])))
    pads = (((size - 1) // 2, size // 2), (0, 0))
    pool = ops.Pool(
        ops.PoolKind.AVERAGE, (size, 1), (1, 1), pads, (1, 1), count_include_pad=True, stores=store(x.dtype)
    )
    means = node.reshape(node.add(pool, rows), x.shape)
    return node.float_pointwise(lambda t, m: t / f.apply(PointOp.POW, m * alpha + bias, beta), x, means)
