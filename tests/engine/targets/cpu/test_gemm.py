from __future__ import annotations

from dataclasses import replace
from math import erf

import numpy as np
import pytest

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Gemm
from engine.plan.tensor import Tensor
from engine.targets.cpu import tiling
from engine.targets.cpu.families import family_of
from tests.engine.targets.cpu.products import assert_sum_of_products, clamp, computed, op
from tests.engine.targets.cpu.steps import ISAS, Layout, place, run_step

pytestmark = pytest.mark.parametrize("isa", ISAS)
F32 = DType.F32


def transposed(b: np.ndarray) -> Tensor:
    """`b` as a view of its transpose: neighbours along the reduction."""
    tensor = place(np.ascontiguousarray(np.swapaxes(b, -1, -2)))
    strides = (*tensor.strides[:-2], tensor.strides[-1], tensor.strides[-2])
    return replace(tensor, shape=b.shape, strides=strides)


def product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b, np.abs(a) @ np.abs(b)


@pytest.mark.parametrize("seed", range(30))
def test_random_shapes_operands_and_epilogues(isa: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    m, k, n = (int(rng.integers(1, limit)) for limit in (60, 200, 150))
    dtype = np.float64 if seed % 5 == 0 else np.float32
    a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
    bias, residual = rng.standard_normal(n).astype(dtype), rng.standard_normal((m, n)).astype(dtype)
    right = transposed(b) if seed % 3 == 0 else place(b, Layout(gap=4))
    right = right if seed % 2 else computed(right)
    kind = DType.of(a.dtype)
    store = clamp(op(PointOp.ADD, op(PointOp.ADD, ex.Acc(kind), ex.Arg(2, kind)), ex.Arg(3, kind)), kind)
    inputs = [place(a, Layout(gap=3)), right, place(bias), place(residual, Layout(gap=7))]
    got = run_step(Gemm((store,)), inputs, isa, [Layout(gap=5)]).outputs[0]
    expected, magnitude = product(a, b)
    assert_sum_of_products(got, np.clip(expected + bias + residual, 0, 6), magnitude, k)


@pytest.mark.parametrize("m", range(1, 20))
@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 17, 24, 40, 48, 49, 56, 97])
def test_every_tail_of_rows_and_columns(isa: str, m: int, n: int) -> None:
    rng = np.random.default_rng(m * 100 + n)
    a, b = rng.standard_normal((m, 11)).astype(np.float32), rng.standard_normal((11, n)).astype(np.float32)
    got = run_step(Gemm(), [a, b], isa, [Layout(gap=1)]).outputs[0]
    assert_sum_of_products(got, *product(a, b), 11)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize(
    ("left", "right"), [((3,), ()), ((2, 3), (3,)), ((2, 1), (1, 3)), ((), (4,)), ((2, 3), (2, 1)), ((1,), (5,))]
)
def test_leading_axes_broadcast(isa: str, known: bool, m: int, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    rng = np.random.default_rng(7)
    a, b = rng.standard_normal((*left, m, 33)), rng.standard_normal((*right, 33, 20))
    a, b = a.astype(np.float32), b.astype(np.float32)
    got = run_step(Gemm(), [a, place(b) if known else computed(place(b))], isa).outputs[0]
    assert_sum_of_products(got, *product(a, b), 33)


@pytest.mark.parametrize(("m", "n"), [(1, 50), (17, 100), (30, 33)])
def test_long_reductions_are_cut(isa: str, m: int, n: int) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((m, 9001)).astype(np.float32), rng.standard_normal((9001, n)).astype(np.float32)
    got = run_step(Gemm(), [a, b], isa).outputs[0]
    assert_sum_of_products(got, *product(a, b), 9001)


@pytest.mark.parametrize("known", [True, False])
def test_no_task_is_longer_than_the_bound(monkeypatch: pytest.MonkeyPatch, isa: str, known: bool) -> None:
    """What waits for a program in the background to give way waits for a task."""
    rng = np.random.default_rng(4)
    m, k, n = 2000, 64, 400
    a, b = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)
    monkeypatch.setattr(tiling, "_MOST_PER_TASK", 1 << 20)
    result = run_step(Gemm(), [a, place(b) if known else computed(place(b))], isa)
    assert_sum_of_products(result.outputs[0], *product(a, b), k)
    assert sum(launch.tasks for launch in result.launches) >= m * k * n >> 20


