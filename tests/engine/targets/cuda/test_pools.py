"""Pools against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Pool, PoolKind
from engine.plan.plan import Step
from engine.plan.tensor import row_major
from engine.targets.cuda import covering as cv
from engine.targets.cuda.conv import channels_last
from engine.targets.cuda.covering import ACC, F16, F32, make_step
from engine.targets.cuda.pool import lower, requirements
from tests.engine.targets.cuda.cases import FLOATS, INTEGERS, check, narrowed, placed, ragged, reordered, rng_of, wide
from tests.engine.targets.cuda.harness import Case, Runner

MAX, AVERAGE = PoolKind.MAX, PoolKind.AVERAGE


def random_pool(rng: np.random.Generator, spatial: int, kind: PoolKind, dtype: DType) -> tuple[Pool, tuple[int, ...]]:
    """A pool as the frontend makes them (pads below the window's extent), and the size of its images."""
    kernel = tuple(int(rng.integers(1, 5)) for _ in range(spatial))
    dilations = tuple(int(rng.choice([1, 1, 2, 3])) for _ in range(spatial))
    strides = tuple(int(rng.integers(1, 4)) for _ in range(spatial))
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    pads = tuple((int(rng.integers(0, r + 1)), int(rng.integers(0, r + 1))) for r in reach)
    size = tuple(r + 1 + int(rng.integers(0, 20 if spatial < 3 else 6)) for r in reach)
    include, ceil = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    return Pool(kind, kernel, strides, pads, dilations, ceil, include, (narrowed(dtype),)), size


def with_channels_inner(step: Step) -> Step:
    order = channels_last(len(step.outputs[0].shape))
    image = replace(step.inputs[0], strides=row_major(step.inputs[0].shape, order))
    result = replace(step.outputs[0], strides=row_major(step.outputs[0].shape, order))
    return replace(step, inputs=(image, *step.inputs[1:]), outputs=(result,))


def test_pools_match_float64(runner: Runner, count: int) -> None:
    """Of one to three axes, in every type, with channels inner, outer and anywhere."""
    rng, cases = rng_of("pool"), []
    for i in range(2 * count):
        spatial, kind = int(rng.integers(1, 4)), (MAX, AVERAGE)[i % 2]
        types = (*FLOATS, *INTEGERS) if kind is MAX else FLOATS
        dtype = F16 if i % 3 == 0 else types[int(rng.integers(len(types)))]
        op, size = random_pool(rng, spatial, kind, dtype)
        shape = (int(rng.integers(1, 4)), ragged(rng, 70 if spatial < 3 else 20, 8 if i % 3 else 1), *size)
        layout = int(rng.integers(3))
        step = make_step(op, [(dtype, shape) if layout < 2 else placed(rng, dtype, shape)])
        step = [step, with_channels_inner(step), reordered(step, rng)][layout]
        feeds = {0: rng.integers(0, 100, shape).astype(dtype.numpy)} if dtype.is_int else {}
        cases.append(Case(f"{op} {dtype} {shape} {layout}", step, 125, feeds, computed=wide(dtype)))
    check(runner, cases)


def test_large_windows_match_float64(runner: Runner, count: int) -> None:
    """Over the whole image, which is a reduction; and nearly, which warps share."""
    rng, cases = rng_of("large"), []
    for i in range(count):
        kind, dtype = (MAX, AVERAGE)[i % 2], FLOATS[i % 4]
        size = (int(rng.integers(9, 40)), int(rng.integers(9, 40)))
        less = (0, 0) if i % 3 == 0 else (int(rng.integers(0, 3)), int(rng.integers(0, 3)))
        kernel = (size[0] - less[0], size[1] - less[1])
        pads = ((1, 1), (0, 2)) if i % 4 == 3 else ((0, 0), (0, 0))
        op = Pool(kind, kernel, (1, 1), pads, (1, 1), False, bool(i % 5 < 2), (narrowed(dtype),))
        shape = (int(rng.integers(1, 3)), ragged(rng, 40, 8 if i % 3 else 1), *size)
        step = make_step(op, [(dtype, shape)])
        step = with_channels_inner(step) if i % 4 < 2 else step
        cases.append(Case(f"{op} {shape}", step, 1600, computed=wide(dtype)))
    check(runner, cases)


def test_a_pool_over_the_image_is_a_reduction(runner: Runner) -> None:
    op = Pool(AVERAGE, (7, 7), (1, 1), ((0, 0), (0, 0)), (1, 1), stores=(cv.stored(ACC),))
    assert [launch.kernel.family for launch in lower(make_step(op, [(F16, (2, 64, 7, 7))]), runner.context)] == [
        "reduce"
    ]
    assert [launch.kernel.family for launch in lower(make_step(op, [(F16, (2, 64, 8, 7))]), runner.context)] == ["pool"]


def test_nans_of_windows_are_kept(runner: Runner) -> None:
    content = rng_of("pool nan").standard_normal((2, 8, 9, 9)).astype(np.float32)
    content[0, :4, 4, 4] = np.nan
    content[1, 2:, 3, 3] = np.inf
    content[1, 4:, 0, 0] = -np.inf
    cases = []
    for kind in PoolKind:
        for dtype in FLOATS[:3]:
            op = Pool(kind, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), stores=(narrowed(dtype),))
            step = make_step(op, [(dtype, content.shape)])
            for placed_step in (step, with_channels_inner(step)):
                feeds = {0: content.astype(dtype.numpy)}
                cases.append(Case(f"{kind} {dtype}", placed_step, 9, feeds, computed=F32))
    check(runner, cases)


def test_an_average_of_integers_is_refused() -> None:
    op = Pool(MAX, (2,), (1,), ((0, 0),), (1,), stores=(narrowed(DType.I32),))
    step = make_step(op, [(DType.I32, (1, 8, 5))])
    with pytest.raises(UnsupportedOp, match="average"):
        requirements(replace(op, kind=AVERAGE), step.inputs)
