"""Convolutions of many channels that bring the pixels under a tile once a panel, against float64: every tile, on random
ragged shapes (conftest.py says on what)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.conv import lower, lower_in
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_halo_deep import DeepTile, candidates, has_deep_halo
from engine.targets.cuda.conv_variants import variants
from engine.targets.cuda.covering import ACC, F16, make_step, weight
from engine.targets.cuda.kernel import Context
from tests.engine.targets.cuda.cases import check, rng_of
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.test_conv import (
    EPILOGUES,
    Kind,
    Shape,
    case,
    random_step,
    window_step,
)
from tests.engine.targets.cuda.test_conv_halo import CONTEXT, KINDS, at_stride_one
from tests.engine.targets.cuda.test_conv_wgmma import conv_step


def surrounded(rng: np.random.Generator, axes: int, kind: Kind) -> Shape:
    """A random convolution at stride 1 of a few panels of channels."""
    return at_stride_one(rng, axes, kind, 500, 300, has_deep_halo)


def tile_of(i: int, rng: np.random.Generator, shape: Shape, kind: Kind, context: Context) -> DeepTile:
    """One of the tiles that fit, sometimes with rings as short as they get."""
    step = random_step(rng, kind, shape, "plain")
    fitting = list(candidates(step, Geometry(step), context))
    tile = fitting[int(rng.integers(len(fitting)))]
    return replace(tile, stages=2) if i % 2 else tile


@pytest.mark.parametrize("axes", [2, 1])
def test_deep_halo_matches_float64(hopper: Runner, count: int, axes: int) -> None:
    """Dilations, even kernels and 1 × n ones, pads of either side, larger than the kernel's reach and negative at the
    end, ragged channels, columns and pixels, walks from image to image."""
    rng, cases = rng_of(f"deep halo{axes}"), []
    for i in range(count):
        kind, name = KINDS[i // 2 % 3], EPILOGUES[i % 4]
        shape = surrounded(rng, axes, kind)
        tile = tile_of(i, rng, shape, kind, kind.context(hopper))
        step = random_step(rng, kind, shape, name)
        launches = lower_in(step, Geometry(step), tile, kind.context(hopper))
        cases.append(case(rng, kind, shape, step, launches, f"{name} {tile}"))
    check(hopper, cases)


def test_windows_of_an_image_match_float64(hopper: Runner, count: int) -> None:
    """Some of the channels, rows and pixels of a larger image. What lies around them is not a number, and must not be
    multiplied, not even by zero."""
    rng, cases = rng_of("deep halo windows"), []
    for i in range(count // 2):
        kind = KINDS[i // 2 % 3]
        shape = surrounded(rng, 2, kind)
        tile = tile_of(i, rng, shape, kind, kind.context(hopper))
        step = window_step(rng, kind, shape)
        assert has_deep_halo(step, Geometry(step))
        launches = lower_in(step, Geometry(step), tile, kind.context(hopper))
        cases.append(case(rng, kind, shape, step, launches, f"window {tile}"))
    check(hopper, cases)


def test_what_lies_beside_a_line_is_not_seen(hopper: Runner) -> None:
    """The pixels next to a line's end in the grid are padding: an infinity at the edges would show."""
    cases = []
    for pads in (((1, 1), (1, 1)), ((2, 0), (0, 2)), ((0, 3), (3, 0)), ((0, 0), (0, 0))):
        op = replace(cv.conv_op(3), pads=pads, stores=(cv.stored(ACC),))
        step = make_step(op, [(F16, (3, 80, 5, 6)), weight(32, 80, 3, 3)])
        image = rng_of("edges").standard_normal((3, 80, 5, 6)).astype(np.float16)
        image[1, 3, 2, 5] = image[1, 74, 4, 1] = np.inf
        for tile in (DeepTile(128, 64, 2, 3), DeepTile(96, 128, 2, 2, swapped=True, panel_bytes=64)):
            launches = lower_in(step, Geometry(step), tile, hopper.context)
            cases.append(Case(f"{pads} {tile}", step, 9 * 80, {0: image}, launches, rounding=2.0**-21))
    check(hopper, cases)


