"""Depthwise convolutions whose rows stream through shared memory, against float64: every tile, on random ragged shapes
(conftest.py says on what)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Conv, ConvMean
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.targets.cuda import covering as cv
from engine.targets.cuda import depthwise, depthwise_rows
from engine.targets.cuda import depthwise_bands as bands
from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.conv import lower
from engine.targets.cuda.conv_geometry import Geometry, channels_last
from engine.targets.cuda.conv_mean import lower_rows, without_mean
from engine.targets.cuda.conv_variants import variants
from engine.targets.cuda.covering import ACC, F16, make_step, weight
from engine.targets.cuda.depthwise import Window, window_of
from engine.targets.cuda.depthwise_bands import BandedRows
from engine.targets.cuda.depthwise_diagonal import DiagonalRows
from engine.targets.cuda.depthwise_rows import ImageSums, candidates, has_rows, launch_rows, pick, ranked
from engine.targets.cuda.depthwise_tiles import Column, RowsTile
from engine.targets.cuda.families import family_of
from engine.targets.cuda.kernel import Context, Launch, WeightStore, ceildiv, workspace_bytes
from tests.engine.targets.cuda.cases import check, check_late, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.test_conv import BF16_, EPILOGUES, FP16, Kind, Shape, case, random_shape, random_step
from tests.engine.targets.cuda.test_conv_wgmma import conv_step

CONTEXT = Context(SM_90A, 132, WeightStore())


def streamed(rng: np.random.Generator, axes: int, kind: Kind, context: Context) -> Shape:
    """A random depthwise convolution that the kernel can run, of a few images."""
    while True:
        shape = random_shape(rng, axes, ragged(rng, 150, 8), 1, 1, kernels=8)
        shape = replace(shape, x=(int(rng.integers(1, 6)), *shape.x[1:]))
        step = random_step(rng, kind, shape, "plain")
        if has_rows(step, Geometry(step), context):
            return shape


def tile_of(rng: np.random.Generator, shape: Shape, kind: Kind, context: Context) -> RowsTile:
    """One of the tiles that fit."""
    step = random_step(rng, kind, shape, "plain")
    fitting = candidates(window_of(Geometry(step)), context.architecture.shared_bytes)
    return fitting[int(rng.integers(len(fitting)))]


@pytest.mark.parametrize("axes", [2, 1])
def test_streamed_rows_match_float64(hopper: Runner, count: int, axes: int) -> None:
    """Strides and dilations that differ between axes, strides beyond the kernel, even kernels, pads of either side and
    negative ones, ragged channels and widths, from image to image; one block for all rows, and a few."""
    rng, cases = rng_of(f"rows{axes}"), []
    for i in range(2 * count):
        kind, name = (FP16, BF16_)[i % 2], EPILOGUES[i // 2 % 4]
        context = kind.context(hopper)
        few = replace(context, multiprocessors=int(rng.choice([1, 3, 12])))
        shape = streamed(rng, axes, kind, context)
        tile = tile_of(rng, shape, kind, context)
        step = random_step(rng, kind, shape, name)
        launches = [launch_rows(step, Geometry(step), tile, few)]
        cases.append(case(rng, kind, shape, step, launches, f"{name} {tile}"))
    check(hopper, cases)


def test_windows_of_an_image_match_float64(hopper: Runner, count: int) -> None:
    """Some of the channels, rows and pixels of a larger image. What lies around them is not a number, and must not be
    multiplied, not even by zero."""
    rng, cases = rng_of("rows windows"), []
    for i in range(count):
        kind = (FP16, BF16_)[i % 2]
        shape = streamed(rng, 2, kind, kind.context(hopper))
        tile = tile_of(rng, shape, kind, kind.context(hopper))
        around = (shape.x[0], shape.x[1] + 8, shape.x[2] + 2, shape.x[3] + 3)
        strides = row_major(around, channels_last(4))
        offset = 8 + 2 * strides[2] + 3 * strides[3]
        buffer = Buffer("input0", BufferKind.INPUT, (offset + int(np.prod(around))) * kind.w.itemsize)
        step = random_step(rng, kind, shape, "bias")
        step = replace(step, inputs=(Tensor(buffer, kind.x, shape.x, strides, offset), *step.inputs[1:]))
        assert has_rows(step, Geometry(step), kind.context(hopper))
        launches = [launch_rows(step, Geometry(step), tile, kind.context(hopper))]
        cases.append(case(rng, kind, shape, step, launches, f"window {tile}"))
    check(hopper, cases)


def test_an_image_does_not_see_the_next_one(hopper: Runner, count: int) -> None:
    """Between two images of the column lies as much padding as both need, however much there is on either side:
    a large number in the rows at the edges would show."""
    cases = []
    for pads in (((1, 1), (1, 1)), ((2, 0), (0, 2)), ((0, 4), (4, 0)), ((0, 0), (0, 0)), ((4, 1), (1, 1))):
        for stride in (1, 2):
            op = replace(cv.conv_op(5, stride, 16), pads=pads, stores=(cv.stored(ACC),))
            step = make_step(op, [(F16, (4, 16, 6, 9)), weight(16, 1, 5, 5)])
            image = rng_of("edges").standard_normal((4, 16, 6, 9)).astype(np.float16)
            image[1, :, 0] = image[1, :, 5] = 1000.0
            for tile in (
                DiagonalRows(32, 1, 2, stride, 2, 1), DiagonalRows(32, 2, 1, stride, 3, 1),
                BandedRows(32, 1, 16, stride, 2, 1), BandedRows(32, 3, 5, stride, 3, 1),
            ):  # fmt: skip
                launches = [launch_rows(step, Geometry(step), tile, hopper.context)]
                cases.append(Case(f"{pads}/{stride} {tile}", step, 25, {0: image}, launches, rounding=FP16.rounding))
    check(hopper, cases)


def test_a_ring_goes_round_many_times(hopper: Runner, count: int) -> None:
    """One block with the rows of all images; several blocks whose parts begin anywhere in an image."""
    cases = []
    batch, size = (3, 17) if count < 100 else (40, 56)
    for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1)):
        step = make_step(
            cv.conv_op(kernel, stride, 48),
            [(F16, (batch, 48, size, size)), weight(48, 1, kernel, kernel), weight(48, 1, 1)],
        )
        geometry = Geometry(step)
        for multiprocessors in (1, 7):
            few = replace(hopper.context, multiprocessors=multiprocessors)
            tile = ranked(step, geometry, few)[0][1]
            launches = [launch_rows(step, geometry, tile, few)]
            label = f"{kernel}/{stride} {multiprocessors} {tile}"
            cases.append(Case(label, step, kernel**2, lowered=launches, rounding=FP16.rounding))
    check(hopper, cases)


def test_warps_that_come_late_take_turns_with_the_others(hopper: Runner, count: int) -> None:
    """Rings of two stages and of more than there are rows, a last panel that lacks some channels, one and two warps
    of places: warps pass each other sums, and one of them asks for everybody's rows."""
    cases = []
    for kernel, stride, dtype in ((3, 1, F16), (5, 2, F16), (7, 1, DType.BF16)):
        filters = [weight(40, 1, kernel, kernel, dtype=dtype), weight(40, 1, 1, dtype=dtype)]
        op = replace(cv.conv_op(kernel, stride, 40), stores=(cv.stored(cv.add(ACC, cv.arg(2, dtype)), dtype),))
        step = make_step(op, [(dtype, (3, 40, 9, 11)), *filters])
        geometry = Geometry(step)
        fitting = candidates(window_of(geometry), hopper.context.architecture.shared_bytes)
        banded = [tile for tile in fitting if isinstance(tile, BandedRows) and tile.panel == 32]
        for stages, wide in ((2, True), (2, False), (6, False)):
            tile = next(t for t in banded if t.stages == stages and (t.warps > 8) == wide and t.rows == stride)
            for multiprocessors in (1, 5):
                few = replace(hopper.context, multiprocessors=multiprocessors)
                launches = [launch_rows(step, geometry, tile, few)]
                label = f"{kernel}/{stride} {multiprocessors} {tile}"
                rounding = (FP16 if dtype is F16 else BF16_).rounding
                cases.append(Case(label, step, kernel**2, lowered=launches, rounding=rounding))
    check_late(hopper, cases)


