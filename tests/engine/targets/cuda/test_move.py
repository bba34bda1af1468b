"""Gather, concatenation and padding against NumPy, on random shapes, layouts and types (conftest.py says on what)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Concat, Gather, Pad, PadMode, Pointwise
from engine.targets.cuda import concat, gather, pad
from engine.targets.cuda import covering as cv
from engine.targets.cuda.conv import channels_last
from engine.targets.cuda.covering import F16, F32, I64, make_step
from tests.engine.targets.cuda.cases import check, fed, order_of, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, RunError, Runner

DTYPES = [F16, F32, DType.BF16, I64, DType.I32, DType.I16, DType.U8, DType.BOOL, DType.F64]


def content(rng: np.random.Generator, dtype: DType, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that every type holds exactly."""
    return rng.integers(0, 2 if dtype is DType.BOOL else 120, shape).astype(dtype.numpy)


def laid_out(rng: np.random.Generator, dtype: DType, shape: tuple[int, ...], number: int = 0) -> cv.Given:
    """An operand with any axis innermost."""
    return fed(dtype, shape, int(rng.integers(0, len(shape))), number) if shape else (dtype, shape)


def test_gather_along_any_axis(runner: Runner, count: int) -> None:
    rng, cases = rng_of("gather"), []
    for i in range(count):
        rank, dtype = int(rng.integers(1, 4)), DTYPES[i % len(DTYPES)]
        shape = tuple(ragged(rng, 70, 8 if axis == rank - 1 and i % 2 else 1) for axis in range(rank))
        axis = int(rng.integers(0, rank))
        index_shape = tuple(ragged(rng, 40) for _ in range(int(rng.integers(0, 3))))
        index_type = [I64, DType.I32, DType.U8][i % 3]
        lowest = 0 if index_type is DType.U8 else -shape[axis]
        index = rng.integers(lowest, shape[axis], index_shape).astype(index_type.numpy)
        step = make_step(Gather(axis), [laid_out(rng, dtype, shape), (index_type, index_shape)])
        step = cv.results_in(step, order_of(rng, len(step.outputs[0].shape)))
        feeds = {0: content(rng, dtype, shape), 1: index}
        cases.append(Case(f"{dtype.value} {shape} axis {axis} by {index_shape}", step, 1, feeds))
    check(runner, cases)


def test_gathered_operands_of_expressions(runner: Runner, count: int) -> None:
    """Rows of a table, and single elements of it: the index stands still, or moves along the columns."""
    rng, cases = rng_of("lookup"), []
    for i in range(count):
        features = () if i % 2 else (ragged(rng, 40),)
        table, index_shape = (ragged(rng, 60), *features), (ragged(rng, 9), ragged(rng, 50))
        op = Pointwise((cv.stored(cv.mul(cv.arg(0), cv.constant(0.5))),), ((0, 1),))
        index = rng.integers(-table[0], table[0], index_shape)
        step = make_step(op, [(F16, table), (I64, index_shape)])
        cases.append(Case(f"{table} by {index_shape}", step, 1, {1: index}))
    check(runner, cases)


@pytest.mark.parametrize("axis", [0, 1])
def test_an_index_out_of_range_is_reported(runner: Runner, axis: int) -> None:
    step = make_step(Gather(axis), [(F16, (7, 7)), (I64, (3,))])
    launches = gather.lower(step, runner.context)
    for wild in (7, -8, 2**60, -(2**60)):
        with pytest.raises(RunError, match="index is out of range"):
            runner.run(step, launches, [np.zeros((7, 7), np.float16), np.array([0, wild, 1])])
    runner.run(step, launches, [np.zeros((7, 7), np.float16), np.array([0, -7, 6])])


def test_a_gather_from_nothing_is_refused(runner: Runner) -> None:
    with pytest.raises(ShapeError, match="axis of size 0"):
        gather.lower(make_step(Gather(1), [(F16, (3, 0)), (I64, (2,))]), runner.context)


