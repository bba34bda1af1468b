"""Scatter and TopK against NumPy, on random shapes, layouts and types (conftest.py says on what)."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import ShapeError, UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Scatter, ScatterKind, TopK
from engine.targets.cuda import covering as cv
from engine.targets.cuda import scatter
from engine.targets.cuda.covering import F16, F32, I64, make_step
from tests.engine.targets.cuda.cases import check, fed, order_of, ragged, rng_of, wide
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, RunError, Runner

DTYPES = [F16, F32, DType.BF16, I64, DType.I32, DType.I16, DType.U8, DType.I8, DType.F64, DType.U16, DType.U64]


def numbers(rng: np.random.Generator, dtype: DType, shape: tuple[int, ...]) -> np.ndarray:
    """Small whole numbers, so that every order of a sum or product has the same result."""
    return rng.integers(0, 3, shape).astype(dtype.numpy)


def indices(rng: np.random.Generator, size: int, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Indices from either end that do not name a place twice along `axis` (which has at most `size`)."""
    ranked = np.argsort(rng.random((*shape[:axis], size, *shape[axis + 1 :])), axis=axis)
    chosen = np.take(ranked, np.arange(shape[axis]), axis=axis)
    return np.where(rng.random(shape) < 0.5, chosen, chosen - size)


def test_scatter_of_elements(runner: Runner, count: int) -> None:
    rng, cases = rng_of("elements"), []
    for i in range(count):
        rank, dtype, kind = int(rng.integers(1, 4)), DTYPES[i % len(DTYPES)], list(ScatterKind)[i % 5]
        shape = tuple(ragged(rng, 40) for _ in range(rank))
        axis = int(rng.integers(0, rank))
        part = tuple(int(rng.integers(1, size + 1)) for size in shape)
        index_type = [I64, DType.I32][i % 2]
        twice = kind is not ScatterKind.REPLACE and i % 3 == 0
        index = rng.integers(-shape[axis], shape[axis], part) if twice else indices(rng, shape[axis], part, axis)
        inputs: list[cv.Given] = [
            fed(dtype, shape, int(rng.integers(0, rank)), 0), (index_type, part),
            fed(dtype, part, int(rng.integers(0, rank)), 2),
        ]  # fmt: skip
        step = cv.results_in(make_step(Scatter(axis, kind), inputs), order_of(rng, rank))
        feeds = {0: numbers(rng, dtype, shape), 1: index.astype(index_type.numpy), 2: numbers(rng, dtype, part)}
        cases.append(Case(f"{kind} {dtype.value} {shape} {part} axis {axis}", step, 4, feeds, computed=wide(dtype)))
    check(runner, cases)


