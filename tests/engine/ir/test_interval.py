"""Intervals of expressions against their values at random arguments."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.interval import bounds

X = ex.Arg(0, DType.F32)


def apply(op: ex.PointOp, *args: ex.Expr) -> ex.Expr:
    return ex.apply(op, *args)


def clipped(low: float, high: float) -> ex.Expr:
    return apply(ex.PointOp.MIN, apply(ex.PointOp.MAX, X, ex.const(low)), ex.const(high))


@pytest.mark.parametrize(
    ("e", "expected"),
    [
        (apply(ex.PointOp.SIGMOID, X), (0, 1)),
        (ex.cast(apply(ex.PointOp.SIGMOID, X), DType.F16), (0, 1)),
        (clipped(-2, 3), (-2, 3)),
        (apply(ex.PointOp.DIV, clipped(0, 6), ex.const(6.0)), (0, 1)),
        (apply(ex.PointOp.MUL, clipped(-2, 3), clipped(-4, 1)), (-12, 8)),
        (apply(ex.PointOp.MUL, apply(ex.PointOp.SIGMOID, X), X), (-inf, inf)),
        (apply(ex.PointOp.DIV, ex.const(1.0), clipped(-1, 1)), (-inf, inf)),
        (apply(ex.PointOp.MAX, X, ex.const(0.0)), (0, inf)),
        (ex.const(float("nan")), (-inf, inf)),
        (X, (-inf, inf)),
        (ex.Acc(DType.F32), (-inf, inf)),
    ],
)
def test_bounds(e: ex.Expr, expected: tuple[float, float]) -> None:
    assert bounds(e) == expected
    if ex.uses_acc(e):
        return
    x = np.concatenate([np.random.default_rng(0).standard_normal(999) * 8, [0.0]]).astype(np.float32)
    values = np.broadcast_to(ex.evaluate(e, [x]), x.shape)
    values = values[~np.isnan(values)]
    assert np.all((values >= expected[0]) & (values <= expected[1]))
