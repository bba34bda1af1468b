"""Which expressions are GELU, in either spelling, and SiLU: for results of 16 bits kernels compute these otherwise than
operation by operation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp

_ROUNDED, _NEAR = 2.0**-22, 1e-4  # a constant beside the number that it stands for: of fp32, and as results need it
_LINEAR = 2 * math.sqrt(2 / math.pi)  # of what the sigmoid is taken in GELU by tanh, and the share of its cubic term
_CUBIC = 0.044715

_WITH_ERF = (-1.0, -1.150390625, -0.461181640625, -0.05059814453125, 0.00656890869140625, -0.00040030479431152344)
_WITH_TANH = (-1.0009765625, -1.1416015625, -0.482421875, -0.0308074951171875, 0.00189971923828, -0.000988006591797)
"""log2 Φ(−t) for t from 0 to 6: of all halves those with which what `gelu_of_two` (kernels/epilogue/gelu.cuh) takes
from x is off the least. On average over any quarter of t by up to 7e-6 and 2e-5, in the root mean square by 8e-5; at
most, with an exponential that is off by 2⁻⁹·⁹, by 2⁻¹¹, and by 2⁻⁶ of itself and six steps of 2⁻²⁴, halves' least."""


@dataclass(frozen=True)
class Gelu:
    """x Φ(x), Φ the normal distribution's or what is close to it: ½ + ½ tanh(√(2/π) (x + 0.044715 x³))."""

    x: ex.Expr
    with_erf: bool

    @property
    def terms(self) -> tuple[float, ...]:
        """Of log2 Φ(−t), the least power of t first."""
        return _WITH_ERF if self.with_erf else _WITH_TANH

    @property
    def words(self) -> list[str]:
        """The terms as pairs of halves."""
        return [f"{int(np.float16(term).view(np.uint16)) * 0x10001:#010x}" for term in self.terms]


def gelu_of(node: ex.Expr) -> Gelu | None:
    """GELU in fp32 as the pass `canonicalise_activations` writes it: (x · ½) · (erf(x · √½) + 1), or by tanh
    x · sigmoid(x · (x² · b + a))."""
    if not isinstance(node, ex.Apply) or node.op is not PointOp.MUL or node.dtype is not DType.F32:
        return None
    for half, more in _either_way(node):
        x, erf = _scaled(half, PointOp.MUL, 0.5), _scaled(more, PointOp.ADD, 1.0)
        if x is None or not isinstance(erf, ex.Apply) or erf.op is not PointOp.ERF:
            continue
        if x.dtype is DType.F32 and _scaled(erf.args[0], PointOp.MUL, math.sqrt(0.5)) == x:
            return Gelu(x, with_erf=True)
    for x, gate in _either_way(node):
        if isinstance(gate, ex.Apply) and gate.op is PointOp.SIGMOID and _is_cubic(gate.args[0], x):
            return Gelu(x, with_erf=False)
    return None


def silu_of(node: ex.Expr) -> ex.Expr | None:
    """x where `node` is x · sigmoid(x) in fp32."""
    if isinstance(node, ex.Apply) and node.op is PointOp.MUL and node.dtype is DType.F32:
        for x, gate in _either_way(node):
            if isinstance(gate, ex.Apply) and gate.op is PointOp.SIGMOID and gate.args[0] == x:
                return x
    return None


def _is_cubic(z: ex.Expr, x: ex.Expr) -> bool:
    """Whether `z` is 2 √(2/π) (x + 0.044715 x³)."""
    if not isinstance(z, ex.Apply) or z.op is not PointOp.MUL:
        return False
    square = ex.apply(PointOp.MUL, x, x)
    for own, factor in _either_way(z):
        cubic = _scaled(factor, PointOp.ADD, _LINEAR, _NEAR)
        if own == x and cubic is not None and _scaled(cubic, PointOp.MUL, _LINEAR * _CUBIC, _NEAR) == square:
            return True
    return False


def _either_way(node: ex.Apply) -> tuple[tuple[ex.Expr, ex.Expr], tuple[ex.Expr, ex.Expr]]:
    first, second = node.args
    return (first, second), (second, first)


def _scaled(node: ex.Expr, op: PointOp, by: float, near: float = _ROUNDED) -> ex.Expr | None:
    """The other operand where `node` is `op` of anything and the constant `by`."""
    if isinstance(node, ex.Apply) and node.op is op:
        for value, other in _either_way(node):
            if isinstance(value, ex.Const) and math.isclose(float(value.value), by, rel_tol=near):
                return other
    return None
