"""Gathered convolutions by blocks in pairs that share filters or pixels, against float64; and what the tuner makes of
them (conftest.py says on what)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.plan.plan import Step
from engine.plan.tensor import Buffer, Tensor, row_major
from engine.targets.cuda import conv
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.conv import lower, lower_in
from engine.targets.cuda.conv_choices import choice_of, kernel_of, key_of, tile_text
from engine.targets.cuda.conv_geometry import Geometry, channels_last
from engine.targets.cuda.conv_simt import epilogue_for
from engine.targets.cuda.conv_wgmma import PAIRS, has_registers
from engine.targets.cuda.covering import F16, make_step, weight
from engine.targets.cuda.kernel import Context, PixelMap, TensorMap, WeightStore, ceildiv
from engine.targets.cuda.tiles import WgmmaTile
from engine.targets.cuda.tunables import OTHER_CANDIDATES, tunable
from tests.engine.targets.cuda.cases import check, check_late, ragged, rng_of
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.test_conv import BF16_, FP16, TF32, Kind, Shape, case, random_step
from tests.engine.targets.cuda.test_conv_wgmma import PANELS, conv_step, described
from tests.engine.targets.cuda.wrong_kernels import check_is_caught, emulator_or_skip

HOPPER = Context(SM_90A, 132, WeightStore())
NAMES = ("residual", "bias", "plain")


def kind_of(tile: WgmmaTile, i: int) -> Kind:
    """The types that take turns: staged results have 16 bits."""
    return (FP16, BF16_)[i // 2 % 2] if tile.slots else (FP16, BF16_, TF32)[i // 2 % 3]


def in_a_slice(tensor: Tensor, channels: int) -> Tensor:
    """A tensor in NHWC, with so many more channels in its buffer, of which eight come before its own."""
    whole = (tensor.shape[0], tensor.shape[1] + channels, *tensor.shape[2:])
    buffer = Buffer(tensor.buffer.name, tensor.buffer.kind, int(np.prod(whole)) * tensor.dtype.itemsize)
    return replace(tensor, buffer=buffer, strides=row_major(whole, channels_last(len(whole))), offset=8)


def pair_step(rng: np.random.Generator, kind: Kind, shape: Shape, name: str, channels: int = 0) -> Step:
    """A random step whose results and residual lie in NHWC, or in slices of tensors with so many more `channels`."""
    step = random_step(rng, kind, shape, name)
    residual = [in_a_slice(t, 2 * channels) if channels else nhwc(t) for t in step.inputs[3:]]
    outputs = tuple(in_a_slice(t, channels) if channels else t for t in step.outputs)
    return replace(step, inputs=(*step.inputs[:3], *residual), outputs=outputs)


def nhwc(tensor: Tensor) -> Tensor:
    return replace(tensor, strides=row_major(tensor.shape, channels_last(len(tensor.shape))))


def pair_cases(hopper: Runner, name: str, count: int, axes: int) -> list[Case]:
    """Random convolutions: strides, dilations, any pads, ragged pixels, channels and filters, residuals, results in
    slices of larger tensors."""
    rng, cases = rng_of(name), []
    for i in range(count):
        tile = replace(PAIRS[(axes + 5 * i) % len(PAIRS)], panel_bytes=PANELS[i % len(PANELS)])
        kind, multiple = kind_of(tile, i), 8 if tile.slots or i % 2 else 1
        shape = described(rng, axes, 1, ragged(rng, 200, 8), ragged(rng, 400, multiple), False, kind)
        step = pair_step(rng, kind, shape, NAMES[i % 3], channels=16 * (i % 4 == 3))
        geometry = Geometry(step)
        if not has_registers(tile, geometry):
            continue
        assert not tile.slots or epilogue_for(step, geometry.n).staged is not None
        launches = lower_in(step, geometry, tile, kind.context(hopper))
        assert all(launch.kernel.cluster == 2 for launch in launches)
        cases.append(case(rng, kind, shape, step, launches, f"{NAMES[i % 3]} {tile}"))
    return cases


@pytest.mark.parametrize(("axes", "share"), [(2, 1), (3, 3)])
def test_pairs_match_float64(hopper: Runner, count: int, axes: int, share: int) -> None:
    check(hopper, pair_cases(hopper, f"conv pairs {axes}", count // share, axes))


def test_a_tile_wholly_outside_the_result_takes_part(hopper: Runner) -> None:
    """The neighbour of the last tile along m, or along n, alone and behind whole pairs; and of shared pixels a half
    that there is not."""
    rng, cases = rng_of("conv pairs outside"), []
    tiles = (PAIRS[3], PAIRS[8]) if isinstance(hopper, EmulatedRunner) else PAIRS
    for i, tile in enumerate(tiles):
        tile, name = replace(tile, panel_bytes=PANELS[i % 3]), NAMES[i % 2]
        behind = (2 * tile.m + 6, 40) if tile.cluster_m > 1 else (tile.m + 6, 2 * tile.n + 8)
        for pixels, n in ((30, 8), behind):
            shape = Shape(replace(cv.conv_op(3), stores=()), (1, 16, 2, pixels // 2), (n, 16, 3, 3))
            step = pair_step(rng, FP16, shape, name)
            m = Geometry(step).rows
            assert tile.tiles(m, n) > ceildiv(m, tile.m) * ceildiv(n, tile.n)
            launches = lower_in(step, Geometry(step), tile, hopper.context)
            cases.append(case(rng, FP16, shape, step, launches, f"{name} {tile}"))
    check_late(hopper, cases)


def test_pairs_follow_each_other_in_one_run(hopper: Runner) -> None:
    """Launches may overlap: the barriers of one are not those of the next. A block takes several tiles."""
    images, n, tiles = (2, 264, PAIRS[9:10]) if isinstance(hopper, EmulatedRunner) else (99, 520, PAIRS)
    cases = []
    for tile in tiles:
        step = make_step(cv.conv_op(3), [cv.channels_inner(images, 24, 9, 11), weight(n, 24, 3, 3), weight(n, 1, 1)])
        launches = lower_in(step, Geometry(step), tile, hopper.context)
        cases.append(Case(f"{tile}", step, 9 * 24, lowered=launches * 2, rounding=2.0**-21))
    check(hopper, cases)


WRONG = {
    "a block brings its pixels to itself": ("all_sharers<CLUSTER_N>(), place...", "1 << cluster_rank(), place..."),
    "both bring the same pixels": ("PatchWalk(p, first_row + first_pixel(), step)", "PatchWalk(p, first_row, step)"),
    "both halves land in one place": ("destination + first_pixel() * PANEL_BYTES", "destination"),
}
"""Kernels that are wrong: what stands in their source, and instead of it."""


@pytest.mark.parametrize("what", WRONG)
def test_the_emulator_shows_what_is_wrong_with_shared_pixels(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = emulator_or_skip()
    step = make_step(cv.conv_op(3), [(F16, (1, 72, 9, 9)), weight(72, 72, 3, 3), weight(72, 1, 1)])
    launches = lower_in(step, Geometry(step), PAIRS[5], runner.context)
    check_is_caught(runner, Case(what, step, 9 * 72, lowered=launches, rounding=2.0**-21), WRONG[what], monkeypatch)


# Which tile

LARGE = conv_step((32, 256, 56, 56), (256, 256, 3, 3), pad=1)


def test_pairs_are_launched_in_whole_clusters() -> None:
    for tile in PAIRS:
        assert tile.cluster == 2 and tile.most_splits == 1 and tile.shared_bytes <= SM_90A.shared_bytes
        for multiprocessors, blocks in ((132, 132), (113, 112), (1, 2)):
            context = replace(HOPPER, multiprocessors=multiprocessors)
            (launch,) = lower_in(LARGE, Geometry(LARGE), tile, context)
            pixels, filters = (dict(launch.arguments)[name] for name in ("map_a", "map_b"))
            assert launch.kernel.cluster == 2 and launch.grid == (blocks, 1, 1)
            assert isinstance(pixels, PixelMap) and pixels.box_pixels == tile.m // tile.cluster_n
            assert isinstance(filters, TensorMap) and filters.box_rows == tile.n // tile.cluster_m


def test_pairs_are_timed_but_not_chosen_unmeasured() -> None:
    ranked = [one.tile for one in conv.tiles_of(LARGE, HOPPER)]
    pairs = [tile for tile in ranked if isinstance(tile, WgmmaTile) and tile.cluster > 1]
    assert {replace(tile, panel_bytes=128) for tile in pairs} == set(PAIRS)
    assert ranked[-len(pairs) :] == pairs
    one = tunable(LARGE, HOPPER)
    assert one is not None
    texts = [candidate.text for candidate in one.candidates]
    for kind in ("gathered in pairs", "gathered in pairs staged"):
        assert sum(tile_text(tile) in texts for tile in pairs if kernel_of(tile) == kind) == OTHER_CANDIDATES
    assert one.chosen(HOPPER) == 0
    for tile in pairs:
        timed = replace(HOPPER, choices={key_of(LARGE, LARGE, HOPPER): choice_of(tile, 1.0)})
        (launch,) = lower(LARGE, timed)
        (expected,) = lower_in(LARGE, Geometry(LARGE), tile, HOPPER)
        assert launch.kernel == expected.kernel


@pytest.mark.parametrize(
    "step",
    [
        conv_step((1, 256, 28, 28), (256, 256, 3, 3), pad=1),
        conv_step((32, 64, 56, 56), (64, 64, 3, 3), pad=1),
        conv_step((32, 256, 56, 56), (256, 64, 3, 3), pad=1, groups=4),
    ],
    ids=["few pixels", "few filters", "groups"],
)
def test_pairs_are_for_layers_of_one_group_that_fill_the_device(step: Step) -> None:
    tiles = [one.tile for one in conv.tiles_of(step, HOPPER)]
    assert any(isinstance(tile, WgmmaTile) for tile in tiles)
    pairs = [tile for tile in tiles if isinstance(tile, WgmmaTile) and tile.cluster > 1]
    assert all(tile.cluster_k > 1 for tile in pairs), "several pairs share what few tiles have of k"
