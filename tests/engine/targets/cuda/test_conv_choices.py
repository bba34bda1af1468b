"""Tiles of convolutions that were timed on a device: how they are named and kept, and that convolutions take them.
Needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from engine.ir.dtype import DType
from engine.ir.ops import Conv, ConvExcitation, ConvMean
from engine.plan.plan import Step
from engine.targets.cuda import conv, conv_excitation, conv_mean
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import ARCHITECTURES, SM_80
from engine.targets.cuda.conv_choices import ConvTile, choice_of, chosen_among, kernel_of, key_of, tile_text
from engine.targets.cuda.conv_tiles import taken
from engine.targets.cuda.covering import ACC, F16, channels_inner, make_step, stored, weight
from engine.targets.cuda.families import family_of
from engine.targets.cuda.kernel import Context, WeightStore
from engine.targets.cuda.tiles import Choice, WgmmaTile
from engine.targets.cuda.tunables import CANDIDATES, OTHER_CANDIDATES, tunable
from tests.engine.targets.cuda.cases import told
from tests.engine.targets.cuda.test_excitation import excited

HOPPER = Context(ARCHITECTURES["sm_90a"], 132, WeightStore())


def conv_step(
    batch: int, channels: int, n: int, size: int, kernel: int = 3, stride: int = 1, groups: int = 1, dtype: DType = F16
) -> Step:
    op = cv.conv_op(kernel, stride, groups, stored(ACC, dtype))
    image = replace(channels_inner(batch, channels, size, size), dtype=dtype)
    return make_step(op, [image, weight(n, channels // groups, kernel, kernel, dtype=dtype)])


GATHERED = conv_step(1, 512, 512, 28)
HALO = conv_step(8, 64, 64, 56)
STRIDED = conv_step(4, 256, 512, 14, kernel=1, stride=2)
STEM = conv_step(4, 3, 32, 112, stride=2)
DEPTHWISE = conv_step(4, 96, 96, 56, groups=96)
STEPS = {"gathered": GATHERED, "halo": HALO, "strided": STRIDED, "stem": STEM, "depthwise": DEPTHWISE}


def tiles(step: Step, context: Context = HOPPER) -> Sequence[Choice[ConvTile]]:
    return conv.tiles_of(step, context)


def kept(step: Step, tile: ConvTile, bare: Step | None = None) -> Context:
    """The context with a tile that was timed of a step."""
    return replace(HOPPER, choices={key_of(step, bare or step, HOPPER): choice_of(tile, 1.0)})


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_choice_names_its_tile_and_is_taken(step: Step) -> None:
    ranked = tiles(step)
    assert len(ranked) > 1
    gathered = {one.tile for one in ranked if isinstance(one.tile, WgmmaTile)}
    pairs = {tile for tile in gathered if tile.cluster > 1 and tile.cluster_k == 1}
    by_estimate = [one.cycles for one in ranked if one.tile not in pairs]
    assert by_estimate == sorted(by_estimate)
    assert by_estimate == [one.cycles for one in ranked[: len(by_estimate)]], "pairs come last"
    assert len({tile_text(one.tile) for one in ranked}) == len(ranked)
    every = [one.tile for one in ranked]
    for tile in every:
        choice = json.loads(json.dumps(choice_of(tile, 1.0)))
        assert chosen_among(every, choice) is tile
    kinds = {type(tile): tile for tile in every}
    assert len(kinds) > 1 or step is STEM
    for tile in (every[0], every[1], every[-1], *kinds.values()):
        expected = conv.lower_in(step, conv.Geometry(step), tile, HOPPER)
        assert told(conv.lower(step, kept(step, tile))) == told(expected)


def test_without_a_timing_the_estimate_chooses() -> None:
    for step in STEPS.values():
        first = tiles(step)[0].tile
        assert told(conv.lower(step, HOPPER)) == told(conv.lower_in(step, conv.Geometry(step), first, HOPPER))
        other = conv_step(2, 40, 72, 20)
        assert told(conv.lower(other, kept(step, tiles(step)[1].tile))) == told(conv.lower(other, HOPPER))


def test_a_choice_that_the_step_cannot_run_in_is_not_taken() -> None:
    """A tile of another kernel, of an architecture with other kernels, or a damaged entry."""
    every = [one.tile for one in tiles(STRIDED)]
    deep = next(one.tile for one in tiles(GATHERED) if "deep" in tile_text(one.tile))
    good = choice_of(every[1], 1.0)
    for damaged in (
        {}, {"kernel": "mma"}, {"kernel": "other", "m": 1}, {**good, "splits": 99}, {**good, "m": 7},
        {**good, "more": 1}, {**good, "m": "128"}, choice_of(deep, 1.0),
    ):  # fmt: skip
        assert chosen_among(every, damaged) is None
    assert told(conv.lower(STRIDED, kept(STRIDED, deep))) == told(conv.lower(STRIDED, HOPPER))
    gathered = kept(GATHERED, tiles(GATHERED)[0].tile)
    older = replace(gathered, architecture=SM_80)
    assert told(conv.lower(GATHERED, older)) == told(conv.lower(GATHERED, replace(HOPPER, architecture=SM_80)))


def test_convolutions_that_differ_have_other_keys() -> None:
    relu = make_step(
        cv.conv_op(3, store=stored(cv.relu6(ACC))), [channels_inner(1, 512, 28, 28), weight(512, 512, 3, 3)]
    )
    window = replace(GATHERED.inputs[0], strides=(1024 * 784, 1, 1024 * 28, 1024))
    steps = [
        *STEPS.values(), relu, conv_step(2, 512, 512, 28), conv_step(1, 512, 512, 28, kernel=5),
        conv_step(1, 512, 512, 28, stride=2), conv_step(1, 512, 512, 28, groups=2),
        conv_step(1, 512, 512, 28, dtype=DType.BF16), replace(GATHERED, inputs=(window, *GATHERED.inputs[1:])),
        make_step(replace(GATHERED.op, pads=((1, 1), (2, 0))), [(F16, (1, 512, 28, 28)), weight(512, 512, 3, 3)]),
        make_step(GATHERED.op, [(F16, (1, 512, 28, 28)), (F16, (512, 512, 3, 3))]),
    ]  # fmt: skip
    keys = [key_of(step, step, HOPPER) for step in steps]
    assert len(set(keys)) == len(keys)
    assert key_of(conv_step(1, 512, 512, 28), conv_step(1, 512, 512, 28), HOPPER) == keys[0]
    fp32 = conv_step(1, 64, 64, 28, dtype=DType.F32)
    assert key_of(fp32, fp32, HOPPER) != key_of(fp32, fp32, replace(HOPPER, tf32=True))


def test_layers_that_add_up_pixels_choose_among_the_tiles_that_do() -> None:
    step = excited(4, 144, 28, 3, 1, 6)
    assert isinstance(step.op, ConvExcitation)
    one = tunable(step, HOPPER)
    assert one is not None and len(one.candidates) > 1
    assert told(family_of(step.op).lower(step, HOPPER)) == told(one.launches(0, HOPPER))
    timed = replace(HOPPER, choices={one.key: one.choice(1, 1.0)})
    assert one.chosen(HOPPER) == 0
    assert one.chosen(timed) == 1
    assert told(conv_excitation.lower(step, timed)) == told(one.launches(1, HOPPER)) != told(one.launches(0, HOPPER))
    mean = conv_excitation.with_mean(step)
    assert isinstance(mean.op, ConvMean)
    other = tunable(mean, HOPPER)
    assert other is not None and other.key != one.key
    timed = replace(HOPPER, choices={other.key: other.choice(1, 1.0)})
    assert told(conv_mean.lower(mean, timed)) == told(other.launches(1, HOPPER)) != told(other.launches(0, HOPPER))
    bare = conv_mean.without_mean(mean)
    assert isinstance(bare.op, Conv)
    assert key_of(bare, bare, HOPPER) not in (one.key, other.key)


def test_the_first_tiles_and_some_of_every_kernel_are_timed() -> None:
    for step in STEPS.values():
        one = tunable(step, HOPPER)
        assert one is not None
        ranked = [tile_text(choice.tile) for choice in tiles(step)]
        texts = [candidate.text for candidate in one.candidates]
        assert texts[:CANDIDATES] == ranked[:CANDIDATES]
        assert texts == [text for text in ranked if text in texts]
        for kind in {kernel_of(choice.tile) for choice in tiles(step)}:
            of_kind = [tile_text(choice.tile) for choice in tiles(step) if kernel_of(choice.tile) == kind]
            assert len(set(of_kind) & set(texts)) >= min(OTHER_CANDIDATES, len(of_kind))
        assert all(candidate.estimate_us > 0 and candidate.bound for candidate in one.candidates)
        for i in range(len(one.candidates)):
            assert one.chosen(replace(HOPPER, choices={one.key: one.choice(i, 1.0)})) == i


def test_a_product_or_an_empty_image_has_no_tiles_of_its_own() -> None:
    assert not tiles(conv_step(2, 64, 128, 28, kernel=1))
    assert not tiles(make_step(cv.conv_op(3, store=stored(ACC)), [(F16, (0, 64, 9, 9)), weight(64, 64, 3, 3)]))
    assert tunable(conv_step(1, 4, 4, 8, dtype=DType.F64), HOPPER) is None


def test_what_is_taken_is_of_the_ranking_given() -> None:
    ranked = tiles(HALO)
    assert taken(ranked, HALO, HALO, HOPPER) is ranked[0].tile
    assert taken(ranked[2:], HALO, HALO, kept(HALO, ranked[0].tile)) is ranked[2].tile
