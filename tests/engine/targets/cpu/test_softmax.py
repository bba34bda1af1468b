"""Softmax and log-softmax against float64, along any axis, with infinities and NaN."""

from __future__ import annotations

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Softmax
from tests.engine.targets.cpu.steps import ISAS, Layout, place, run_step

CASES = [
    ((3, 1000), 1, None),
    ((3, 7), 1, None),
    ((4, 9, 33), 1, None),
    ((2, 5, 70, 3), 2, (0, 2, 3, 1)),
    ((1,), 0, None),
    ((70,), 0, None),
    ((2, 50_000), 1, None),
]


def _reference(x: np.ndarray, axis: int, log: bool) -> np.ndarray:
    with np.errstate(all="ignore"):
        shifted = x.astype(np.float64) - x.astype(np.float64).max(axis, keepdims=True)
        total = np.exp(shifted).sum(axis, keepdims=True)
        return shifted - np.log(total) if log else np.exp(shifted) / total


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("shape", "axis", "order"), CASES)
def test_softmax_matches_float64(
    shape: tuple[int, ...], axis: int, order: tuple[int, ...] | None, log: bool, isa: str
) -> None:
    x = (np.random.default_rng(0).standard_normal(shape) * 10).astype(np.float32)
    source = ex.apply(PointOp.MUL, ex.Arg(0, DType.F32), ex.const(0.5))
    result = run_step(Softmax(axis, log, source), [place(x, Layout(order, gap=3))], isa, [Layout(order)]).outputs[0]
    expected = _reference(x * np.float32(0.5), axis, log)
    # Differences from the maximum are up to 40, rounded to float32: an error of 2e-6 in the exponent.
    np.testing.assert_allclose(result, expected, rtol=1e-5 if not log else 0, atol=4e-6 if log else 1e-30)


@pytest.mark.parametrize("isa", ISAS)
def test_infinities_and_nan_give_what_numpy_gives(isa: str) -> None:
    inf, nan = np.inf, np.nan
    x = np.array([[-inf, 1, 2], [-inf, -inf, -inf], [nan, 1, 2], [inf, 1, 2], [1e38, -1e38, 1e38]], np.float32)
    np.testing.assert_allclose(run_step(Softmax(1), [x], isa).outputs[0], _reference(x, 1, False), rtol=1e-6)


def test_float64_stays_float64() -> None:
    x = np.random.default_rng(1).standard_normal((3, 50))
    for log in (False, True):
        op = Softmax(1, log, ex.Arg(0, DType.F64), (ex.Acc(DType.F64),))
        np.testing.assert_allclose(run_step(op, [x]).outputs[0], _reference(x, 1, log), rtol=1e-13)


def test_epilogue_reads_other_inputs() -> None:
    rng = np.random.default_rng(2)
    x, y = (rng.standard_normal((4, 30)).astype(np.float32) for _ in range(2))
    op = Softmax(1, stores=(ex.apply(PointOp.ADD, ex.Acc(), ex.Arg(1, DType.F32)), ex.Acc()))
    result = run_step(op, [x, y])
    np.testing.assert_allclose(result.outputs[0], _reference(x, 1, False) + y, atol=1e-6)
    np.testing.assert_allclose(result.outputs[1], _reference(x, 1, False), rtol=1e-6)