def test_scatter_of_slices(runner: Runner, count: int) -> None:
    rng, cases = rng_of("slices"), []
    for i in range(count):
        rank, dtype, kind = int(rng.integers(1, 5)), DTYPES[i % len(DTYPES)], list(ScatterKind)[i // 2 % 5]
        shape = tuple(ragged(rng, 24, 8 if axis == rank - 1 and i % 3 else 1) for axis in range(rank))
        depth = int(rng.integers(1, rank + 1))
        places = int(np.prod(shape[:depth]))
        flat = rng.permutation(places)[: int(rng.integers(1, min(places, 50) + 1))]
        index = np.stack(np.unravel_index(flat, shape[:depth]), -1)
        index -= np.where(rng.random(index.shape) < 0.5, np.array(shape[:depth]), 0)
        updates = (len(flat), *shape[depth:])
        inputs: list[cv.Given] = [
            (dtype, shape),
            (I64, index.shape),
            fed(dtype, updates, int(rng.integers(0, len(updates))), 2),
        ]
        step = make_step(Scatter(None, kind), inputs)
        feeds = {0: numbers(rng, dtype, shape), 1: index, 2: numbers(rng, dtype, updates)}
        cases.append(Case(f"{kind} {dtype.value} {shape} {index.shape}", step, 1, feeds, computed=wide(dtype)))
    check(runner, cases)


def test_rows_are_replaced_sixteen_bytes_at_a_time(runner: Runner) -> None:
    step = make_step(Scatter(None), [(F16, (10, 64)), (I64, (3, 1)), (F16, (3, 64))])
    _, launch = scatter.lower(step, runner.context)
    assert dict(launch.arguments)["elements"] == 3 * 64 // 8


def test_a_place_out_of_range_is_reported(runner: Runner) -> None:
    step = make_step(Scatter(None), [(F32, (4, 3)), (I64, (2, 1)), (F32, (2, 3))])
    launches = scatter.lower(step, runner.context)
    data, updates = np.zeros((4, 3), np.float32), np.ones((2, 3), np.float32)
    for wild in (4, -5, 2**60):
        with pytest.raises(RunError, match="index is out of range"):
            runner.run(step, launches, [data, np.array([[0], [wild]]), updates])
    runner.run(step, launches, [data, np.array([[-4], [3]]), updates])


def test_scatters_that_make_no_sense_are_refused(runner: Runner) -> None:
    step = make_step(Scatter(0), [(F32, (0, 3)), (I64, (2, 3)), (F32, (2, 3))])
    with pytest.raises(ShapeError, match="axis of size 0"):
        scatter.lower(step, runner.context)
    with pytest.raises(UnsupportedOp, match="add of bool"):
        make_step(Scatter(0, ScatterKind.ADD), [(DType.BOOL, (3,)), (I64, (3,)), (DType.BOOL, (3,))])


def test_top_k_matches_a_stable_sort(runner: Runner, family_count: int) -> None:
    """Elements that are equal, axes in any order, a row in one piece and in several, a k for which elements count."""
    rng, cases = rng_of("top k"), []
    emulated = isinstance(runner, EmulatedRunner)
    for i in range(family_count):
        rank, dtype = int(rng.integers(1, 4)), DTYPES[i % len(DTYPES)]
        shape = [int(rng.integers(1, 6)) for _ in range(rank)]
        axis = int(rng.integers(0, rank))
        shape[axis] = ragged(rng, 1500 if i % 4 == 0 and not (emulated and i % 8) else 300)
        k = ragged(rng, shape[axis])
        if i % 12 == 4:
            shape[axis] = 1100 if emulated else 3000
            k = 1025 if i % 24 == 4 else 700
        x = rng.integers(-60 if dtype.is_signed else 0, 60, shape)
        array = (x / 8 if dtype.is_float else x).astype(dtype.numpy)
        step = make_step(TopK(axis, k, bool(i % 2)), [fed(dtype, tuple(shape), int(rng.integers(0, rank)), 0)])
        step = cv.results_in(step, order_of(rng, rank))
        cases.append(Case(f"{k} of {dtype.value} {shape} axis {axis}", step, 1, {0: array}))
    check(runner, cases)


def test_top_k_orders_all_numbers(runner: Runner) -> None:
    floats = np.array([1, np.nan, -0.0, np.inf, 0.0, -np.inf, -1e-7, 1e-7])
    arrays = [floats.astype(t.numpy) for t in (F16, F32, DType.F64, DType.BF16)]
    arrays += [np.array([0, 2**64 - 1, 2**63], np.uint64), np.array([0, 2**63 - 1, -(2**63)])]
    cases = []
    for array in arrays:
        for largest in (True, False):
            step = make_step(TopK(0, len(array), largest), [(DType.of(array.dtype), array.shape)])
            cases.append(Case(f"{array.dtype} {largest}", step, 1, {0: array}))
    check(runner, cases)


def test_top_k_without_a_kernel_is_named() -> None:
    with pytest.raises(UnsupportedOp, match="TopK of bool"):
        make_step(TopK(0, 1), [(DType.BOOL, (3,))])
