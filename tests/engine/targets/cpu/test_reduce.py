"""Reductions against NumPy in wider types: kinds, axes, layouts, dtypes; accuracy of long sums."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Reduce, ReduceKind
from engine.targets.cpu.reduce import requirements
from tests.engine.targets.cpu.steps import ISAS, Layout, place, run_step

NHWC = (0, 2, 3, 1)
CASES = [
    ((2, 7, 9), (2,), None),
    ((2, 7, 9), (0, 1, 2), None),
    ((3, 37, 7, 7), (2, 3), NHWC),
    ((3, 37, 7, 7), (2, 3), None),
    ((3, 130, 5), (1,), None),
    ((3, 130, 5), (0, 2), None),
    ((5000,), (0,), None),
    ((6, 1000), (0,), (1, 0)),
    ((1, 1280, 7, 7), (2, 3), NHWC),
    ((1, 1), (0,), None),
    ((2, 5), (), None),
    ((2, 2, 2, 2, 2, 2, 2, 2), (0, 2, 4, 6), None),
]
NUMPY = {
    ReduceKind.SUM: np.sum,
    ReduceKind.MEAN: np.mean,
    ReduceKind.MAX: np.max,
    ReduceKind.MIN: np.min,
    ReduceKind.PROD: np.prod,
}


def _op(kind: ReduceKind, axes: tuple[int, ...], keepdims: bool, dtype: DType) -> Reduce:
    return Reduce(kind, axes, keepdims, ex.Arg(0, dtype), (ex.Acc(dtype),))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("dtype", [DType.F32, DType.F64], ids=lambda d: d.value)
@pytest.mark.parametrize("kind", ReduceKind)
@pytest.mark.parametrize(("shape", "axes", "order"), CASES)
def test_float_reduction_matches_float64(
    shape: tuple[int, ...], axes: tuple[int, ...], order: tuple[int, ...] | None, kind: ReduceKind, dtype: DType,
    keepdims: bool, isa: str,
) -> None:  # fmt: skip
    scale = 0.1 if kind is ReduceKind.PROD else 1.0
    x = (np.random.default_rng(0).standard_normal(shape) * scale + 1).astype(dtype.numpy)
    expected = NUMPY[kind](x.astype(np.float64), axis=axes, keepdims=keepdims)
    result = run_step(_op(kind, axes, keepdims, dtype), [place(x, Layout(order))], isa).outputs[0]
    terms = x.size // max(1, np.asarray(expected).size)
    # A product loses half a unit a factor; sums are compensated, and 1 is the size of their terms.
    rtol = (terms if kind is ReduceKind.PROD else 4) * (1.2e-7 if dtype is DType.F32 else 2.3e-16)
    np.testing.assert_allclose(result, expected, rtol=rtol, atol=rtol * terms if kind is ReduceKind.SUM else rtol)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [d for d in DType if d.is_int], ids=lambda d: d.value)
@pytest.mark.parametrize("kind", ReduceKind)
@pytest.mark.parametrize(("shape", "axes", "order"), CASES[:4])
def test_integer_reduction_is_exact_and_wraps(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    order: tuple[int, ...] | None,
    kind: ReduceKind,
    dtype: DType,
    isa: str,
) -> None:
    x = np.random.default_rng(0).integers(-4 if dtype.is_signed else 0, 5, shape).astype(dtype.numpy)
    result = run_step(_op(kind, axes, False, dtype), [place(x, Layout(order))], isa).outputs[0]
    if kind is ReduceKind.MEAN:
        total = np.sum(x, axis=axes, dtype=dtype.numpy).astype(np.int64)
        count = x.size // max(1, result.size)
        expected = np.sign(total) * (np.abs(total) // count)
    elif kind in (ReduceKind.SUM, ReduceKind.PROD):
        expected = NUMPY[kind](x, axis=axes, dtype=dtype.numpy)
    else:
        expected = NUMPY[kind](x, axis=axes)
    np.testing.assert_array_equal(result, expected)


def test_long_sums_are_compensated() -> None:
    x = np.full((2, 1 << 20), 0.1, np.float32)
    rows = run_step(_op(ReduceKind.SUM, (1,), False, DType.F32), [x]).outputs[0]
    np.testing.assert_allclose(rows, x.astype(np.float64).sum(1), rtol=2e-6)
    columns = run_step(_op(ReduceKind.SUM, (0,), False, DType.F32), [np.ascontiguousarray(x.T)]).outputs[0]
    np.testing.assert_allclose(columns, x.astype(np.float64).sum(1), rtol=2e-6)


def test_reduction_of_nothing_is_the_identity() -> None:
    x = np.zeros((0, 5), np.float32)
    for kind, expected in ((ReduceKind.SUM, 0), (ReduceKind.PROD, 1), (ReduceKind.MAX, -np.inf)):
        np.testing.assert_array_equal(run_step(_op(kind, (0,), False, DType.F32), [x]).outputs[0], np.full(5, expected))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("axes", [(1,), (0,)])
def test_maximum_propagates_nan(axes: tuple[int, ...], isa: str) -> None:
    x = np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32)
    x[3, 17] = np.nan
    result = run_step(_op(ReduceKind.MAX, axes, False, DType.F32), [x], isa).outputs[0]
    np.testing.assert_array_equal(result, x.max(axes))


def test_any_and_all_of_booleans() -> None:
    x = np.random.default_rng(0).integers(0, 2, (30, 3)).astype(bool)
    x[5] = True
    for kind in (ReduceKind.MAX, ReduceKind.MIN):
        result = run_step(_op(kind, (1,), False, DType.BOOL), [x]).outputs[0]
        np.testing.assert_array_equal(result, NUMPY[kind](x, axis=1))
    with pytest.raises(UnsupportedOp, match="sum of bool"):
        requirements(_op(ReduceKind.SUM, (1,), False, DType.BOOL), (place(x),))


@pytest.mark.parametrize("isa", ISAS)
def test_prologue_and_epilogue(isa: str) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 6, 5, 5)).astype(np.float32), rng.standard_normal((2, 6)).astype(np.float32)
    square = ex.apply(PointOp.MUL, ex.Arg(0, DType.F32), ex.Arg(0, DType.F32))
    op = Reduce(ReduceKind.MEAN, (2, 3), False, square, (ex.apply(PointOp.ADD, ex.Acc(), ex.Arg(1, DType.F32)),))
    for order in (None, NHWC):
        result = run_step(op, [place(x, Layout(order)), y], isa).outputs[0]
        np.testing.assert_allclose(result, (x.astype(np.float64) ** 2).mean((2, 3)) + y, atol=1e-6)
