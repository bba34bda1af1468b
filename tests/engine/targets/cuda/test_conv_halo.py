"""Convolutions that bring the pixels under a tile once, against float64: every tile, on random ragged shapes
(conftest.py says on what)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from engine.plan.plan import Step
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.conv import lower, lower_in
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_halo import Grid, HaloTile, candidates, has_halo
from engine.targets.cuda.covering import ACC, F16, F32, make_step, weight
from engine.targets.cuda.kernel import Context, WeightStore
from tests.engine.targets.cuda.cases import check, check_late, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.test_conv import (
    BF16_,
    EPILOGUES,
    FP16,
    TF32,
    Kind,
    Shape,
    case,
    random_shape,
    random_step,
    window_step,
)
from tests.engine.targets.cuda.test_conv_stem import in_nhwc
from tests.engine.targets.cuda.test_conv_wgmma import conv_step

KINDS = (FP16, BF16_, TF32)
CONTEXT = Context(SM_90A, 132, WeightStore())


def at_stride_one(
    rng: np.random.Generator,
    axes: int,
    kind: Kind,
    channels: int,
    columns: int,
    takes: Callable[[Step, Geometry], bool],
) -> Shape:
    """A random convolution at stride 1 of so many bytes of channels and so many columns at most, that is taken."""
    while True:
        c = ragged(rng, channels // kind.w.itemsize, 16 // kind.w.itemsize)
        shape = random_shape(rng, axes, 1, c, ragged(rng, columns))
        op = replace(shape.op, strides=(1,) * axes)
        shape = replace(shape, op=op, x=(int(rng.integers(1, 6)), *shape.x[1:]))
        step = random_step(rng, kind, shape, "plain")
        if takes(step, Geometry(step)):
            return shape


def surrounded(rng: np.random.Generator, axes: int, kind: Kind) -> Shape:
    """A random convolution at stride 1 whose channels fit a panel."""
    return at_stride_one(rng, axes, kind, 128, 150, has_halo)


def tile_of(rng: np.random.Generator, shape: Shape, kind: Kind, context: Context) -> HaloTile:
    """One of the tiles that fit."""
    step = random_step(rng, kind, shape, "plain")
    fitting = list(candidates(step, Geometry(step), context))
    return fitting[int(rng.integers(len(fitting)))]


@pytest.mark.parametrize("axes", [2, 1])
def test_halo_matches_float64(hopper: Runner, count: int, axes: int) -> None:
    """Dilations, even kernels and 1 × n ones, pads of either side, larger than the kernel's reach and negative at the
    end, ragged channels and pixels, walks from image to image."""
    rng, cases = rng_of(f"halo{axes}"), []
    for i in range(count):
        kind, name = KINDS[i // 2 % 3], EPILOGUES[i % 4]
        shape = surrounded(rng, axes, kind)
        tile = tile_of(rng, shape, kind, kind.context(hopper))
        step = random_step(rng, kind, shape, name)
        launches = lower_in(step, Geometry(step), tile, kind.context(hopper))
        cases.append(case(rng, kind, shape, step, launches, f"{name} {tile}"))
    check(hopper, cases)


def test_windows_of_an_image_match_float64(hopper: Runner, count: int) -> None:
    """Some of the channels, rows and pixels of a larger image. What lies around them is not a number, and must not be
    multiplied, not even by zero."""
    rng, cases = rng_of("halo windows"), []
    for i in range(count):
        kind = KINDS[i // 2 % 3]
        shape = surrounded(rng, 2, kind)
        tile = tile_of(rng, shape, kind, kind.context(hopper))
        step = window_step(rng, kind, shape)
        assert has_halo(step, Geometry(step))
        launches = lower_in(step, Geometry(step), tile, kind.context(hopper))
        cases.append(case(rng, kind, shape, step, launches, f"window {tile}"))
    check(hopper, cases)


def test_wide_images_beside_narrow_weights_run_elsewhere(hopper: Runner) -> None:
    """A model's input in fp32, whose pixels the copy engine could bring, but not round."""
    cases = []
    for channels in (8, 16, 32, 72):
        step = make_step(cv.conv_op(3), [(F32, (2, channels, 9, 10)), weight(64, channels, 3, 3), weight(64, 1, 1)])
        step = in_nhwc(step)
        assert not has_halo(step, Geometry(step))
        image = rng_of("wide").standard_normal((2, channels, 9, 10)).astype(np.float16).astype(np.float32)
        cases.append(Case(f"{channels}", step, 9 * channels, {0: image}, rounding=2.0**-21))
    check(hopper, cases)


