"""Convolutions that store the maxima of windows of their sums, against float64: every tile, on random ragged shapes
(conftest.py says on what)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.ops import ConvMax, Pool, PoolKind
from engine.plan.plan import Step
from engine.targets.cuda import conv_lines, conv_max
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_lines import LinesTile
from engine.targets.cuda.conv_max import TILES, PooledTile, lower_apart, lower_in, tiles_of, unpooled
from engine.targets.cuda.conv_stem_pooled import PooledStemTile
from engine.targets.cuda.covering import F16, F32, make_step, weight
from engine.targets.cuda.families import family_of, traits_of
from engine.targets.cuda.kernel import Context, WeightStore
from engine.targets.cuda.tiles import WgmmaTile
from tests.engine.targets.cuda.cases import check, check_late, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.test_conv import BF16_, FP16, Kind, Shape, random_shape, random_step, stored
from tests.engine.targets.cuda.test_conv_stem import in_nhwc

KINDS = (FP16, BF16_)
EPILOGUES = ("relu6", "bias", "plain")
CONTEXT = Context(SM_90A, 132, WeightStore())
HALVING = Pool(PoolKind.MAX, (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1))


THREES = Pool(PoolKind.MAX, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1))


def pooled(step: Step, pool: Pool = HALVING) -> Step:
    """A convolution's step, of whose sums the maxima of windows are stored."""
    pool = replace(pool, stores=(ex.Acc(step.outputs[0].dtype),))
    return make_step(ConvMax(step.op, pool), list(step.inputs))  # type: ignore[arg-type]  # it is a convolution's


