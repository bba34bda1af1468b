"""Biases that a convolution's sums begin with: which those are, and how they lie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.plan.plan import Step
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.conv_bias import packed_bias, without_bias
from engine.targets.cuda.covering import ACC, F16, F32, make_step, weight
from engine.targets.cuda.kernel import Context, WeightStore

SHAPE = (2, 24, 9, 9)
BIASED = cv.add(ACC, cv.arg(2, F16))


def step_of(store: ex.Expr, bias: cv.Given, *more: ex.Expr) -> Step:
    op = replace(cv.conv_op(3, 1, 24), stores=(cv.stored(store), *more))
    return make_step(op, [(F16, SHAPE), weight(24, 1, 3, 3), bias])


@pytest.mark.parametrize("shape", [(24, 1, 1), (1, 24, 1, 1)])
def test_a_bias_of_channels_comes_first(shape: tuple[int, ...]) -> None:
    step, bias = without_bias(step_of(cv.relu6(BIASED), weight(*shape)))
    assert bias is not None and bias.shape == shape
    assert step.op.stores == (cv.stored(cv.relu6(ACC)),)  # type: ignore[attr-defined]
    turned = ex.apply(PointOp.ADD, ex.cast(ex.Arg(2, F16), F32), ACC)
    assert without_bias(step_of(turned, weight(*shape)))[1] is not None


def test_what_uses_the_sums_in_another_way_keeps_its_addition() -> None:
    channels = weight(24, 1, 1)
    kept = (
        step_of(ACC, channels),
        step_of(cv.mul(ACC, cv.arg(2, F16)), channels),
        step_of(ex.apply(PointOp.SUB, ACC, ex.cast(ex.Arg(2, F16), F32)), channels),
        step_of(cv.add(ACC, ACC), channels),
        step_of(cv.mul(BIASED, ACC), channels),
        step_of(BIASED, channels, cv.stored(ACC)),  # a second result without it
        step_of(ex.apply(PointOp.ADD, ex.Acc(DType.F64), ex.Arg(2, DType.F64)), weight(24, 1, 1, dtype=DType.F64)),
        step_of(cv.add(ACC, ex.cast(ex.cast(ex.Arg(2, F16), DType.F8E4M3), F32)), channels),  # rounded on its way
        step_of(cv.add(ACC, ex.cast(ex.cast(ex.Arg(2, F16), DType.I32), F32)), channels),
        step_of(cv.add(ACC, cv.constant(2.0)), channels),
        step_of(BIASED, (F16, (24, 1, 1))),  # known only when the plan runs
        step_of(BIASED, weight(24, 9, 9)),  # of pixels
        step_of(BIASED, weight(9)),  # of a column of them
        step_of(BIASED, weight(1, 1, 1)),
    )
    for step in kept:
        assert without_bias(step) == (step, None)


def test_two_results_share_it() -> None:
    step, bias = without_bias(step_of(cv.relu6(BIASED), weight(24, 1, 1), cv.stored(BIASED)))
    assert bias is not None
    assert step.op.stores == (cv.stored(cv.relu6(ACC)), cv.stored(ACC))  # type: ignore[attr-defined]


def test_behind_the_channels_lie_zeros() -> None:
    step = step_of(BIASED, weight(24, 1, 1))
    _, bias = without_bias(step)
    assert bias is not None
    packed = packed_bias(bias, 64, Context(SM_90A, 132, WeightStore())).data
    assert packed is not None and packed.dtype == np.float32 and packed.shape == (64,)
    assert np.array_equal(packed[:24], np.asarray(bias.buffer.data).reshape(-1)[:24].astype(np.float32))
    assert not packed[24:].any()