def test_what_lies_beside_a_line_is_not_seen(hopper: Runner, count: int) -> None:
    """The pixels next to a line's end in the grid are padding, however much there is on either side: an infinity at the
    edges would show."""
    cases = []
    for pads in (((1, 1), (1, 1)), ((2, 0), (0, 2)), ((0, 3), (3, 0)), ((0, 0), (0, 0))):
        op = replace(cv.conv_op(3), pads=pads, stores=(cv.stored(ACC),))
        step = make_step(op, [(F16, (3, 16, 5, 6)), weight(32, 16, 3, 3)])
        image = rng_of("edges").standard_normal((3, 16, 5, 6)).astype(np.float16)
        image[1, 3, 2, 5] = image[1, 4, 4, 1] = np.inf
        launches = lower_in(step, Geometry(step), HaloTile(128, 32, 2), hopper.context)
        cases.append(Case(f"{pads}", step, 9 * 16, {0: image}, launches, rounding=2.0**-21))
    check(hopper, cases)


def test_a_block_takes_several_tiles(hopper: Runner, count: int) -> None:
    """Rings and turns wrap around; columns are shared between blocks."""
    cases = []
    x, n = ((5, 40, 13, 11), 72) if count < 100 else ((60, 64, 30, 29), 264)
    few = replace(hopper.context, multiprocessors=2) if count < 100 else hopper.context
    straight = (HaloTile(128, 64, 2), HaloTile(128, 32, 3), HaloTile(192, 64, 4), HaloTile(128, 128, 2))
    swapped = (HaloTile(192, 64, 3, swapped=True), HaloTile(128, 128, 2, swapped=True))
    for tile in straight + swapped:
        step = make_step(cv.conv_op(3), [(F16, x), weight(n, x[1], 3, 3), weight(n, 1, 1)])
        launches = lower_in(step, Geometry(step), tile, few)
        cases.append(Case(f"{x} {tile}", step, 9 * x[1], lowered=launches, rounding=2.0**-21))
    check_late(hopper, cases)


# Which convolutions


@pytest.mark.parametrize(
    ("x", "w", "options", "expected"),
    [
        ((32, 64, 56, 56), (64, 64, 3, 3), {"pad": 1}, True),
        ((32, 40, 56, 56), (64, 40, 5, 5), {"pad": 2}, True),
        ((32, 64, 56, 56), (64, 64, 3, 3), {"pad": 2, "dilation": 2}, True),
        ((32, 64, 999), (64, 64, 3), {"pad": 1}, True),
        ((32, 72, 56, 56), (64, 72, 3, 3), {"pad": 1}, False),
        ((32, 64, 56, 56), (64, 64, 3, 3), {"pad": 1, "strides": 2}, False),
        ((32, 64, 56, 56), (64, 32, 3, 3), {"pad": 1, "groups": 2}, False),
        ((32, 64, 56, 56), (64, 64, 3, 3), {"pad": -1}, False),
        ((32, 64, 56, 56), (64, 64, 3, 3), {"pad": 1, "known": False}, False),
        ((2, 64, 9, 14, 14), (64, 64, 3, 3, 3), {"pad": 1}, False),
        ((32, 33, 56, 56), (64, 33, 3, 3), {"pad": 1}, False),
    ],
)
def test_which_convolutions_have_a_halo(
    x: tuple[int, ...], w: tuple[int, ...], options: dict[str, int], expected: bool
) -> None:
    step = conv_step(x, w, **options)  # type: ignore[arg-type]
    assert has_halo(step, Geometry(step)) == expected


def test_fp32_has_half_the_channels() -> None:
    for channels, expected in ((32, True), (36, False)):
        step = conv_step((8, channels, 56, 56), (64, channels, 3, 3), F32, pad=1)
        assert has_halo(step, Geometry(step)) == expected


def test_deep_batches_of_few_channels_take_it() -> None:
    (launch,) = lower(conv_step((128, 64, 56, 56), (64, 64, 3, 3), pad=1), CONTEXT)
    assert '"conv_halo.cuh"' in launch.kernel.source.text
    assert launch.kernel.shared_bytes <= SM_90A.shared_bytes


def test_lines_are_as_long_as_the_image_with_the_larger_padding() -> None:
    """Outputs in a grid of 57 × 57 places: the pixel behind a line is the next line's padding."""
    grid = Grid.of(Geometry(conv_step((2, 64, 56, 56), (64, 64, 3, 3), pad=1)))
    assert (grid.height, grid.width, grid.reach) == (57, 57, (2, 2))
    assert grid.halo(HaloTile(128, 64, 2)) == 248