def test_empty_reduction_is_zero(isa: str) -> None:
    for right in (place(np.zeros((0, 5), np.float32)), computed(place(np.zeros((0, 5), np.float32)))):
        got = run_step(Gemm(), [np.zeros((3, 0), np.float32), right], isa).outputs[0]
        assert (got == 0).all()


def test_two_stores_of_different_types_with_an_elementary_function(isa: str) -> None:
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((21, 40)).astype(np.float32), rng.standard_normal((40, 70)).astype(np.float32)
    gelu = op(PointOp.MUL, ex.Acc(), op(PointOp.ERF, ex.Acc()))
    positive = op(PointOp.LT, ex.const(0.0), ex.Acc())
    got, signs = run_step(Gemm((gelu, positive)), [a, b], isa).outputs
    expected, magnitude = product(a, b)
    assert_sum_of_products(got, expected * np.vectorize(erf)(expected), 3 * magnitude, 40)
    assert signs.dtype == np.bool_
    assert (signs == (got != 0))[np.abs(expected) > 1e-3].sum() > 0
    clear = np.abs(expected) > 1e-3
    assert (signs == (expected > 0))[clear].all()


def test_columns_of_the_epilogue_that_do_not_move(isa: str) -> None:
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((2, 9, 12)).astype(np.float32), rng.standard_normal((12, 35)).astype(np.float32)
    row, scalar = rng.standard_normal((2, 9, 1)).astype(np.float32), np.array(0.5, np.float32)
    store = op(PointOp.MUL, op(PointOp.ADD, ex.Acc(), ex.Arg(2, F32)), ex.Arg(3, F32))
    got = run_step(Gemm((store,)), [a, b, row, scalar], isa).outputs[0]
    expected, magnitude = product(a, b)
    assert_sum_of_products(got, (expected + row) * 0.5, magnitude, 12)


def test_nan_and_infinity_pass_through(isa: str) -> None:
    a = np.ones((20, 6), np.float32)
    a[3, 2], a[5, 1], a[7, 0] = np.nan, np.inf, -np.inf
    b = np.ones((6, 40), np.float32)
    got = run_step(Gemm((clamp(ex.Acc(), F32),)), [a, b], isa).outputs[0]
    assert np.isnan(got[3]).all()
    assert (got[5] == 6).all()
    assert (got[7] == 0).all()
    assert (np.delete(got, [3, 5, 7], 0) == 6).all()


def test_a_row_is_the_same_alone_and_in_a_batch(isa: str) -> None:
    rng = np.random.default_rng(8)
    a, b = rng.standard_normal((37, 100)).astype(np.float32), rng.standard_normal((100, 50)).astype(np.float32)
    together = run_step(Gemm(), [a, b], isa).outputs[0]
    for i in (0, 17, 36):
        assert (run_step(Gemm(), [a[i : i + 1], b], isa).outputs[0] == together[i]).all()


def test_another_number_of_rows_needs_no_other_kernel(isa: str) -> None:
    b = np.ones((8, 70), np.float32)
    specs = {
        launch.spec
        for m in (1, 3, 64, 500)
        for launch in run_step(Gemm(), [np.ones((m, 8), np.float32), b], isa).launches
    }
    assert len(specs) == 2  # full panels and the last one


def test_integers_are_refused_by_name(isa: str) -> None:
    a = place(np.ones((2, 2), np.int32))
    with pytest.raises(UnsupportedOp, match="Gemm of i32"):
        family_of(Gemm()).requirements(Gemm(), (a, a))
