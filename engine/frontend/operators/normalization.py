"""Normalisations: batch norm becomes scale and shift, the others `Norm` on a view, scale and shift in the epilogue."""

from __future__ import annotations

import numpy as np

from engine.frontend import formula as f
from engine.frontend.formula import Term
from engine.frontend.onnx_node import OnnxNode, compute_dtype, source, store
from engine.frontend.registry import operator
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import floordiv
from engine.ir.graph import Value


def normalize(
    node: OnnxNode,
    kind: ops.NormKind,
    axes: tuple[int, ...],
    epsilon: float,
    x: Value,
    scale: Value | None = None,
    bias: Value | None = None,
) -> Value:
    """The norm of `x`, times `scale`, plus `bias` (both broadcast against `x`)."""
    wide = compute_dtype(x.dtype)
    result = Term(ex.Acc(wide))
    inputs = [x]
    if scale is not None:
        result = result * Term(ex.Arg(len(inputs), scale.dtype)).cast(wide)
        inputs.append(scale)
    if bias is not None:
        result = result + Term(ex.Arg(len(inputs), bias.dtype)).cast(wide)
        inputs.append(bias)
    op = ops.Norm(kind, axes, epsilon, source(x.dtype), stores=(result.cast(x.dtype).expr,))
    return node.add(op, *inputs)


def per_channel(node: OnnxNode, values: Value, rank: int) -> Value:
    """A vector over channels, as [c, 1, …] that broadcasts against [n, c, *spatial]."""
    return node.reshape(values, (*values.shape, *(1,) * max(rank - 2, 0)))


@operator("BatchNormalization")
def BatchNormalization(node: OnnxNode, x: Value, scale: Value, bias: Value, mean: Value, variance: Value) -> Value:
    if node.integer("training_mode", 0):
        raise node.unsupported("training mode; export the model after model.eval()")
    epsilon = node.number("epsilon", 1e-5)
    channels = x.shape[1] if x.rank > 1 else 1
    for value in (scale, bias, mean, variance):
        if value.rank != 1 or (isinstance(channels, int) and value.shape[0] not in (channels, 1)):
            raise node.invalid(f"a statistic of shape {list(value.shape)} for {channels} channels")
    if all(value.data is not None for value in (scale, bias, mean, variance)):
        s, b, m, v = (np.asarray(value.data, np.float64) for value in (scale, bias, mean, variance))
        with np.errstate(all="ignore"):
            factor = s / np.sqrt(v + epsilon)
            shift = b - m * factor
        wide = compute_dtype(x.dtype)
        factors, shifts = node.constant(factor, wide), node.constant(shift, wide)
    else:
        factors = node.float_pointwise(lambda s, v: s / f.sqrt(v + epsilon), scale, variance)
        shifts = node.float_pointwise(lambda b, m, s: b - m * s, bias, mean, factors)
    factors, shifts = (per_channel(node, value, x.rank) for value in (factors, shifts))
    return node.float_pointwise(lambda t, s, b: t * s + b, x, factors, shifts)


@operator("InstanceNormalization")
def InstanceNormalization(node: OnnxNode, x: Value, scale: Value, bias: Value) -> Value:
    scale, bias = per_channel(node, scale, x.rank), per_channel(node, bias, x.rank)
    return normalize(node, ops.NormKind.LAYER, tuple(range(2, x.rank)), node.number("epsilon", 1e-5), x, scale, bias)


@operator("GroupNormalization")
def GroupNormalization(node: OnnxNode, x: Value, scale: Value, bias: Value) -> Value:
    groups = node.integer("num_groups")
    if groups < 1 or x.rank < 3:
        raise node.invalid(f"{groups} groups for an input of rank {x.rank}")
    channels = x.shape[1]
    per_group = floordiv(channels, groups)
    if per_group * groups != channels:
        raise node.invalid(f"{groups} groups for {channels} channels")
    grouped = node.reshape(x, (x.shape[0], groups, per_group, *x.shape[2:]))
    tail = (1,) * (x.rank - 2)
    # Before opset 21 there is one scale per group, since then one per channel.
    shape = (groups, 1, *tail) if node.version < 21 else (groups, per_group, *tail)
    result = normalize(
        node,
        ops.NormKind.LAYER,
        tuple(range(2, x.rank + 1)),
        node.number("epsilon", 1e-5),
        grouped,
        node.reshape(scale, shape),
        node.reshape(bias, shape),
    )
    return node.reshape(result, x.shape)


@operator("LayerNormalization")
def LayerNormalization(
    node: OnnxNode, x: Value, scale: Value, bias: Value | None = None
) -> tuple[Value, Value | None, Value | None]:
    axes = tuple(range(node.axis(node.integer("axis", -1), x.rank), x.rank))
    epsilon = node.number("epsilon", 1e-5)
    result = normalize(node, ops.NormKind.LAYER, axes, epsilon, x, scale, bias)
    if not any(node.outputs[1:]):
        return result, None, None
    mean, deviation = layer_statistics(node, x, axes, epsilon)
    return result, mean, deviation


def layer_statistics(node: OnnxNode, x: Value, axes: tuple[int, ...], epsilon: float) -> tuple[Value, Value]:
    """The mean and the inverse standard deviation over `axes`, in fp32."""
    wide = compute_dtype(x.dtype)
    mean = node.add(ops.Reduce(ops.ReduceKind.MEAN, axes, True, source(x.dtype), store(wide)), x)
    centred = Term(source(x.dtype)) - Term(ex.Arg(1, wide))
    inverse = 1.0 / f.sqrt(Term(ex.Acc(wide)) + epsilon)
    op = ops.Reduce(ops.ReduceKind.MEAN, axes, True, (centred * centred).expr, (inverse.expr,))
    return mean, node.add(op, x, mean)


@operator("RMSNormalization")
@operator("SimplifiedLayerNormalization")  # ONNX Runtime's name, which it exports without a domain of its own
def RMSNormalization(node: OnnxNode, x: Value, scale: Value) -> Value:
    axes = tuple(range(node.axis(node.integer("axis", -1), x.rank), x.rank))
    return normalize(node, ops.NormKind.RMS, axes, node.number("epsilon", 1e-5), x, scale)


@operator("LpNormalization")
def LpNormalization(node: OnnxNode, x: Value) -> Value:
    axis = node.axis(node.integer("axis", -1), x.rank)
    p = node.integer("p", 2)
    if p == 2:
        # Rows of zeros stay zeros, as in onnx.reference; any positive bound below fp32's smallest norm does that.
        return normalize(node, ops.NormKind.L2, (axis,), 1e-30, x)
    if p != 1:
        raise node.invalid(f"p = {p}; only 1 and 2 are defined")
    size = f.absolute(Term(source(x.dtype)))
    total = node.add(ops.Reduce(ops.ReduceKind.SUM, (axis,), True, size.expr, store(x.dtype)), x)
    return node.float_pointwise(lambda t, n: f.where(f.equal(n, 0.0), t.like(0.0), t / n), x, total)
