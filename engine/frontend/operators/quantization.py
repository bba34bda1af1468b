"""Quantised tensors: scale and zero point as formulas; quantised products as products of the integers' float values."""

from __future__ import annotations

import numpy as np

from engine.frontend import formula as f
from engine.frontend.formula import Term
from engine.frontend.onnx_node import OnnxNode
from engine.frontend.operators.convolution import Conv
from engine.frontend.operators.elementwise import to_fp8
from engine.frontend.operators.linalg import MatMul
from engine.frontend.operators.slicing import take
from engine.frontend.registry import operator
from engine.frontend.tensors import dtype_of
from engine.ir.dim import Dim, ceildiv
from engine.ir.dtype import DType
from engine.ir.graph import Value


def along_axis(node: OnnxNode, x: Value, parameter: Value, axis: int, block: int) -> Value:
    """A scale or zero point (one for all, one per position of `axis`, or one per block of it) that broadcasts."""
    if parameter.rank == 0 or parameter.shape == (1,):
        return node.reshape(parameter, ())
    if block:
        blocks = parameter.shape[axis]
        before, after = parameter.shape[:axis], parameter.shape[axis + 1 :]
        apart = node.reshape(parameter, (*before, blocks, 1, *after))
        repeated = node.reshape(node.expand(apart, (*before, blocks, block, *after)), (*before, blocks * block, *after))
        if ceildiv(x.shape[axis], block) != blocks:
            raise node.invalid(f"{blocks} blocks of {block} for {x.shape[axis]} elements")
        return take(node, repeated, axis, 0, x.shape[axis])
    if parameter.rank != 1:
        raise node.invalid(f"a scale of rank {parameter.rank}")
    shape: list[Dim] = [1] * x.rank
    shape[node.axis(axis, x.rank)] = parameter.shape[0]
    return node.reshape(parameter, shape)


def quantize(node: OnnxNode, x: Value, scale: Value, zero: Value | None, dtype: DType) -> Value:
    """saturate(round(x / scale) + zero); of 8-bit floats, which have no zero point, x / scale."""
    if dtype is DType.F8E4M3:
        _check_zero(node, zero)
        return node.pointwise(lambda t, s: to_fp8(node, t.cast(DType.F32) / s.cast(DType.F32)), x, scale)
    if not dtype.is_int:
        raise node.unsupported(f"quantisation to {dtype.value}")
    limits = np.iinfo(dtype.numpy)

    def formula(t: Term, s: Term, *zeros: Term) -> Term:
        level = f.round_half_even(t.cast(DType.F32) / s.cast(DType.F32))
        for z in zeros:
            level = level + z.cast(DType.F32)
        return f.minimum(f.maximum(level, float(limits.min)), float(limits.max)).cast(dtype)

    return node.pointwise(formula, x, scale, *([zero] if zero is not None else []))


def _check_zero(node: OnnxNode, zero: Value | None) -> None:
    """Raises ModelError for a zero point of 8-bit floats that is known and not 0: ONNX allows no other."""
    if zero is not None and zero.data is not None and np.any(zero.data.astype(np.float32) != 0):
        raise node.invalid("8-bit floats have no zero point but 0")


def dequantize(node: OnnxNode, x: Value, scale: Value, zero: Value | None, dtype: DType) -> Value:
    """(x - zero) · scale."""
    if x.dtype is DType.F8E4M3:
        _check_zero(node, zero)
        return node.pointwise(lambda t, s: (t.cast(DType.F32) * s.cast(DType.F32)).cast(dtype), x, scale)
    if not x.dtype.is_int:
        raise node.unsupported(f"dequantisation of {x.dtype.value}")

    def formula(t: Term, s: Term, *zeros: Term) -> Term:
        level = t.cast(DType.F32)
        for z in zeros:
            level = level - z.cast(DType.F32)
        return (level * s.cast(DType.F32)).cast(dtype)

    return node.pointwise(formula, x, scale, *([zero] if zero is not None else []))