def test_concatenation_copies_every_part_to_its_slice(runner: Runner, count: int) -> None:
    rng, cases = rng_of("concat"), []
    for i in range(count):
        rank, dtype = int(rng.integers(1, 5)), DTYPES[i % len(DTYPES)]
        shape = tuple(ragged(rng, 30, 8 if axis == rank - 1 and i % 2 else 1) for axis in range(rank))
        axis = int(rng.integers(0, rank))
        parts = [(*shape[:axis], int(rng.integers(0, 20)), *shape[axis + 1 :]) for _ in range(int(rng.integers(1, 4)))]
        parts.append(shape)
        step = make_step(Concat(axis), [laid_out(rng, dtype, part, number) for number, part in enumerate(parts)])
        step = cv.results_in(step, order_of(rng, rank))
        feeds = {number: content(rng, dtype, part) for number, part in enumerate(parts)}
        cases.append(Case(f"{dtype.value} {parts} axis {axis}", step, 1, feeds))
    check(runner, cases)


def test_parts_that_lie_in_place_are_not_copied(runner: Runner) -> None:
    step = make_step(Concat(1), [(F16, (4, 2)), (F16, (4, 4))])
    (whole,) = step.outputs
    left = replace(whole, shape=(4, 2))
    moved = replace(step, inputs=(left, step.inputs[1]))
    assert len(concat.lower(step, runner.context)) == 2
    assert len(concat.lower(moved, runner.context)) == 1


def test_a_copy_keeps_every_bit(runner: Runner) -> None:
    """Integers of 64 bits, and floats that are not numbers, go through a copy as they are."""
    values = {
        I64: np.array([2**63 - 1, -(2**63), 2**53 + 1]),
        DType.U64: np.array([2**64 - 1, 2**53 + 1, 0], np.uint64),
        DType.F64: np.array([np.pi, np.inf, np.nan]),
    }
    cases = []
    for dtype, array in values.items():
        step = make_step(Pointwise((ex.Arg(0, dtype),)), [(dtype, (3,))])
        cases.append(Case(dtype.value, step, 1, {0: array}))
    check(runner, cases)


def test_padding_in_every_mode(runner: Runner, count: int) -> None:
    rng, cases = rng_of("pad"), []
    for i in range(count):
        rank, dtype, mode = int(rng.integers(1, 6)), DTYPES[i % len(DTYPES)], list(PadMode)[i % 5]
        shape = tuple(ragged(rng, 20, 8 if axis == rank - 1 and i % 2 else 1) for axis in range(rank))
        # Also pads longer than the source, axes left alone, and axes of which hardly anything stays.
        pads = tuple(
            (0, 0)
            if rng.random() < 0.4
            else (int(rng.integers(-min(3, size - 1), 9)), int(rng.integers(max(1 - size, -3) + min(3, size - 1), 9)))
            for size in shape
        )
        if mode is PadMode.ROLL:
            pads = tuple((begin, -begin) for begin, _ in pads)
        op = Pad(pads, mode, 1 if dtype is DType.BOOL else 7)
        step = cv.results_in(make_step(op, [laid_out(rng, dtype, shape)]), order_of(rng, rank))
        cases.append(Case(f"{dtype.value} {shape} {pads} {mode}", step, 1, {0: content(rng, dtype, shape)}))
    check(runner, cases)


def test_images_are_padded_sixteen_bytes_at_a_time(runner: Runner) -> None:
    image = fed(F16, (2, 16, 5, 5), 1, 0)
    pads = ((0, 0), (0, 0), (1, 2), (2, 1))
    step = cv.results_in(make_step(Pad(pads, PadMode.CONSTANT, -2.5), [image]), channels_last(4))
    (launch,) = pad.lower(step, runner.context)
    assert dict(launch.arguments)["elements"] == step.outputs[0].elements // 8
    check(runner, [Case("image", step, 1)])


def test_nothing_has_no_edge(runner: Runner) -> None:
    with pytest.raises(ShapeError, match="nothing to edge"):
        pad.lower(make_step(Pad(((1, 1),), PadMode.EDGE), [(F16, (0,))]), runner.context)
    step = make_step(Pad(((1, 1),), PadMode.CONSTANT, 3), [(F16, (0,))])
    check(runner, [Case("constant", step, 1)])
