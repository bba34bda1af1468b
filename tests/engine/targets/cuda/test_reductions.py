"""Reductions against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Reduce, ReduceKind
from engine.plan.plan import Step
from engine.targets.cuda import covering as cv
from engine.targets.cuda.covering import ACC, F16, F32, I64, make_step
from engine.targets.cuda.reduce import lower, requirements
from engine.targets.cuda.sweeps import pick_column_walk
from tests.engine.targets.cuda.cases import (
    FLOATS,
    INTEGERS,
    check,
    fed,
    narrowed,
    placed,
    ragged,
    reordered,
    rng_of,
    wide,
    wide_arg,
    wiped,
)
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner

EXTREMES = (ReduceKind.MAX, ReduceKind.MIN)


def reduction(kind: ReduceKind, axes: tuple[int, ...], dtype: DType, keepdims: bool = False) -> Reduce:
    return Reduce(kind, axes, keepdims, wide_arg(0, dtype), (narrowed(dtype),))


def random_content(rng: np.random.Generator, dtype: DType, shape: tuple[int, ...]) -> np.ndarray:
    if dtype is DType.BOOL:
        return rng.integers(0, 2, shape).astype(np.bool_)
    if dtype.is_int:
        limits = np.iinfo(dtype.numpy)
        return rng.integers(max(limits.min, -1000), min(limits.max, 1000), shape, endpoint=True).astype(dtype.numpy)
    return rng.standard_normal(shape).astype(dtype.numpy)


def test_reductions_match_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("reduce"), []
    for i in range(count):
        rank = int(rng.integers(1, 5))
        shape = tuple(ragged(rng, 60, 8 if axis == rank - 1 and i % 2 else 1) for axis in range(rank))
        axes = tuple(axis for axis in range(rank) if rng.random() < 0.5) or (rank - 1,)
        kind = list(ReduceKind)[i % 5]
        if kind is ReduceKind.PROD:
            axes = axes[:1]
        integers = i % 7 == 0 and kind is not ReduceKind.MEAN
        dtype = I64 if integers else F16
        source: ex.Expr = ex.Arg(0, I64) if integers else cv.arg(0)
        store: ex.Expr = ex.Acc(I64) if integers else ACC
        op = Reduce(kind, axes, bool(i % 2), source, (store,))
        given: cv.Given = fed(dtype, shape, int(rng.integers(0, rank)), 0) if i % 3 == 0 else (dtype, shape)
        cases.append(Case(f"{kind} {shape} {axes}", make_step(op, [given]), int(np.prod(shape)), computed=F32))
    check(runner, cases)


def test_reductions_in_every_type_and_order(runner: Runner, count: int) -> None:
    """Any axes (none, too) of operands in any order in memory; integers wrap as their types do."""
    rng, cases = rng_of("types"), []
    types = (*FLOATS, *INTEGERS, DType.BOOL)
    for i in range(2 * count):
        dtype = types[i % len(types)]
        kinds = EXTREMES if dtype is DType.BOOL else list(ReduceKind)
        kind = kinds[int(rng.integers(len(kinds)))]
        rank = int(rng.integers(1, 7))
        most = 4 if kind is ReduceKind.PROD and dtype.is_float else 50 if rank < 4 else 7
        shape = tuple(ragged(rng, most) for _ in range(rank))
        axes = tuple(axis for axis in range(rank) if rng.random() < 0.5)
        if kind is ReduceKind.MEAN and not dtype.is_float:
            kind = ReduceKind.SUM  # NumPy rounds, ONNX does not say
        op = reduction(kind, axes, dtype, bool(i % 2))
        step = make_step(op, [placed(rng, dtype, shape) if i % 3 else (dtype, shape)])
        step = reordered(step, rng) if i % 2 else step
        feeds = {0: random_content(rng, dtype, shape)}
        cases.append(Case(f"{op} {shape}", step, int(np.prod(shape)), feeds, computed=wide(dtype)))
    check(runner, cases)


def test_few_results_of_long_walks(runner: Runner, count: int) -> None:
    """Split over blocks, and joined by the last of them: on rows, on columns, of everything. Twice, with the result
    wiped in between: the counters must be left as they were found."""
    rng, cases = rng_of("split"), []
    large = 200_000 if isinstance(runner, EmulatedRunner) else 12_000_000
    types, split = (F16, F32, DType.F64, DType.I32, DType.U8, DType.BOOL), list[int]()
    for i in range(4 if isinstance(runner, EmulatedRunner) else max(4, count // 5)):  # each kind of shape once
        dtype = types[i % len(types)]
        few, long = int(rng.integers(1, 40)), int(rng.integers(large // 4, large)) // 40
        shapes = (
            ((few // 8 + 1, 8 * long), (1,)), ((16 * long, few // 8 + 1), (0,)), ((7, long, 3), (0, 1, 2)),
            ((9, 2 * long, 5), (0, 1)),
        )  # fmt: skip
        shape, axes = shapes[i % 4]
        kinds = EXTREMES if dtype is DType.BOOL else list(ReduceKind)[:4]
        kind = kinds[i % len(kinds)]
        if kind is ReduceKind.MEAN and not dtype.is_float:
            kind = ReduceKind.SUM
        step = make_step(reduction(kind, axes, dtype), [(dtype, shape)])
        feeds = {0: random_content(rng, dtype, shape)}
        launches = lower(step, runner.context)
        twice = [*launches, *wiped(step.outputs[0], runner.context), *launches]
        label, terms = f"{kind} {dtype} {shape} {axes}", int(np.prod(shape))
        cases.append(Case(label, step, terms, feeds, twice, computed=wide(dtype)))
        split += [len(axes)] * (dict(launches[0].arguments)["splits"] != 1)
    assert set(split) == {1, 2, 3}
    check(runner, cases)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 14, 56])
@pytest.mark.parametrize("value_bytes", [4, 8])
def test_a_batch_of_loads_is_as_long_as_the_walk_of_a_thread(size: int, value_bytes: int) -> None:
    """No more than the next power of two, what a batch repeats beyond the end being read in vain; and never so many
    that registers do not hold them."""
    for kept, chunks in itertools.product((1, 32, 128), (1, 8, 160)):
        walk = pick_column_walk(kept, size * size, chunks, 16, value_bytes, 132)
        steps = -(-walk.parts.size // walk.row_threads)
        assert walk.batch == 32 // value_bytes if steps >= 32 // value_bytes else steps <= walk.batch < 2 * steps


def test_averages_of_many_images_have_several_blocks_to_a_multiprocessor() -> None:
    """Global average pooling of EfficientNet at batch 128: while one block adds up, others load."""
    walk = pick_column_walk(128, 49, 160, 16, 4, 132)
    assert walk.threads == 256 and walk.parts.count == 1 and walk.tiles >= 4 * 132


def test_averages_of_images_in_every_walk(runner: Runner) -> None:
    """Channels inside: as an H100 takes them, in wide blocks, in tiles of columns, in parts."""
    cases, walks = [], set()
    for images, channels, size in ((1, 144, 56), (1, 32, 112), (1, 48, 40), (1, 20, 14), (3, 240, 14), (7, 672, 7)):
        image = cv.channels_inner(images, channels, size, size)
        op = reduction(ReduceKind.MEAN, (2, 3), F16, keepdims=True)
        step = make_step(op, [image])
        (launch,) = lower(step, replace(runner.context, multiprocessors=132))
        arguments = dict(launch.arguments)
        walks.add((launch.kernel.threads, arguments["splits"] != 1, arguments["column_tiles"] != 1))
        label = f"{images}x{channels}x{size}"
        cases.append(Case(label, step, size * size, lowered=[launch], computed=F32))
    assert {threads for threads, _, _ in walks} == {256, 512}
    assert {split for _, split, _ in walks} == {tiled for _, _, tiled in walks} == {False, True}
    check(runner, cases)


def test_a_sum_of_ten_million_terms_is_good_to_a_few_roundings(runner: Runner) -> None:
    """All positive, so that a chain of additions would be off by its length: 2⁻²² is four roundings."""
    length = 300_000 if isinstance(runner, EmulatedRunner) else 10_000_000
    content = rng_of("million").random(length).astype(np.float32)
    cases = []
    for shape, axes in (((1, length), (1,)), ((length, 1), (0,)), ((length // 8, 8), (0,)), ((8, length // 8), (1,))):
        for kind in (ReduceKind.SUM, ReduceKind.MEAN):
            step = make_step(reduction(kind, axes, F32), [(F32, shape)])
            cases.append(Case(f"{kind} {shape}", step, 1, {0: content.reshape(shape)}, computed=F32))
    check(runner, cases)


@pytest.mark.parametrize("shape", [(9, 40), (40, 9), (3, 30_000), (30_000, 3)])
def test_extremes_of_nans_are_nans(runner: Runner, shape: tuple[int, int]) -> None:
    content = rng_of("nan").standard_normal(shape).astype(np.float32)
    content[0, 0] = content[-1, -1] = np.nan
    content[1, 1] = np.inf
    content[2, 2] = -np.inf
    cases = []
    for kind in ReduceKind:
        for axis in (0, 1):
            if kind is ReduceKind.PROD and shape[axis] > 100:
                continue
            for dtype in (F16, F32, DType.F64):
                step = make_step(reduction(kind, (axis,), dtype), [(dtype, shape)])
                feeds = {0: content.astype(dtype.numpy)}
                cases.append(Case(f"{kind} {axis} {dtype}", step, shape[axis], feeds, computed=wide(dtype)))
    check(runner, cases)


def test_reductions_of_nothing_give_the_identity(runner: Runner) -> None:
    cases = []
    for kind in ReduceKind:
        for dtype in (F16, F32, DType.F64, DType.I64, DType.U8, DType.BOOL):
            if (dtype is DType.BOOL and kind not in EXTREMES) or (kind is ReduceKind.MEAN and not dtype.is_float):
                continue
            for shape, axes in (((3, 0), (1,)), ((0, 5), (0,)), ((2, 0, 3), (0, 1))):
                step = make_step(reduction(kind, axes, dtype), [(dtype, shape)])
                cases.append(Case(f"{kind} {dtype} {shape}", step, 1, computed=wide(dtype)))
    check(runner, cases)


def test_no_results_need_no_launch(runner: Runner) -> None:
    step: Step = make_step(reduction(ReduceKind.SUM, (1,), F16), [(F16, (0, 5))])
    assert lower(step, runner.context) == []


def test_a_sum_of_booleans_is_refused() -> None:
    step = make_step(reduction(ReduceKind.MAX, (0,), DType.BOOL), [(DType.BOOL, (4,))])
    with pytest.raises(UnsupportedOp, match="bool"):
        requirements(reduction(ReduceKind.SUM, (0,), DType.BOOL), step.inputs)


def test_epilogues_read_what_lies_along_the_results(runner: Runner, count: int) -> None:
    """Two inputs in the source, one in the stores, two stores."""
    rng, cases = rng_of("epilogue"), []
    for i in range(count // 2):
        shape = (ragged(rng, 9), ragged(rng, 60), ragged(rng, 60))
        axes = [(1,), (2,), (0, 2), (1, 2)][i % 4]
        kept = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
        shifted = ex.apply(ex.PointOp.SUB, cv.arg(0), cv.arg(1, F32))
        stores = (cv.stored(cv.add(ACC, cv.arg(2))), ex.apply(ex.PointOp.SQRT, ACC))
        op = Reduce(ReduceKind.SUM, axes, True, cv.mul(shifted, shifted), stores)
        step = make_step(op, [placed(rng, F16, shape), (F32, (1, shape[1], 1)), placed(rng, F16, kept, 2)])
        cases.append(Case(f"{shape} {axes}", reordered(step, rng), int(np.prod(shape)), computed=F32))
    check(runner, cases)