@operator("QuantizeLinear")
def QuantizeLinear(node: OnnxNode, x: Value, scale: Value, zero: Value | None = None) -> Value:
    dtype = DType.U8 if zero is None else zero.dtype
    if zero is None and node.integer("output_dtype", 0):
        dtype = dtype_of(node.integer("output_dtype"), node.where)
    axis, block = node.integer("axis", 1), node.integer("block_size", 0)
    axis = node.axis(axis, x.rank) if block else axis
    scale = along_axis(node, x, scale, axis, block)
    return quantize(node, x, scale, along_axis(node, x, zero, axis, block) if zero is not None else None, dtype)


@operator("DequantizeLinear")
def DequantizeLinear(node: OnnxNode, x: Value, scale: Value, zero: Value | None = None) -> Value:
    axis, block = node.integer("axis", 1), node.integer("block_size", 0)
    axis = node.axis(axis, x.rank) if block else axis
    dtype = dtype_of(node.integer("output_dtype", 0), node.where) if node.integer("output_dtype", 0) else scale.dtype
    scale = along_axis(node, x, scale, axis, block)
    return dequantize(node, x, scale, along_axis(node, x, zero, axis, block) if zero is not None else None, dtype)


def _levels(node: OnnxNode, x: Value, zero: Value | None, axis: int, dtype: DType = DType.F32) -> Value:
    """The integers less their zero point, as floats."""
    if zero is None or zero.rank == 0 or zero.shape == (1,):
        point = node.reshape(zero, ()) if zero is not None else None
    else:
        point = along_axis(node, x, zero, axis, 0) if zero.rank == 1 else zero
    if point is None:
        return node.cast(x, dtype)
    return node.pointwise(lambda t, z: t.cast(dtype) - z.cast(dtype), x, point)


@operator("MatMulInteger")
def MatMulInteger(
    node: OnnxNode, a: Value, b: Value, a_zero: Value | None = None, b_zero: Value | None = None
) -> Value:
    left, right = _levels(node, a, a_zero, a.rank - 2), _levels(node, b, b_zero, b.rank - 1)
    return node.cast(MatMul(node, left, right), DType.I32)


@operator("ConvInteger")
def ConvInteger(node: OnnxNode, x: Value, w: Value, x_zero: Value | None = None, w_zero: Value | None = None) -> Value:
    return node.cast(Conv(node, _levels(node, x, x_zero, 1), _levels(node, w, w_zero, 0)), DType.I32)


@operator("QLinearMatMul")
def QLinearMatMul(
    node: OnnxNode,
    a: Value, a_scale: Value, a_zero: Value,
    b: Value, b_scale: Value, b_zero: Value,
    y_scale: Value, y_zero: Value,
) -> Value:  # fmt: skip
    rows, columns = max(a.rank - 2, 0), max(b.rank - 1, 0)
    left = dequantize(node, a, _parameter(node, a, a_scale, rows), _parameter(node, a, a_zero, rows), DType.F32)
    right = dequantize(node, b, _parameter(node, b, b_scale, columns), _parameter(node, b, b_zero, columns), DType.F32)
    product = MatMul(node, left, right)
    return quantize(node, product, node.reshape(y_scale, ()), node.reshape(y_zero, ()), y_zero.dtype)


def _parameter(node: OnnxNode, x: Value, parameter: Value, axis: int) -> Value:
    return along_axis(node, x, parameter, axis, 0) if parameter.rank <= 1 else parameter


@operator("QLinearConv")
def QLinearConv(
    node: OnnxNode,
    x: Value, x_scale: Value, x_zero: Value,
    w: Value, w_scale: Value, w_zero: Value,
    y_scale: Value, y_zero: Value, bias: Value | None = None,
) -> Value:  # fmt: skip
    image = dequantize(node, x, node.reshape(x_scale, ()), node.reshape(x_zero, ()), DType.F32)
    weight = dequantize(node, w, along_axis(node, w, w_scale, 0, 0), along_axis(node, w, w_zero, 0, 0), DType.F32)
    addend = None
    if bias is not None:  # an int32 in units of x_scale · w_scale
        step = node.pointwise(lambda a, b: a * b, w_scale, node.reshape(x_scale, ()))
        addend = node.pointwise(lambda b, s: b.cast(DType.F32) * s, bias, step)
    result = Conv(node, image, weight, addend)
    return quantize(node, result, node.reshape(y_scale, ()), node.reshape(y_zero, ()), y_zero.dtype)
