"""The two layers of squeeze-and-excite blocks against float64, on random ragged sizes (conftest.py says on what)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import ConvExcitation, ConvMean, Excitation
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda import covering as cv
from engine.targets.cuda import depthwise_rows
from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.conv_excitation import lower_rows, with_mean
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_mean import without_mean
from engine.targets.cuda.covering import ACC, F16, F32, excitation_step, make_step, weight
from engine.targets.cuda.depthwise_rows import ranked
from engine.targets.cuda.excitation import lower, requirements
from engine.targets.cuda.families import family_of, traits_of
from engine.targets.cuda.kernel import Context, WeightStore, content, workspace_bytes
from tests.engine.targets.cuda.cases import check, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner

CONTEXT = Context(SM_90A, 132, WeightStore())


def test_layers_match_float64(runner: Runner, count: int) -> None:
    """One image to many, two to a block, hidden units in any number, one block to an image or more."""
    rng, cases = rng_of("excitation"), []
    for i in range(2 * count):
        sizes = ragged(rng, 40), ragged(rng, 1400, 8), ragged(rng, 90), ragged(rng, 1400, 8)
        dtype = (F16, DType.BF16)[i % 2]
        context = replace(runner.context, multiprocessors=int(rng.choice([1, 3, 132])))
        step = excitation_step(*sizes, dtype)
        launches = lower(step, context)
        length = sizes[1] + sizes[2]
        cases.append(Case(f"{sizes} {dtype.value}", step, length, lowered=launches, rounding=2.0**-21))
    check(runner, cases)


def test_the_layers_of_efficientnet(runner: Runner, count: int) -> None:
    cases = []
    for channels, hidden in ((32, 8), (96, 4), (144, 6), (240, 10), (480, 20), (672, 28), (1152, 48)):
        for images in (1, 9) if count < 100 else (1, 32, 128, 300):
            step = excitation_step(images, channels, hidden, channels)
            cases.append(Case(f"{images} of {channels} by {hidden}", step, channels, rounding=2.0**-21))
    check(runner, cases)


def test_channels_of_a_larger_image(runner: Runner, count: int) -> None:
    """Some of the channels of each pixel, from an odd one on: no access of 16 bytes fits."""
    step = excitation_step(3, 16, 5, 24)
    around = Tensor(Buffer("input0", BufferKind.INPUT, 2 * (3 * 21 + 16)), F16, (3, 16, 1, 1), (21, 1, 1, 1), 3)
    step = replace(step, inputs=(around, *step.inputs[1:]))
    check(runner, [Case("window", step, 16, rounding=2.0**-21)])


# Beside a depthwise convolution


def excited(images: int, channels: int, size: int, kernel: int, stride: int, hidden: int, dtype: DType = F16) -> Step:
    """A depthwise convolution with bias and SiLU, and its squeeze-and-excite layers."""
    layers = excitation_step(images, channels, hidden, channels, dtype)
    biased = cv.add(ACC, ex.cast(cv.arg(2, dtype), F32))
    silu = cv.mul(biased, ex.apply(PointOp.SIGMOID, biased))
    conv = cv.conv_op(kernel, stride, channels, ex.cast(silu, dtype))
    op = ConvExcitation(ConvMean(conv, ex.cast(ACC, dtype)), layers.op, 3)
    image = replace(cv.channels_inner(images, channels, size, size), dtype=dtype)
    filters, bias = weight(channels, 1, kernel, kernel, dtype=dtype), weight(channels, 1, 1, dtype=dtype)
    return make_step(op, [image, filters, bias, *(content(tensor) for tensor in layers.inputs[1:])])


def test_layers_add_up_the_parts_of_images(hopper: Runner, count: int) -> None:
    """Images in one part and in many; few channels, whose parts many threads share, and many."""
    rng, cases = rng_of("excited"), []
    for i in range(count):
        channels, size = ragged(rng, 300, 8), int(rng.integers(1, 30))
        kernel, stride = ((3, 1), (5, 1), (3, 2), (5, 2))[i % 4]
        dtype = (F16, DType.BF16)[i // 4 % 2]
        step = excited(int(rng.integers(1, 9)), channels, size, kernel, stride, ragged(rng, 40), dtype)
        bare = without_mean(with_mean(step))
        few = replace(hopper.context, multiprocessors=int(rng.choice([1, 3, 40])))
        tiles = ranked(bare, Geometry(bare), few, sums=True)
        launches = lower_rows(step, tiles[int(rng.integers(len(tiles)))][1], few)
        assert len(launches) == 2
        cases.append(
            Case(
                f"{step.inputs[0].shape} {kernel}/{stride} {few.multiprocessors}", step, channels + 40, lowered=launches
            )
        )
    check(hopper, cases)


@pytest.mark.parametrize("taken", [False, True])
def test_a_step_is_lowered_whatever_runs_the_convolution(
    runner: Runner, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launches where rows stream, three with the mean in the workspace elsewhere."""
    if not taken:
        monkeypatch.setattr(depthwise_rows, "pick", lambda *_, **__: None)
    cases = []
    for context in (runner.context, replace(runner.context, architecture=SM_80)):
        step = excited(2, 48, 15, 3, 1, 6)
        launches = family_of(step.op).lower(step, context)
        streams = taken and context.architecture.wgmma
        assert ["sums" in dict(launch.arguments) for launch in launches[:-1]] == ([True] if streams else [False, False])
        cases.append(Case(f"{step.inputs[0].shape} {streams}", step, 48, lowered=launches))
    check(runner, cases)


def test_the_mean_in_between_is_all_that_lies_in_the_workspace() -> None:
    """A reduction alone would divide an image among blocks, through the same workspace."""
    step = excited(1, 32, 112, 3, 1, 8)
    _, mean, layers = family_of(step.op).lower(step, replace(CONTEXT, architecture=SM_80))
    assert workspace_bytes([mean, layers]) == 2 * 32


# Which, and how


@pytest.mark.parametrize(
    ("images", "channels", "hidden", "blocks"),
    [(1, 32, 8, (1, 1, 1)), (1, 1152, 48, (4, 1, 1)), (128, 1152, 48, (1, 128, 1)), (1024, 240, 10, (1, 512, 1))],
)
def test_blocks_share_an_image_where_multiprocessors_idle(
    images: int, channels: int, hidden: int, blocks: tuple[int, int, int]
) -> None:
    (launch,) = family_of(Excitation(ACC, (ACC,))).lower(excitation_step(images, channels, hidden, channels), CONTEXT)
    assert launch.grid == blocks


def test_what_it_does_not_take() -> None:
    step = excitation_step(2, 16, 4, 16)
    computed = replace(step.inputs[1], buffer=Buffer("input1", BufferKind.INPUT, 2 * 16 * 4))
    with pytest.raises(UnsupportedOp, match="constants"):
        requirements(step.op, (step.inputs[0], computed, *step.inputs[2:]))
    with pytest.raises(UnsupportedOp, match="multiples of 8"):
        requirements(step.op, excitation_step(2, 12, 4, 16).inputs)
    assert lower(excitation_step(0, 16, 4, 16), CONTEXT) == []


def test_graphs_are_made_with_it_where_rows_stream() -> None:
    traits = traits_of(SM_90A)
    assert traits.excitations and traits.conv_means and traits.scaled_weights
    assert not (traits_of(SM_80).excitations or traits_of(SM_80).conv_means), "no other GPU has the kernel"