def windowed(
    rng: np.random.Generator, kind: Kind, channels: int, columns: int, takes: Callable[[Step], bool], name: str
) -> tuple[Step, int]:
    """A random step that is taken, of so many channels and columns at most, and the terms of its sums."""
    while True:
        c = ragged(rng, channels, 16 // kind.w.itemsize)
        shape = random_shape(rng, 2, 1, c, ragged(rng, columns))
        shape = replace(shape, x=(int(rng.integers(1, 6)), *shape.x[1:]))
        if min(_sums(kind, shape)[2:]) < 2:
            continue
        step = pooled(random_step(rng, kind, shape, name))
        if takes(step):
            return step, shape.terms


def _sums(kind: Kind, shape: Shape) -> tuple[int, ...]:
    step = random_step(np.random.default_rng(0), kind, shape, "plain")
    return step.outputs[0].shape


def kinds_of(step: Step) -> dict[type, list[PooledTile]]:
    """The tiles that a step can run in, whatever should be faster, by their kernel."""
    found: dict[type, list[PooledTile]] = {WgmmaTile: [], LinesTile: [], PooledStemTile: []}
    for choice in conv_max.estimates(step, Geometry(unpooled(step)), CONTEXT):
        found[type(choice.tile)].append(choice.tile)
    return found


@pytest.mark.parametrize("kernel", [WgmmaTile, LinesTile], ids=["gathered", "lines"])
def test_maxima_match_float64(hopper: Runner, count: int, kernel: type) -> None:
    """Strides, dilations, even kernels, pads on either side and negative ones, odd lines and pixels that are in no
    window, ragged channels, walks from image to image."""
    rng, cases = rng_of(f"maxima {kernel.__name__}"), []
    most = 200 if kernel is WgmmaTile else 64
    for i in range(count):
        kind, name = KINDS[i % 2], EPILOGUES[i % 3]
        step, terms = windowed(rng, kind, most, 200, lambda step: bool(kinds_of(step)[kernel]), name)
        tiles = kinds_of(step)[kernel]
        tile = tiles[int(rng.integers(len(tiles)))]
        launches = lower_in(step, tile, hopper.context)
        label = f"{kind} {name} {step.op} {step.inputs[0].shape} {step.inputs[1].shape} {tile}"
        cases.append(Case(label, step, terms, lowered=launches, rounding=kind.rounding))
    check(hopper, cases)


def test_maxima_behind_a_first_layer_match_float64(hopper: Runner, count: int) -> None:
    """Images in any layout and type, as they come, asymmetric and negative pads, even kernels, dilation; pools with
    padding or without on every side, lines and pixels that no window reaches."""
    rng, cases, kinds = rng_of("pooled stem"), [], (Kind(F32, F16), FP16, BF16_, Kind(F32, BF16_.w))
    while len(cases) < 2 * count:
        i = len(cases)
        kind, name = kinds[i % 4], EPILOGUES[i // 2 % 3]
        shape = random_shape(rng, 2, 1, int(rng.integers(1, 5)), ragged(rng, 150, int(rng.choice([1, 8]))), kernels=8)
        shape = replace(shape, x=(*shape.x[:2], *(int(rng.integers(1, 8)) * size for size in shape.x[2:])))
        pads = tuple((int(begin), int(end)) for begin, end in rng.integers(0, 2, (2, 2)))
        if min(size + sum(pad) for size, pad in zip(_sums(kind, shape)[2:], pads, strict=True)) < 3:
            continue
        bare = random_step(rng, kind, shape, name, strided=i % 3 == 2)
        step = pooled(in_nhwc(bare) if i % 3 == 1 else bare, replace(THREES, pads=pads))
        tiles = kinds_of(step)[PooledStemTile]
        if not tiles:
            continue
        tile = tiles[int(rng.integers(len(tiles)))]
        launches = lower_in(step, tile, hopper.context)
        label = f"{kind} {name} {step.op} {shape.x} {shape.w} {tile}"
        feeds = {0: rng.standard_normal(shape.x).astype(kind.w.numpy).astype(kind.x.numpy)}
        cases.append(Case(label, step, shape.terms, feeds, launches, rounding=kind.rounding))
    check(hopper, cases)


def test_a_block_takes_several_tiles(hopper: Runner, count: int) -> None:
    """Rings and turns wrap around, also where warps come late."""
    cases = []
    few = replace(hopper.context, multiprocessors=2) if count < 100 else hopper.context
    x, n = ((3, 24, 13, 22), 136) if count < 100 else ((40, 64, 30, 58), 264)
    tiles: list[PooledTile] = [
        *(replace(tile, panel_bytes=128 >> i % 3) for i, tile in enumerate(TILES)),
        LinesTile(32, 2), LinesTile(48, 3), LinesTile(112, 2), LinesTile(128, 2),
    ]  # fmt: skip
    for tile in tiles:
        op = replace(cv.conv_op(3), stores=(stored(FP16, "relu6"),))
        step = pooled(make_step(op, [(F16, x), weight(n, x[1], 3, 3), weight(n, 1, 1)]))
        launches = lower_in(step, tile, few)
        cases.append(Case(f"{tile}", step, 9 * x[1], lowered=launches, rounding=2.0**-21))
    check_late(hopper, cases)


def test_apart_they_match_float64(hopper: Runner, count: int) -> None:
    """The result between them lies behind partial sums, where the convolution leaves such."""
    rng, cases = rng_of("maxima apart"), []
    for i in range(count):
        kind, name = KINDS[i % 2], EPILOGUES[i % 3]
        step, terms = windowed(rng, kind, 300, 100, lambda step: True, name)
        cases.append(Case(f"apart {step.op} {i}", step, terms, lowered=lower_apart(step, hopper.context)))
    op = replace(cv.conv_op(3), stores=(stored(FP16, "bias"),))
    for size in (2, 3, 4, 14):
        step = pooled(make_step(op, [(F16, (1, 256, size, size)), weight(64, 256, 3, 3), weight(64, 1, 1)]))
        cases.append(Case(f"{size}", step, 9 * 256, lowered=lower_apart(step, hopper.context)))
        cases.append(Case(f"{size} chosen", step, 9 * 256))
    check(hopper, cases)


def test_wide_images_beside_narrow_weights_are_apart(hopper: Runner) -> None:
    """A model's input in fp32, which the copy engine could gather, but not round."""
    cases = []
    for channels in (8, 16):
        op = replace(cv.conv_op(3), stores=(stored(FP16, "bias"),))
        step = make_step(op, [(F32, (2, channels, 9, 10)), weight(32, channels, 3, 3), weight(32, 1, 1)])
        step = pooled(in_nhwc(step))
        assert not tiles_of(step, CONTEXT)
        image = rng_of("wide").standard_normal((2, channels, 9, 10)).astype(np.float16).astype(np.float32)
        cases.append(Case(f"{channels}", step, 9 * channels, {0: image}))
    check(hopper, cases)


def test_what_is_no_number_stays_none(hopper: Runner) -> None:
    """Of a NaN and numbers the maximum is NaN, as a pool has it; what lies in no window is not looked at."""
    cases = []
    for tile in (WgmmaTile(128, 32, 8), LinesTile(32, 2)):
        op = replace(cv.conv_op(1), stores=(ex.cast(ex.Acc(F32), F16),))
        step = pooled(make_step(op, [(F16, (2, 16, 5, 7)), weight(32, 16, 1, 1)]))
        image = rng_of("numbers").standard_normal((2, 16, 5, 7)).astype(np.float16)
        image[0, 3, 1, 2], image[1, 2, 2, 5], image[1, 0, 4, 0], image[0, 0, 0, 6] = np.nan, np.inf, np.nan, np.nan
        cases.append(Case(f"{tile}", step, 16, {0: image}, lower_in(step, tile, hopper.context), rounding=2.0**-21))
    check(hopper, cases)


def vgg(batch: int, channels: int, n: int, size: int) -> Step:
    op = replace(cv.conv_op(3), stores=(stored(FP16, "relu6"),))
    return pooled(make_step(op, [(F16, (batch, channels, size, size)), weight(n, channels, 3, 3), weight(n, 1, 1)]))


def test_large_layers_store_maxima_and_small_ones_share_k() -> None:
    """What VGG-16 has before its pools."""
    for channels, size in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14)):
        step = vgg(128, channels, channels, size)
        (launch,) = family_of(step.op).lower(step, CONTEXT)
        assert ("conv_lines" if channels == 64 else "pooled") in launch.kernel.source.text
        assert 4 * step.outputs[0].nbytes == unpooled(step).outputs[0].nbytes
    small = vgg(1, 512, 512, 14)
    assert not tiles_of(small, CONTEXT)
    assert [launch.kernel.family for launch in family_of(small.op).lower(small, CONTEXT)] == ["conv", "pool"]


