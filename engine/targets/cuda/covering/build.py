"""How the steps of the covering set, of the GPU tests and of benchmarks are built: `make_step`, operands, and the usual
stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TypeAlias

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import (
    Conv,
    Op,
)
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.targets.cuda.conv_geometry import channels_last
from engine.targets.cuda.families import family_of

F16, F32, F8, I8, I64 = DType.F16, DType.F32, DType.F8E4M3, DType.I8, DType.I64
ACC = ex.Acc()
Given: TypeAlias = tuple[DType, tuple[int, ...]] | np.ndarray | Tensor


def make_step(op: Op, inputs: Sequence[Given], name: str = "step") -> Step:
    """A step of `op` alone: operands where (dtype, shape) is given, constants where an array is, tensors as they are.

    Operands and results lie densely in the order that the kernels ask for.
    """
    tensors = [_tensor(i, given) for i, given in enumerate(inputs)]
    needs, results = family_of(op).requirements(op, tuple(tensors))
    placed = tuple(
        replace(tensor, strides=row_major(tensor.shape, need.order or None)) if isinstance(given, tuple) else tensor
        for tensor, need, given in zip(tensors, needs, inputs, strict=True)
    )
    outputs = tuple(
        fresh(
            f"output{i}", BufferKind.OUTPUT, dtype, tuple(size for size in shape if isinstance(size, int)), need.order
        )
        for i, ((dtype, shape), need) in enumerate(zip(op.infer(placed), results, strict=True))
    )
    return Step(name, op, placed, outputs, op.cost(placed, outputs))


def results_in(step: Step, order: tuple[int, ...]) -> Step:
    """The same step with its results' axes in `order`, from the outermost to the innermost."""
    return replace(step, outputs=tuple(replace(t, strides=row_major(t.shape, order)) for t in step.outputs))


def _tensor(i: int, given: Given) -> Tensor:
    if isinstance(given, Tensor):
        return given
    if isinstance(given, np.ndarray):
        data = np.ascontiguousarray(given)
        buffer = Buffer(f"constant{i}", BufferKind.CONSTANT, data.nbytes, data)
        return Tensor(buffer, DType.of(data.dtype), data.shape, row_major(data.shape))
    return fresh(f"input{i}", BufferKind.INPUT, given[0], given[1], ())


def fresh(name: str, kind: BufferKind, dtype: DType, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    return Tensor(Buffer(name, kind, prod(shape) * dtype.itemsize), dtype, shape, row_major(shape, order or None))


def weight(*shape: int, dtype: DType = F16) -> np.ndarray:
    """A random constant; a matrix [k, n] or a filter [n, c, …] keeps unit variance."""
    rng = np.random.default_rng(shape)
    fan_in = shape[0] if len(shape) == 2 else prod(shape[1:])
    scaled: np.ndarray = rng.standard_normal(shape) / np.sqrt(max(1, fan_in))
    return scaled.astype(dtype.numpy)


def arg(index: int, dtype: DType = F16) -> ex.Expr:
    """Input `index` in fp32."""
    return ex.cast(ex.Arg(index, dtype), F32)


def stored(value: ex.Expr, dtype: DType = F16) -> ex.Expr:
    return ex.cast(value, dtype)


def constant(value: float) -> ex.Expr:
    return ex.Const(value, F32)


def relu6(value: ex.Expr) -> ex.Expr:
    return ex.apply(PointOp.MIN, ex.apply(PointOp.MAX, value, constant(0.0)), constant(6.0))


def gelu(value: ex.Expr) -> ex.Expr:
    erf = ex.apply(PointOp.ERF, ex.apply(PointOp.MUL, value, constant(0.7071067811865476)))
    return ex.apply(PointOp.MUL, ex.apply(PointOp.MUL, value, constant(0.5)), add(erf, constant(1.0)))


def add(a: ex.Expr, b: ex.Expr) -> ex.Expr:
    return ex.apply(PointOp.ADD, a, b)


def mul(a: ex.Expr, b: ex.Expr) -> ex.Expr:
    return ex.apply(PointOp.MUL, a, b)


BIAS = stored(add(ACC, arg(2)))
BIAS_GELU = stored(gelu(add(ACC, arg(2))))
BIAS_RELU6 = stored(relu6(add(ACC, arg(2))))
BIAS_RESIDUAL = stored(add(add(ACC, arg(2)), arg(3)))
SCALE_SHIFT = stored(add(mul(ACC, arg(1)), arg(2)))


def conv_op(kernel: int, stride: int = 1, groups: int = 1, store: ex.Expr = BIAS_RELU6, dilation: int = 1) -> Conv:
    """A 2-D convolution with "same" padding at stride 1."""
    pad = (kernel - 1) * dilation // 2
    return Conv((stride, stride), ((pad, pad), (pad, pad)), (dilation, dilation), groups, stores=(store,))


def channels_inner(n: int, c: int, h: int, w: int) -> Tensor:
    """An image in NHWC."""
    buffer = Buffer("input0", BufferKind.INPUT, 2 * n * c * h * w)
    return Tensor(buffer, F16, (n, c, h, w), row_major((n, c, h, w), channels_last(4)))
