"""Convolutions on warpgroups against float64: every tile and width of panel, on random ragged shapes (conftest.py says
on what)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.ir.dtype import DType
from engine.ir.ops import Conv
from engine.plan.plan import Step
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.conv import lower, lower_in
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_simt import epilogue_for
from engine.targets.cuda.conv_wgmma import STAGED, TILES, suits
from engine.targets.cuda.covering import ACC, F16, F32, make_step, weight
from engine.targets.cuda.kernel import Context, Instruction, PixelMap, WeightStore
from engine.targets.cuda.tiles import WGMMA_TILES, WgmmaTile
from tests.engine.targets.cuda.cases import check, ragged, rng_of
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

KINDS = (FP16, BF16_, TF32)
PANELS = (128, 64, 32)


def tile_of(i: int, rng: np.random.Generator) -> WgmmaTile:
    """A tile, and the k of its results in one part or in several."""
    tile = replace(TILES[i % len(TILES)], panel_bytes=PANELS[i % len(PANELS)])
    return replace(tile, splits=min(tile.most_splits, int(rng.choice([1, 1, 2, 3, 7]))))


def described(rng: np.random.Generator, axes: int, groups: int, c: int, n: int, transposed: bool, kind: Kind) -> Shape:
    """A random convolution that the copy engine can gather."""
    while True:
        shape = random_shape(rng, axes, groups, c, n, transposed)
        shape = replace(shape, x=(int(rng.integers(1, 6)), *shape.x[1:]))
        step = random_step(rng, kind, shape, "plain")
        if suits(step, Geometry(step)):
            return shape


@pytest.mark.parametrize("axes", [2, 1, 3])
def test_implicit_product_matches_float64(hopper: Runner, count: int, axes: int) -> None:
    """Strides, dilations, even kernels and 1 × n ones, strides larger than kernels, pads on either side and negative
    ones, ragged channels and pixels, k split or not."""
    rng, cases = rng_of(f"wgmma{axes}"), []
    for i in range(count):
        kind, tile, name = KINDS[i // 2 % 3], tile_of(i, rng), EPILOGUES[i % 4]
        chunk = 16 // kind.w.itemsize
        shape = described(rng, axes, 1, ragged(rng, 200, chunk), ragged(rng, 200), i % 6 == 5, kind)
        step = random_step(rng, kind, shape, name)
        launches = lower_in(step, Geometry(step), tile, kind.context(hopper))
        cases.append(case(rng, kind, shape, step, launches, f"{name} {tile}"))
    check(hopper, cases)


def test_groups_match_float64(hopper: Runner, count: int) -> None:
    rng, cases = rng_of("wgmma groups"), []
    for i in range(count):
        kind, tile, name = KINDS[i // 2 % 3], tile_of(i, rng), EPILOGUES[i % 4]
        panel = tile.panel_bytes // kind.w.itemsize
        shape = described(rng, 2, int(rng.integers(2, 5)), ragged(rng, 100, panel), ragged(rng, 80), False, kind)
        step = random_step(rng, kind, shape, name)
        launches = lower_in(step, Geometry(step), tile, kind.context(hopper))
        cases.append(case(rng, kind, shape, step, launches, f"{name} {tile}"))
    check(hopper, cases)


def test_computed_weights_match_float64(hopper: Runner, count: int) -> None:
    rng, cases = rng_of("wgmma computed"), []
    for i in range(count):
        kind, tile = KINDS[i // 2 % 3], replace(tile_of(i, rng), splits=1)
        panel = tile.panel_bytes // kind.w.itemsize
        shape = described(rng, 2, 1, ragged(rng, 200, panel), ragged(rng, 80), False, kind)
        step = random_step(rng, kind, shape, "bias", known=False)
        launches = lower_in(step, Geometry(step), tile, kind.context(hopper))
        cases.append(case(rng, kind, shape, step, launches, f"computed {tile}"))
    check(hopper, cases)


def test_windows_of_an_image_match_float64(hopper: Runner, count: int) -> None:
    """Some of the channels, rows and pixels of a larger image. What lies around them is not a number, and must not be
    multiplied, not even by zero."""
    rng, cases = rng_of("wgmma windows"), []
    for i in range(count):
        kind, tile = KINDS[i // 2 % 3], tile_of(i, rng)
        chunk = 16 // kind.w.itemsize
        shape = described(rng, 2, 1, ragged(rng, 100, chunk if i % 2 else 1), ragged(rng, 80), False, kind)
        step = window_step(rng, kind, shape)
        assert suits(step, Geometry(step))
        launches = lower_in(step, Geometry(step), tile, kind.context(hopper))
        cases.append(case(rng, kind, shape, step, launches, f"window {tile}"))
    check(hopper, cases)


def test_panels_beyond_the_last_position_hold_zeros(hopper: Runner, count: int) -> None:
    """An infinity there would make NaN of a sum that is infinite."""
    cases, x = [], (2, 16, 5, 6)
    for panel_bytes, splits in ((64, 1), (32, 1), (128, 4)):
        step = make_step(replace(cv.conv_op(3), stores=(cv.stored(ACC),)), [(F16, x), weight(32, x[1], 3, 3)])
        image = rng_of("infinity").standard_normal(x).astype(np.float16)
        image[1, 5, 2, 2] = np.inf
        tile = WgmmaTile(64, 32, 16, splits=splits, panel_bytes=panel_bytes)
        launches = lower_in(step, Geometry(step), tile, hopper.context)
        cases.append(Case(f"{tile}", step, 9 * x[1], {0: image}, launches, rounding=2.0**-21))
    check(hopper, cases)


def test_a_block_takes_several_tiles(hopper: Runner, count: int) -> None:
    """Rings and turns wrap around, and walks go from image to image."""
    cases = []
    x, n = ((3, 40, 13, 11), 72) if count < 100 else ((40, 72, 30, 29), 264)
    for i, tile in enumerate(TILES):
        step = make_step(cv.conv_op(3), [(F16, x), weight(n, x[1], 3, 3), weight(n, 1, 1)])
        chosen = replace(tile, panel_bytes=PANELS[i % 3], splits=min(1 + i % 2, tile.most_splits))
        launches = lower_in(step, Geometry(step), chosen, hopper.context)
        cases.append(Case(f"{x} {chosen}", step, 9 * x[1], lowered=launches, rounding=2.0**-21))
    check(hopper, cases)


def test_results_through_shared_memory_match_float64(hopper: Runner, count: int) -> None:
    """In every tile: with a bias, a residual, ragged pixels and columns; a block takes several tiles."""
    rng, cases = rng_of("wgmma staged"), []
    few = replace(hopper.context, multiprocessors=3) if count < 100 else hopper.context
    for i, tile in enumerate(STAGED):
        kind, name = (FP16, BF16_)[i % 2], ("bias", "residual", "plain")[i % 3]
        shape = described(rng, 2, 1, ragged(rng, 200, 8), ragged(rng, 300, 8), False, kind)
        step = random_step(rng, kind, shape, name)
        if epilogue_for(step, Geometry(step).n).staged is None:
            continue
        chosen = replace(tile, panel_bytes=PANELS[i % 3])
        launches = lower_in(step, Geometry(step), chosen, few)
        cases.append(case(rng, kind, shape, step, launches, f"{name} {chosen}"))
    assert len(cases) > len(STAGED) // 2
    check(hopper, cases)


# Which kernel


CONTEXT = Context(SM_90A, 132, WeightStore())


def conv_step(
    x: tuple[int, ...], w: tuple[int, ...], dtype: DType = F16, strides: int = 1, pad: int = 0, dilation: int = 1,
    groups: int = 1, known: bool = True, transposed: bool = False,
) -> Step:  # fmt: skip
    axes = len(x) - 2
    op = Conv(
        (strides,) * axes, ((pad, pad),) * axes, (dilation,) * axes, groups, transposed,
        stores=(cv.stored(ACC, dtype),),
    )  # fmt: skip
    return make_step(op, [(dtype, x), weight(*w, dtype=dtype) if known else (dtype, w)])


def instructions(step: Step, tf32: bool = True) -> list[Instruction]:
    return [launch.kernel.instruction for launch in lower(step, replace(CONTEXT, tf32=tf32))]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (conv_step((32, 256, 14, 14), (256, 256, 3, 3), pad=1), [Instruction.WGMMA]),
        (conv_step((32, 256, 14, 14), (256, 256, 3, 3), DType.BF16, pad=1), [Instruction.WGMMA]),
        (conv_step((32, 256, 14, 14), (256, 256, 3, 3), F32, pad=1), [Instruction.WGMMA]),
        (conv_step((32, 256, 56, 56), (512, 256, 1, 1), strides=2), [Instruction.WGMMA]),
        (conv_step((32, 256, 14, 14), (256, 256, 1, 1), pad=1), [Instruction.WGMMA]),
        (conv_step((32, 256, 999), (256, 256, 3), pad=1), [Instruction.WGMMA]),
        (conv_step((4, 64, 9, 14, 14), (64, 64, 3, 3, 3), pad=1), [Instruction.WGMMA]),
        (conv_step((32, 256, 14, 14), (256, 64, 3, 3), pad=1, groups=4), [Instruction.WGMMA]),
        (conv_step((32, 256, 14, 14), (256, 256, 3, 3), known=False), [Instruction.NONE, Instruction.WGMMA]),
        (conv_step((32, 256, 14, 14), (256, 256, 3, 3), transposed=True), [Instruction.WGMMA]),
        # What the copy engine cannot describe.
        (conv_step((32, 256, 14, 14), (256, 256, 2, 2), strides=2, transposed=True), [Instruction.MMA]),
        (conv_step((32, 256, 99, 99), (256, 256, 2, 2), strides=9), [Instruction.MMA]),
        (conv_step((2, 64, 999), (64, 64, 2), dilation=256), [Instruction.MMA]),
        (conv_step((4, 64, 40, 14, 14), (64, 64, 3, 3, 3), dilation=16, pad=16), [Instruction.MMA]),
        (conv_step((2, 64, 9, 9), (64, 64, 3, 3), pad=129), [Instruction.MMA]),
        (conv_step((2, 60, 9, 9), (64, 60, 3, 3)), [Instruction.MMA]),
        (conv_step((32, 200, 14, 14), (200, 40, 3, 3), groups=5), [Instruction.MMA]),
    ],
)  # fmt: skip
def test_the_kernel_follows_the_shape(step: Step, expected: list[Instruction]) -> None:
    assert instructions(step) == expected


def test_a_sum_of_nothing_is_not_gathered() -> None:
    """The only output of this one meets no tap."""
    step = conv_step((2, 64, 2, 2), (64, 64, 1, 1), strides=2, pad=1, transposed=True)
    assert not suits(step, Geometry(step))


def test_fp32_is_not_rounded_unless_the_context_says_so() -> None:
    step = conv_step((32, 256, 14, 14), (256, 256, 3, 3), F32, pad=1)
    assert instructions(step, tf32=False) == [Instruction.MMA]


@pytest.mark.parametrize(("channels", "panel"), [(64, 64), (256, 64), (32, 32), (40, 64)])
def test_panels_follow_the_channels(channels: int, panel: int) -> None:
    """Few channels come in narrow panels, several kernel positions to a stage."""
    (launch,) = lower(conv_step((32, channels, 56, 56), (64, channels, 3, 3), pad=1, strides=2), CONTEXT)
    (image,) = (argument for _, argument in launch.arguments if isinstance(argument, PixelMap))
    assert image.box_channels == panel


def test_one_kernel_serves_every_image_size_kernel_and_stride() -> None:
    found = set()
    for size, kernel, strides, pad in ((56, 3, 1, 1), (57, 3, 2, 1), (9, 5, 1, 0), (30, 2, 3, 2)):
        step = conv_step((4, 64, size, size), (64, 64, kernel, kernel), strides=strides, pad=pad)
        (launch,) = lower_in(step, Geometry(step), WGMMA_TILES[0], CONTEXT)
        found.add(launch.kernel)
    assert len(found) == 1


def test_deep_layers_of_one_image_split_their_sums() -> None:
    (launch,) = lower(conv_step((1, 512, 7, 7), (512, 512, 3, 3), pad=1), CONTEXT)
    assert launch.grid[1] * launch.kernel.cluster > 1
    (launch,) = lower(conv_step((32, 64, 56, 56), (64, 64, 3, 3), pad=1), CONTEXT)
    assert launch.grid[1] == 1


def test_columns_are_cut_where_little_is_left_empty() -> None:
    """320 columns in two tiles of 160."""
    step = conv_step((32, 320, 20, 20), (320, 320, 3, 3), pad=1, strides=2)
    (launch,) = lower(step, CONTEXT)
    assert "tile_n = 160" in launch.kernel.source.text
