"""Point-wise kernels and copies: layouts, dtypes, broadcasting, gathered tables, empty tensors."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Pointwise
from tests.engine.targets.cpu.steps import ISAS, Layout, place, run_step

F32 = DType.F32
COPY = Pointwise((ex.Arg(0, F32),))


def _add(i: int, j: int) -> ex.Expr:
    return ex.apply(PointOp.ADD, ex.Arg(i, F32), ex.Arg(j, F32))


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 70, 19, 33), (3, 16, 8, 64)])
def test_copy_between_any_two_orders_of_axes(shape: tuple[int, ...], order: tuple[int, ...], isa: str) -> None:
    x = _random(*shape)
    for source in (None, (0, 2, 3, 1)):
        result = run_step(COPY, [place(x, Layout(source, gap=2))], isa, [Layout(order)])
        np.testing.assert_array_equal(result.outputs[0], x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [d for d in DType if d is not DType.STRING], ids=lambda d: d.value)
def test_transpose_of_every_dtype(dtype: DType, isa: str) -> None:
    x = np.random.default_rng(1).integers(0, 2 if dtype is DType.BOOL else 100, (3, 70, 133)).astype(dtype.numpy)
    result = run_step(Pointwise((ex.Arg(0, dtype),)), [x], isa, [Layout((2, 0, 1))])
    np.testing.assert_array_equal(result.outputs[0], x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [DType.F32, DType.I64, DType.U8, DType.F16, DType.BOOL], ids=lambda d: d.value)
def test_strided_source_and_target(dtype: DType, isa: str) -> None:
    x = np.random.default_rng(2).integers(0, 2, (5, 6, 37)).astype(dtype.numpy)
    layout = Layout((1, 0, 2), gap=1, step=2)
    result = run_step(Pointwise((ex.Arg(0, dtype),)), [place(x, layout)], isa, [Layout((2, 1, 0), step=2)])
    np.testing.assert_array_equal(result.outputs[0], x)


@pytest.mark.parametrize("isa", ISAS)
def test_reversed_view_is_read_backwards(isa: str) -> None:
    x = _random(4, 40)
    tensor = place(x)
    backwards = replace(tensor, strides=(40, -1), offset=tensor.offset + 39)
    np.testing.assert_array_equal(run_step(COPY, [backwards], isa).outputs[0], x[:, ::-1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 5, 7), (5, 1)),
        ((1,), (4, 1, 9)),
        ((), ()),
        ((2, 1, 1, 1, 3, 1, 2, 2), (1, 3, 2, 1, 1, 4, 2, 1)),
        ((70, 1), (1, 65)),
    ],
)
def test_operands_broadcast(shapes: tuple[tuple[int, ...], ...], isa: str) -> None:
    a, b = _random(*shapes[0]), _random(*shapes[1], seed=1)
    np.testing.assert_allclose(run_step(Pointwise((_add(0, 1),)), [a, b], isa).outputs[0], a + b, rtol=1e-7)


@pytest.mark.parametrize("isa", ISAS)
def test_several_stores_of_different_dtypes_and_layouts(isa: str) -> None:
    a, b = _random(2, 64, 37, 11), _random(1, 64, 1, 1, seed=1)
    less = ex.apply(PointOp.LT, ex.Arg(0, F32), ex.Arg(1, F32))
    op = Pointwise((_add(0, 1), less, ex.cast(ex.Arg(0, F32), DType.I64)))
    layouts = [Layout((0, 2, 3, 1)), Layout((3, 1, 0, 2), gap=3, step=2), Layout()]
    result = run_step(op, [place(a, Layout((0, 2, 3, 1))), b], isa, layouts)
    np.testing.assert_allclose(result.outputs[0], a + b, rtol=1e-7)
    np.testing.assert_array_equal(result.outputs[1], a < b)
    np.testing.assert_array_equal(result.outputs[2], a.astype(np.int64))


@pytest.mark.parametrize("shape", [(0,), (3, 0, 5)])
def test_empty_tensor_needs_no_launch(shape: tuple[int, ...]) -> None:
    result = run_step(COPY, [_random(*shape)])
    assert result.outputs[0].shape == shape
    assert not result.launches


def test_constant_fills_its_output() -> None:
    one = ex.apply(PointOp.ADD, ex.apply(PointOp.MUL, ex.Arg(0, F32), ex.const(0.0)), ex.const(1.0))
    np.testing.assert_array_equal(run_step(Pointwise((one,)), [_random(9, 9)]).outputs[0], np.ones((9, 9)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("index_dtype", [np.int64, np.int32])
@pytest.mark.parametrize("width", [1, 33, 64])
def test_gathered_table_reads_rows_from_both_ends(width: int, index_dtype: type, isa: str) -> None:
    table, bias = _random(50, width), _random(9, width, seed=1)
    index = np.random.default_rng(3).integers(-50, 50, (4, 9)).astype(index_dtype)
    result = run_step(Pointwise((_add(0, 2),), gathers=((0, 1),)), [table, index, bias], isa)
    np.testing.assert_allclose(result.outputs[0], table[index] + bias, rtol=1e-7)
    assert result.status == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("index_dtype", [np.int64, np.int32])
@pytest.mark.parametrize("shape", [(50, 33), (50, 4, 8), (50,)])
def test_rows_of_no_index_are_zeros(shape: tuple[int, ...], index_dtype: type, isa: str) -> None:
    """How rows of tokens go back to [batch, sequence]: -1 stands for none. The row that it reads, the last one,
    does not show, whatever it holds."""
    table = _random(*shape)
    table[-1] = np.nan
    index = np.random.default_rng(3).permutation(np.r_[np.full(13, -1), 0:49])[:60].reshape(5, 12).astype(index_dtype)
    places = index.reshape(5, 12, *(1,) * (len(shape) - 1))
    none = ex.apply(PointOp.LT, ex.Arg(2, DType.of(places.dtype)), ex.const(0, DType.of(places.dtype)))
    rows = ex.apply(PointOp.WHERE, none, ex.const(0.0), ex.Arg(0, F32))
    result = run_step(Pointwise((rows,), gathers=((0, 1),)), [table, index, places], isa)
    assert result.status == 0
    np.testing.assert_array_equal(result.outputs[0], np.where(places < 0, np.float32(0), table[index]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [50, -51, 2**62, -(2**62)])
@pytest.mark.parametrize("shape", [(50, 33), (50,)])
def test_index_out_of_range_is_reported_and_reads_row_zero(shape: tuple[int, ...], bad: int, isa: str) -> None:
    table = _random(*shape)
    index = np.random.default_rng(3).integers(-50, 50, (4, 9))
    index[2, 3] = bad
    result = run_step(Pointwise((ex.Arg(0, F32),), gathers=((0, 1),)), [table, index], isa)
    assert result.status == 1
    np.testing.assert_array_equal(result.outputs[0][2, 3], table[0])


def test_index_into_an_empty_table_is_refused() -> None:
    op = Pointwise((ex.Arg(0, F32),), gathers=((0, 1),))
    with pytest.raises(ShapeError, match="lookup: an index selects from an axis of size 0"):
        run_step(op, [_random(0, 4), np.zeros(3, np.int64)], name="lookup")


def test_large_copy_is_cut_into_tasks() -> None:
    x = _random(300, 1000)
    result = run_step(COPY, [x], threads=4)
    assert result.launches[0].tasks > 4
    np.testing.assert_array_equal(result.outputs[0], x)