# With the mean of every image


def with_mean(step: Step) -> Step:
    """The step with the mean of its result over all pixels beside it."""
    assert isinstance(step.op, Conv)
    result = step.outputs[0]
    op = ConvMean(step.op, ex.cast(ACC, result.dtype))
    shape = (*result.shape[:2], *(1 for _ in result.shape[2:]))
    buffer = Buffer("output1", BufferKind.OUTPUT, result.dtype.itemsize * shape[0] * shape[1])
    return replace(step, op=op, outputs=(result, Tensor(buffer, result.dtype, shape, row_major(shape))))


@pytest.mark.parametrize("axes", [2, 1])
def test_means_beside_streamed_rows_match_float64(hopper: Runner, count: int, axes: int) -> None:
    """Images that lie in one stream, in several, some in more than others; units and channels that are not there."""
    rng, cases = rng_of(f"means{axes}"), []
    for i in range(2 * count):
        kind, name = (FP16, BF16_)[i % 2], EPILOGUES[i // 2 % 4]
        context = kind.context(hopper)
        few = replace(context, multiprocessors=int(rng.choice([1, 3, 12, 40])))
        shape = streamed(rng, axes, kind, context)
        step = random_step(rng, kind, shape, name)
        fitting = candidates(window_of(Geometry(step)), context.architecture.shared_bytes, sums=True)
        if not fitting:
            continue
        tile = fitting[int(rng.integers(len(fitting)))]
        meant = with_mean(step)
        launches = lower_rows(meant, tile, few)
        cases.append(case(rng, kind, shape, meant, launches, f"{name} {few.multiprocessors} {tile}"))
    assert len(cases) > count
    check(hopper, cases)


def test_every_part_of_an_image_is_added_up(hopper: Runner, count: int) -> None:
    """Ones: the mean counts pixels, exactly. Streams begin and end anywhere in an image and between two."""
    cases = []
    for size, images, stride in ((7, 5, 1), (17, 3, 1), (14, 4, 2), (30, 1, 1)):
        step = with_mean(make_step(
            replace(cv.conv_op(1, stride, 24), stores=(cv.stored(ACC),)),
            [(F16, (images, 24, size, size)), np.ones((24, 1, 1, 1), np.float16)],
        ))  # fmt: skip
        ones = np.ones((images, 24, size, size), np.float16)
        for multiprocessors in (1, 2, 5, 9, 40):
            few = replace(hopper.context, multiprocessors=multiprocessors)
            for tile in (
                DiagonalRows(32, 1, 2, stride, 2, 1), DiagonalRows(32, 2, 1, stride, 3, 1),
                BandedRows(32, 1, 16, stride, 2, 1), BandedRows(32, 3, 5, stride, 3, 1),
            ):  # fmt: skip
                launches = lower_rows(step, tile, few)
                label = f"{size}/{stride} {multiprocessors} {tile}"
                cases.append(Case(label, step, 1, {0: ones}, launches, rounding=0.0))
    check(hopper, cases)


@pytest.mark.parametrize("taken", [False, True])
def test_a_mean_is_taken_of_the_result_where_no_kernel_adds_it_up(
    hopper: Runner, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not taken:
        monkeypatch.setattr(depthwise_rows, "has_rows", lambda *_: False)
    filters = rng_of("filters").uniform(0.0, 0.2, (48, 1, 3, 3)).astype(np.float16)
    op = replace(cv.conv_op(3, 1, 48), stores=(cv.stored(ACC),))
    step = with_mean(make_step(op, [(F16, (2, 48, 15, 15)), filters]))
    streaming = replace(hopper.context, multiprocessors=4)  # which have enough to do for streams to pay
    portable = replace(streaming, architecture=SM_80)
    # Of positive numbers, so that their rounding before they are averaged is one of the mean.
    image = rng_of("positive").uniform(0.5, 1.5, step.inputs[0].shape).astype(np.float16)
    launches = family_of(step.op).lower(step, streaming)
    check(hopper, [Case("as it is chosen", step, 9, {0: image}, launches)])
    for context in (streaming, portable):
        convolution, mean = family_of(step.op).lower(step, context)
        streams = taken and context is streaming
        assert (body_of([convolution]) != '#include "depthwise_mma.cuh"') == streams
        assert ("sums" in dict(convolution.arguments)) == streams
        assert body_of([mean]) == '#include "reduce_columns.cuh"'
        assert "partial" not in dict(mean.arguments)


def test_what_saves_a_pass_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other kernel is as fast without sums as this one with them: with them it would need the result once more."""
    step = depthwise_step(128, 240, 28, 5)
    geometry = Geometry(step)
    estimate = ranked(step, geometry, CONTEXT, sums=True)[0][0]
    for share, expected in ((1.0, True), (0.5, False)):
        monkeypatch.setattr(depthwise, "cycles", lambda *_, share=share: share * estimate)
        assert (pick(step, geometry, CONTEXT, sums=True) is not None) == expected
    monkeypatch.setattr(depthwise, "cycles", lambda *_: 0.999 * ranked(step, geometry, CONTEXT)[0][0])
    assert pick(step, geometry, CONTEXT) is None


def test_nothing_else_of_the_step_lies_in_the_sums_workspace() -> None:
    """One image with many parts: a reduction alone would divide them among blocks, through the same workspace."""
    step = with_mean(depthwise_step(1, 32, 112, 3))
    tile = ranked(step_alone := without_mean(step), Geometry(step_alone), CONTEXT, sums=True)[0][1]
    rows, join = lower_rows(step, tile, CONTEXT)
    sums = ImageSums.of(Geometry(step_alone), tile, CONTEXT)
    assert sums.parts > 1
    assert sums.tensor.shape == (1, sums.parts * (112 // tile.unit), 32)
    assert workspace_bytes([rows, join]) == sums.tensor.nbytes == 4 * sums.parts * (112 // tile.unit) * 32


# Which convolutions, and how they lie


def depthwise_step(batch: int, channels: int, size: int, kernel: int, stride: int = 1) -> Step:
    x, w = (batch, channels, size, size), (channels, 1, kernel, kernel)
    return conv_step(x, w, pad=kernel // 2, strides=stride, groups=channels)


@pytest.mark.parametrize(
    ("x", "w", "options", "expected"),
    [
        ((32, 144, 56, 56), (144, 1, 3, 3), {"pad": 1}, True),
        ((32, 144, 56, 56), (144, 1, 7, 7), {"pad": 3}, True),
        ((32, 144, 56, 56), (144, 1, 3, 3), {"pad": 1, "strides": 2}, True),
        ((32, 144, 999), (144, 1, 3), {"pad": 1}, True),
        ((32, 144, 56, 56), (144, 1, 9, 9), {"pad": 4}, False),
        ((32, 144, 56, 56), (144, 1, 5, 5), {"pad": 8, "dilation": 4}, False),
        ((32, 145, 56, 56), (145, 1, 3, 3), {"pad": 1}, False),
        ((32, 144, 56, 56), (144, 1, 3, 3), {"pad": 1, "known": False}, False),
    ],
)
def test_which_convolutions_stream(
    x: tuple[int, ...], w: tuple[int, ...], options: dict[str, int], expected: bool
) -> None:
    step = conv_step(x, w, **options, groups=x[1])  # type: ignore[arg-type]
    assert has_rows(step, Geometry(step), CONTEXT) == expected
    assert not has_rows(step, Geometry(step), replace(CONTEXT, architecture=SM_80))


def test_images_lie_a_padding_apart() -> None:
    """56 rows with one of padding between them; 14 at stride 2 with two, so that an image begins at an even row."""
    for size, kernel, stride, pitch, lines in ((56, 3, 1, 57, 113), (14, 5, 2, 16, 15), (7, 5, 1, 9, 16)):
        column = Column.of(Geometry(depthwise_step(2, 64, size, kernel, stride)))
        assert (column.pitch, column.lines) == (pitch, lines)


def body_of(launches: list[Launch]) -> str:
    (launch,) = launches
    return launch.kernel.source.text.rstrip().rpartition("\n")[2]


def test_it_is_taken_where_it_should_be_faster() -> None:
    """Measured with bands, with diagonals and in windows: 46, 53 and 71 µs of 240 channels 5×5 at 28 pixels; 102, 98
    and 117 of 144 channels 3×3 at 56."""
    for (channels, size, kernel), expected in (
        ((240, 28, 5), "depthwise_bands.cuh"),
        ((144, 56, 3), "depthwise_rows.cuh"),
    ):
        step = depthwise_step(128, channels, size, kernel)
        assert body_of(lower(step, CONTEXT)) == f'#include "{expected}"'
        assert body_of(lower(step, replace(CONTEXT, architecture=SM_80))) == '#include "depthwise_mma.cuh"'


@pytest.mark.parametrize("summed", [False, True])
def test_tiles_fill_the_places_of_a_warp_and_fit(summed: bool) -> None:
    """Of widths that networks have, a warp of depthwise_bands.cuh has results for most of its places in some tile, and
    no tile asks for more than a multiprocessor has."""
    for size, kernel, stride in ((7, 5, 1), (14, 5, 1), (28, 5, 2), (56, 3, 1), (112, 3, 2), (14, 7, 1)):
        window = window_of(Geometry(depthwise_step(4, 96, size * stride, kernel, stride)))
        fitting = bands.candidates(window, SM_90A.shared_bytes, summed)
        used = [tile.units * tile.streams / (16 * ceildiv(tile.units * tile.streams, 16)) for tile in fitting]
        assert max(used) >= 0.875
        assert all(tile.blocks * (tile.shared_bytes(window) + 1024) <= SM_90A.shared_bytes + 1024 for tile in fitting)
        assert all(32 * tile.warps <= 1024 and tile.met(window) <= 256 for tile in fitting)


def test_bands_hold_every_tap_between_its_pixels() -> None:
    """What a lane multiplies a pixel of a step with is the tap between it and the lane's pixel of the results."""
    rng = rng_of("bands")
    for kernel, stride, dilation in ((3, 1, 1), (5, 1, 1), (5, 2, 1), (2, 3, 1), (3, 1, 3)):
        window = Window((2, kernel), (1, stride), (1, dilation), (9, 9), 1, 8)
        filters = rng.standard_normal((8, 2, kernel)).astype(np.float16)
        steps = ceildiv(3 * stride + (kernel - 1) * dilation + 1, 4)
        packed = bands.pack_bands(filters, window).reshape(2, -1, 32, 8).transpose(0, 2, 1, 3).reshape(2, 32, -1)
        for lane in range(32):
            pixel, channel, result = lane % 4, lane // 4 % 2, lane // 8
            for group, row, pair, step in np.ndindex(2, 2, 2, steps):
                tap, rest = divmod(4 * step + pixel - result * stride, dilation)
                there = rest == 0 and 0 <= tap < kernel
                expected = filters[4 * group + 2 * pair + channel, row, tap] if there else 0
                assert packed[group, lane, (row * 2 + pair) * steps + step] == expected


def test_sweeps_get_the_present_way_and_tiles_from_the_whole_ranking() -> None:
    step = depthwise_step(128, 144, 56, 3)
    present, other, *rows = variants(step, CONTEXT, 8)
    assert body_of(list(present.launches)) == '#include "depthwise_rows.cuh"'
    assert body_of(list(other.launches)) == '#include "depthwise_mma.cuh"'
    assert len({variant.name for variant in rows}) == 8
    estimates = [variant.cycles for variant in rows if variant.cycles is not None]
    every = [cycles for cycles, _ in ranked(step, Geometry(step), CONTEXT)]
    assert estimates[:4] == every[:4]
    assert estimates[-1] > every[len(every) // 2]
