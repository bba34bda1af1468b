"""Resize against float64, on random shapes, layouts, modes and types (conftest.py says on what)."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import ShapeError, UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Resize, ResizeMode
from engine.targets.cuda import covering as cv
from engine.targets.cuda import resize
from engine.targets.cuda.conv import channels_last
from engine.targets.cuda.covering import ACC, F16, F32, I64, make_step
from tests.engine.targets.cuda.cases import check, fed, order_of, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner

COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"]
ROUNDINGS = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]


def resized(rng: np.random.Generator, shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[tuple[int, ...], list]:
    """Sizes after resizing `axes`, by scales or by sizes."""
    scales: list[float | None] = [1.0] * len(shape)
    after = list(shape)
    for axis in axes:
        if rng.random() < 0.5:
            after[axis], scales[axis] = int(rng.integers(2, 40)), None
        else:
            scale = float(np.float32(rng.uniform(max(0.3, 2.0 / shape[axis]), 3.0)))
            after[axis], scales[axis] = int(np.floor(shape[axis] * scale)), scale
    return tuple(after), scales


def test_resize_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("resize"), []
    types = [F16, F32, DType.BF16, DType.F64]
    for i in range(count):
        rank, dtype, mode = int(rng.integers(1, 6)), types[i % 4], list(ResizeMode)[i % 3]
        # Channels or another axis innermost; the innermost axis may be resized itself.
        shape = tuple(ragged(rng, 24, 8 if i % 2 and axis == 1 else 1) for axis in range(rank))
        axes = tuple(axis for axis in range(rank) if rng.random() < 0.5)[-3:]
        after, scales = resized(rng, shape, axes)
        compute = dtype if dtype is DType.F64 else F32
        value = ex.cast(ex.Acc(compute), F32)
        store = cv.stored(cv.relu6(cv.add(value, cv.arg(1, F32))), dtype) if i % 5 == 0 else ex.cast(value, dtype)
        coordinates, rounding = COORDINATES[i % 5], ROUNDINGS[i // 5 % 4]
        filtered = mode is not ResizeMode.NEAREST
        op = Resize(
            after, tuple(scales), mode, coordinates, rounding, antialias=filtered and i % 8 == 5,
            exclude_outside=filtered and i % 4 == 1, stores=(store,),
        )  # fmt: skip
        inputs: list[cv.Given] = [fed(dtype, shape, int(rng.integers(0, rank)), 0)]
        inputs += [(F32, after[-1:])] if i % 5 == 0 else []
        step = cv.results_in(make_step(op, inputs), order_of(rng, rank))
        cases.append(Case(f"{dtype.value} {shape} to {after} {mode} {coordinates}", step, 64, computed=F32))
    check(runner, cases)


def test_images_with_channels_innermost(runner: Runner, count: int) -> None:
    """The common case: every access moves eight channels."""
    rng, cases = rng_of("images"), []
    for i in range(count):
        channels, batch = ragged(rng, 100, 8), int(rng.integers(1, 4))
        size = tuple(int(rng.integers(2, 20)) for _ in range(2))
        after, scales = resized(rng, (batch, channels, *size), (2, 3))
        op = Resize(after, tuple(scales), list(ResizeMode)[i % 3], COORDINATES[i % 5], stores=(cv.stored(ACC),))
        step = cv.results_in(make_step(op, [fed(F16, (batch, channels, *size), 1, 0)]), channels_last(4))
        cases.append(Case(f"{channels} {size} to {after}", step, 16, computed=F32))
    check(runner, cases)


def test_nearest_copies_every_type(runner: Runner) -> None:
    rng, cases = rng_of("nearest"), []
    for dtype in (DType.U8, I64, DType.BOOL, DType.I16):
        x = rng.integers(0, 2 if dtype is DType.BOOL else 100, (2, 3, 5, 9)).astype(dtype.numpy)
        op = Resize((2, 3, 10, 27), (None,) * 4, ResizeMode.NEAREST, "asymmetric", "floor", stores=(ex.Acc(dtype),))
        cases.append(Case(dtype.value, make_step(op, [(dtype, x.shape)]), 1, {0: x}))
    check(runner, cases)


def test_what_cannot_be_resized_is_refused(runner: Runner) -> None:
    with pytest.raises(UnsupportedOp, match="bool"):
        make_step(Resize((4,), (None,), ResizeMode.LINEAR), [(DType.BOOL, (2,))])
    step = make_step(Resize((4,), (None,), ResizeMode.LINEAR, "tf_crop_and_resize"), [(F32, (2,))])
    with pytest.raises(UnsupportedOp, match="tf_crop_and_resize"):
        resize.lower(step, runner.context)
    with pytest.raises(ShapeError, match="nothing"):
        resize.lower(make_step(Resize((4,), (None,), ResizeMode.LINEAR), [(F32, (0,))]), runner.context)
