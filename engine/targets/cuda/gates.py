"""Which expressions are activations x · Φ(x) with a smooth gate Φ: GELU in both spellings, SiLU, quick GELU. For
results of 16 bits kernels compute these otherwise than operation by operation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp

_ROUNDED = 2.0**-22  # a constant of a model beside the number that it stands for

_GELU_TERMS = (0.7978515625, 2.349609375, -1.279296875)
"""x Φ(x), Φ the normal distribution's, is x · (½ + ½ tanh(x · P)) with these of min(x² / 64, 1), but for 3.3e-5 of x:
the least maximum of all that are halves."""

_LEAST_TERM, _MOST_TERM = 2.0**-10, 8.0
"""Terms that halves hold well, and with which a large x has the gate 0 or 1 also where its square is too large for
one."""


@dataclass(frozen=True)
class Gated:
    """x · (½ + ½ tanh(x · P)), `terms` of P as `gated` of kernels/epilogue/gated.cuh has them."""

    x: ex.Expr
    terms: tuple[float, ...]

    @property
    def words(self) -> list[str]:
        """The terms as pairs of halves."""
        return [f"{int(np.float16(term).view(np.uint16)) * 0x10001:#010x}" for term in self.terms]


def gated_nodes(roots: Sequence[ex.Expr]) -> Iterator[tuple[ex.Expr, Gated]]:
    """Every such activation in fp32 that can be computed in halves, inner ones first, where all roots have 16 bits."""
    if all(root.dtype in (DType.F16, DType.BF16) for root in roots):
        for node in ex.walk(*roots):
            gated = _gated_of(node)
            if gated is not None:
                yield node, gated


def gelu_of(node: ex.Expr) -> ex.Expr | None:
    """x where `node` is (x · ½) · (erf(x · √½) + 1) in fp32, as the pass `canonicalise_activations` writes it."""
    if not isinstance(node, ex.Apply) or node.op is not PointOp.MUL or node.dtype is not DType.F32:
        return None
    for half, more in _either_way(node):
        x, erf = _scaled(half, PointOp.MUL, 0.5), _scaled(more, PointOp.ADD, 1.0)
        if x is None or not isinstance(erf, ex.Apply) or erf.op is not PointOp.ERF:
            continue
        if x.dtype is DType.F32 and _scaled(erf.args[0], PointOp.MUL, math.sqrt(0.5)) == x:
            return x
    return None


def _gated_of(node: ex.Expr) -> Gated | None:
    x = gelu_of(node)
    if x is not None:
        return Gated(x, _GELU_TERMS)
    if not isinstance(node, ex.Apply) or node.op is not PointOp.MUL or node.dtype is not DType.F32:
        return None
    for x, gate in _either_way(node):
        if isinstance(gate, ex.Apply) and gate.op is PointOp.SIGMOID:
            terms = _terms_of(gate.args[0], x)
            if terms is not None and all(_LEAST_TERM <= term <= _MOST_TERM for term in terms):
                return Gated(x, terms)
    return None


def _terms_of(z: ex.Expr, x: ex.Expr) -> tuple[float, ...] | None:
    """Of sigmoid(z) = ½ + ½ tanh(z / 2) with z = x, a · x, or x · (x² · b + a)."""
    if z == x:
        return (0.5,)
    if not isinstance(z, ex.Apply) or z.op is not PointOp.MUL:
        return None
    for own, factor in _either_way(z):
        if own == x and isinstance(factor, ex.Const):
            return (float(factor.value) / 2,)
        if own == x and isinstance(factor, ex.Apply) and factor.op is PointOp.ADD:
            return _cubic_terms(factor, x)
    return None


def _cubic_terms(total: ex.Apply, x: ex.Expr) -> tuple[float, ...] | None:
    square = ex.apply(PointOp.MUL, x, x)
    for cubic, linear in _either_way(total):
        if isinstance(linear, ex.Const) and isinstance(cubic, ex.Apply) and cubic.op is PointOp.MUL:
            for power, factor in _either_way(cubic):
                if power == square and isinstance(factor, ex.Const):
                    return (float(linear.value) / 2, float(factor.value) / 2)
    return None


def _either_way(node: ex.Apply) -> tuple[tuple[ex.Expr, ex.Expr], tuple[ex.Expr, ex.Expr]]:
    first, second = node.args
    return (first, second), (second, first)


def _scaled(node: ex.Expr, op: PointOp, by: float) -> ex.Expr | None:
    """The other operand where `node` is `op` of anything and the constant `by`."""
    if isinstance(node, ex.Apply) and node.op is op:
        for value, other in _either_way(node):
            if isinstance(value, ex.Const) and math.isclose(float(value.value), by, rel_tol=_ROUNDED):
                return other
    return None
