"""Scatter and TopK against the interpreter: kinds, types, layouts, indices at both ends."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import ShapeError, UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.graph import Value, make_node
from engine.ir.ops import Op, Scatter, ScatterKind, TopK
from engine.targets.cpu import scatter, top_k
from tests.engine import ir_interpreter
from tests.engine.targets.cpu.steps import ISAS, Layout, place, run_step

DTYPES = [DType.F32, DType.F64, DType.I64, DType.U8, DType.I16]


def expected(op: Op, inputs: list[np.ndarray]) -> list[np.ndarray]:
    values = [Value(str(i), DType.of(array.dtype), array.shape) for i, array in enumerate(inputs)]
    return ir_interpreter.run_node(make_node(op, values, "test"), inputs, {})


def numbers(rng: np.random.Generator, dtype: DType, shape: tuple[int, ...]) -> np.ndarray:
    """Small whole numbers, so that every order of a sum has the same result."""
    return rng.integers(0, 4, shape).astype(dtype.numpy)


def distinct(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Indices that do not name a place twice, from either end."""
    index = rng.permutation(size)[:count]
    return np.where(rng.random(count) < 0.5, index, index - size)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ScatterKind)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.value)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order", [None, (2, 0, 1)])
def test_scatter_of_elements(
    order: tuple[int, ...] | None, axis: int, dtype: DType, kind: ScatterKind, isa: str
) -> None:
    rng = np.random.default_rng(axis)
    data, shape = numbers(rng, dtype, (6, 7, 20)), [3, 4, 19]
    lines = np.apply_along_axis(lambda line: distinct(rng, data.shape[axis], len(line)), axis, np.zeros(shape))
    index = lines.astype(np.int64)
    updates = numbers(rng, dtype, index.shape)
    op = Scatter(axis, kind)
    got = run_step(op, [place(data, Layout(order)), index, place(updates, Layout(order))], isa, [Layout(order, gap=3)])
    np.testing.assert_array_equal(got.outputs[0], expected(op, [data, index, updates])[0])
    assert got.status == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ScatterKind)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.value)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_scatter_of_slices(depth: int, dtype: DType, kind: ScatterKind, isa: str) -> None:
    rng = np.random.default_rng(depth)
    data = numbers(rng, dtype, (6, 7, 37))
    flat = distinct(rng, int(np.prod(data.shape[:depth])), 6)
    index = np.stack(np.unravel_index(flat % np.prod(data.shape[:depth]), data.shape[:depth]), -1).reshape(2, 3, depth)
    index[0] -= np.array(data.shape[:depth])
    updates = numbers(rng, dtype, (2, 3, *data.shape[depth:]))
    op = Scatter(None, kind)
    got = run_step(op, [data, index.astype(np.int32), updates], isa)
    np.testing.assert_array_equal(got.outputs[0], expected(op, [data, index, updates])[0])


def test_updates_of_one_place_add_up_and_the_last_one_stays() -> None:
    data, index = np.zeros(4, np.float32), np.array([1, 1, -3, 2])
    updates = np.array([1, 2, 4, 8], np.float32)
    assert run_step(Scatter(0, ScatterKind.ADD), [data, index, updates]).outputs[0].tolist() == [0, 7, 8, 0]
    assert run_step(Scatter(0), [data, index, updates]).outputs[0].tolist() == [0, 4, 8, 0]


@pytest.mark.parametrize("bad", [4, -5, 2**60])
def test_a_place_out_of_range_is_reported(bad: int) -> None:
    data, updates = np.zeros((4, 3), np.float32), np.ones((2, 3), np.float32)
    assert run_step(Scatter(None), [data, np.array([[0], [bad]]), updates]).status == 1
    assert run_step(Scatter(0), [data, np.array([[0, 0, bad]]), updates[:1]]).status == 1


def test_scatters_that_make_no_sense_are_refused() -> None:
    data, updates = np.zeros((4, 3), np.float32), np.ones((2, 3), np.float32)
    with pytest.raises(ShapeError, match="Scatter"):
        run_step(Scatter(None), [data, np.zeros((2, 1), np.int64), updates[:, :2]])
    with pytest.raises(ShapeError, match="Scatter"):
        run_step(Scatter(0), [data, np.zeros((2, 4), np.int64), np.zeros((2, 4), np.float32)])
    with pytest.raises(ShapeError, match="axis of size 0"):
        run_step(Scatter(0), [data[:0], np.zeros((2, 3), np.int64), updates])
    with pytest.raises(UnsupportedOp, match="add of bool"):
        scatter.requirements(Scatter(0, ScatterKind.ADD), (place(np.zeros(3, bool)),) * 3)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, DType.U64, DType.I8, DType.F16, DType.BF16], ids=lambda d: d.value)
@pytest.mark.parametrize(("shape", "axis", "k"), [((5, 40), 1, 7), ((5, 40), 0, 5), ((2, 33, 3), 1, 33), ((6,), 0, 1)])
def test_top_k_matches_a_stable_sort(shape: tuple[int, ...], axis: int, k: int, dtype: DType, largest: bool) -> None:
    rng = np.random.default_rng(k)
    x = rng.integers(0, 25, shape)  # with elements that are equal
    if dtype.is_signed:
        x -= 12
    array = x.astype(dtype.numpy)
    op = TopK(axis, k, largest)
    orders = (None, (1, 0)) if len(shape) == 2 else (None,)
    for order in orders:
        result = run_step(op, [place(array, Layout(order, gap=2))], layouts=[Layout(order, step=2), Layout(order)])
        for got, want in zip(result.outputs, expected(op, [array]), strict=True):
            np.testing.assert_array_equal(got, want)


def test_top_k_orders_all_floats() -> None:
    x = np.array([1, np.nan, -0.0, np.inf, 0.0, -np.inf, -1e-40, 1e-40], np.float32)
    for largest in (True, False):
        for array in (x, x.astype(np.float64)):
            op = TopK(0, len(x), largest)
            np.testing.assert_array_equal(run_step(op, [array]).outputs[1], expected(op, [array])[1])


def test_top_k_of_the_widest_integers() -> None:
    for array in (np.array([0, 2**64 - 1, 2**63], np.uint64), np.array([0, 2**63 - 1, -(2**63)])):
        for largest in (True, False):
            op = TopK(0, 2, largest)
            np.testing.assert_array_equal(run_step(op, [array]).outputs[1], expected(op, [array])[1])


def test_top_k_of_long_rows() -> None:
    x = np.random.default_rng(0).standard_normal((3, 20000)).astype(np.float32)
    for k in (100, 20000):
        np.testing.assert_array_equal(run_step(TopK(1, k), [x]).outputs[1], expected(TopK(1, k), [x])[1])


def test_top_k_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ShapeError, match="TopK: 5 of 4"):
        run_step(TopK(0, 5), [np.zeros(4, np.float32)])
    with pytest.raises(UnsupportedOp, match="TopK of bool"):
        top_k.requirements(TopK(0, 1), (place(np.zeros(3, bool)),))