def test_a_block_takes_several_tiles(hopper: Runner, count: int) -> None:
    """Both rings go round many times; columns are shared between blocks."""
    cases = []
    x, n = ((5, 136, 13, 11), 200) if count < 100 else ((60, 328, 30, 29), 456)
    few = replace(hopper.context, multiprocessors=2) if count < 100 else hopper.context
    for tile in (
        DeepTile(128, 64, 2, 3), DeepTile(256, 96, 2, 2), DeepTile(128, 192, 3, 2), DeepTile(128, 256, 2, 2),
        DeepTile(160, 128, 2, 4, swapped=True), DeepTile(224, 128, 3, 3, swapped=True, panel_bytes=64),
    ):  # fmt: skip
        step = make_step(cv.conv_op(3), [(F16, x), weight(n, x[1], 3, 3), weight(n, 1, 1)])
        launches = lower_in(step, Geometry(step), tile, few)
        cases.append(Case(f"{x} {tile}", step, 9 * x[1], lowered=launches, rounding=2.0**-21))
    check(hopper, cases)


# Which convolutions


@pytest.mark.parametrize(
    ("x", "w", "options", "expected"),
    [
        ((32, 128, 28, 28), (128, 128, 3, 3), {"pad": 1}, True),
        ((32, 96, 160, 160), (96, 96, 3, 3), {"pad": 1}, True),
        ((32, 256, 999), (64, 256, 3), {"pad": 1}, True),
        ((32, 128, 28, 28), (128, 128, 1, 1), {}, False),
        ((32, 128, 28, 28), (128, 128, 3, 3), {"pad": 1, "strides": 2}, False),
        ((32, 128, 28, 28), (128, 64, 3, 3), {"pad": 1, "groups": 2}, False),
        ((32, 128, 28, 28), (128, 128, 3, 3), {"pad": 1, "known": False}, False),
        ((2, 128, 9, 14, 14), (64, 128, 3, 3, 3), {"pad": 1}, False),
        ((32, 129, 28, 28), (128, 129, 3, 3), {"pad": 1}, False),
    ],
)
def test_which_convolutions_have_a_deep_halo(
    x: tuple[int, ...], w: tuple[int, ...], options: dict[str, int], expected: bool
) -> None:
    step = conv_step(x, w, **options)  # type: ignore[arg-type]
    assert has_deep_halo(step, Geometry(step)) == expected


def test_it_is_taken_where_it_should_be_faster() -> None:
    """Measured: 14.8 µs beside 17.3 of 256 channels at 14 pixels; 54 beside 50 of 128 images at 28."""
    (gathered,) = lower(conv_step((128, 128, 28, 28), (128, 128, 3, 3), pad=1), CONTEXT)
    assert '"conv_halo_deep.cuh"' not in gathered.kernel.source.text
    step = conv_step((32, 256, 14, 14), (256, 256, 3, 3), pad=1)
    (deep,) = lower(step, CONTEXT)
    assert '"conv_halo_deep.cuh"' in deep.kernel.source.text
    (portable,) = lower(step, replace(CONTEXT, architecture=SM_80))
    assert '"conv_mma.cuh"' in portable.kernel.source.text


def test_every_tile_fits_shared_memory_and_sweeps_get_them() -> None:
    for step in (
        conv_step((128, 128, 28, 28), (128, 128, 3, 3), pad=1),
        conv_step((1, 96, 160, 160), (96, 96, 3, 3), pad=1),
    ):
        _present, *found = variants(step, CONTEXT, 12)
        deep = [one for one in found if '"conv_halo_deep.cuh"' in one.launches[0].kernel.source.text]
        assert len({one.name for one in deep}) == 12
        assert all(one.launches[0].kernel.shared_bytes <= SM_90A.shared_bytes for one in deep)