def test_cost_counts_sums_and_comparisons() -> None:
    step = vgg(2, 16, 32, 8)
    elements = 2 * 32 * 16
    assert step.cost.flops == 2 * 32 * 64 * 9 * 16 * 2 + elements * (4 + ex.flops(*step.op.conv.stores))  # type: ignore[attr-defined]
    assert step.outputs[0].shape == (2, 32, 4, 4)
    assert step.cost.bytes == sum(t.nbytes for t in (*step.inputs, *step.outputs))


def test_only_hopper_has_them() -> None:
    assert traits_of(SM_90A).conv_maxima
    assert not traits_of(SM_80).conv_maxima


def test_what_no_walk_reaches_is_left_out() -> None:
    """A stride beyond the walk's steps; channels beyond a panel have no lines."""
    op = replace(cv.conv_op(9, 5), stores=(ex.cast(ex.Acc(F32), F16),))
    far = pooled(make_step(op, [(F16, (2, 16, 60, 60)), weight(32, 16, 9, 9)]))
    assert not kinds_of(far)[WgmmaTile]
    wide = vgg(2, 72, 32, 20)
    assert kinds_of(wide)[WgmmaTile]
    assert not kinds_of(wide)[LinesTile]
    assert not list(conv_lines.estimates(far, Geometry(unpooled(far)), CONTEXT))
