"""float64 references of the heavy operators, and the bound that a float sum of products must keep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Conv
from engine.plan.tensor import Buffer, BufferKind, Tensor


def computed(tensor: Tensor) -> Tensor:
    """The same tensor as if an earlier step had computed it: its content is not known when kernels are chosen."""
    buffer = Buffer(tensor.buffer.name, BufferKind.ARENA, tensor.buffer.nbytes, tensor.buffer.data)
    return replace(tensor, buffer=buffer)


def assert_sum_of_products(
    got: np.ndarray, expected: np.ndarray, magnitude: np.ndarray, terms: int, about: object = ""
) -> None:
    """|got − expected| ≤ ε·(2 + √terms)·(Σ|aᵢbᵢ| + 20): rounding errors of a sum grow like the root of its length where
    they are independent; the constant covers the epilogue, whose operands are of order one."""
    bound = np.finfo(got.dtype).eps * (2 + terms**0.5) * (magnitude + 20)
    wrong = ~(np.abs(got - expected) <= bound)  # also where the result is NaN
    assert not wrong.any(), f"{about}: {wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}"


def op(kind: PointOp, *args: ex.Expr) -> ex.Expr:
    return ex.apply(kind, *args)


def clamp(value: ex.Expr, dtype: DType, low: float = 0.0, high: float = 6.0) -> ex.Expr:
    return op(PointOp.MIN, op(PointOp.MAX, value, ex.const(low, dtype)), ex.const(high, dtype))


def conv_reference(x: np.ndarray, w: np.ndarray, conv: Conv, shape: tuple[int, ...]) -> np.ndarray:
    """The convolution in float64, tap by tap."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    out = np.zeros(shape)
    channels, outputs = x.shape[1] // conv.groups, shape[1] // conv.groups
    for tap in np.ndindex(*w.shape[2:]):
        for g in range(conv.groups):
            inside, outside = slice(g * channels, (g + 1) * channels), slice(g * outputs, (g + 1) * outputs)
            if conv.transposed:
                _scatter(x[:, inside], w[(inside, slice(None), *tap)], tap, conv, out[:, outside])
            else:
                windows = _windows(x[:, inside], tap, conv, shape[2:])
                out[:, outside] += np.einsum("nc...,oc->no...", windows, w[(outside, slice(None), *tap)])
    return out


def _windows(x: np.ndarray, tap: tuple[int, ...], conv: Conv, size: tuple[int, ...]) -> np.ndarray:
    padded = np.pad(x, [(0, 0), (0, 0), *conv.pads])
    starts = [k * d for k, d in zip(tap, conv.dilations, strict=True)]
    windows = [slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, size, conv.strides, strict=True)]
    return padded[(slice(None), slice(None), *windows)]


def _scatter(x: np.ndarray, w: np.ndarray, tap: tuple[int, ...], conv: Conv, out: np.ndarray) -> None:
    for at in np.ndindex(*x.shape[2:]):
        place = [
            i * s + k * d - begin
            for i, s, k, d, (begin, _) in zip(at, conv.strides, tap, conv.dilations, conv.pads, strict=True)
        ]
        if all(0 <= p < n for p, n in zip(place, out.shape[2:], strict=True)):
            out[(slice(None), slice(None), *place)] += x[(slice(None), slice(None), *at)] @ w
