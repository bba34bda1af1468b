"""The two layers of squeeze-and-excite blocks against float64, on random ragged sizes (conftest.py says on what)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Excitation
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda import covering as cv
from engine.targets.cuda import excitation
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.covering import ACC, F16, F32, make_step, weight
from engine.targets.cuda.excitation import lower, requirements
from engine.targets.cuda.families import family_of, traits_of
from engine.targets.cuda.kernel import Context, WeightStore
from tests.engine.targets.cuda.cases import check, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner

CONTEXT = Context(SM_90A, 132, WeightStore())


def sigmoid(value: ex.Expr) -> ex.Expr:
    return ex.apply(PointOp.SIGMOID, value)


def step_of(images: int, channels: int, hidden: int, outputs: int, dtype: DType = F16, plain: bool = False) -> Step:
    """SiLU in between and a sigmoid behind, with biases in fp32; `plain`: nothing of these."""
    first, second = cv.add(ACC, cv.arg(3, F32)), cv.add(ACC, cv.arg(4, F32))
    between = ACC if plain else cv.mul(first, sigmoid(first))
    store = ex.cast(ACC if plain else sigmoid(second), dtype)
    weights = [weight(hidden, channels, 1, 1, dtype=dtype), weight(outputs, hidden, 1, 1, dtype=dtype)]
    biases = [] if plain else [weight(hidden, 1, 1, dtype=F32), weight(outputs, 1, 1, dtype=F32)]
    return make_step(Excitation(between, (store,)), [(dtype, (images, channels, 1, 1)), *weights, *biases])


def test_layers_match_float64(runner: Runner, count: int) -> None:
    """One image to many, two to a block, hidden units in any number, one block to an image or more."""
    rng, cases = rng_of("excitation"), []
    for i in range(2 * count):
        sizes = ragged(rng, 40), ragged(rng, 1400, 8), ragged(rng, 90), ragged(rng, 1400, 8)
        dtype = (F16, DType.BF16)[i % 2]
        context = replace(runner.context, multiprocessors=int(rng.choice([1, 3, 132])))
        step = step_of(*sizes, dtype, plain=i % 3 == 0)
        launches = lower(step, context)
        length = sizes[1] + sizes[2]
        cases.append(Case(f"{sizes} {dtype.value}", step, length, lowered=launches, rounding=2.0**-21))
    check(runner, cases)


def test_the_layers_of_efficientnet(runner: Runner, count: int) -> None:
    cases = []
    for channels, hidden in ((32, 8), (96, 4), (144, 6), (240, 10), (480, 20), (672, 28), (1152, 48)):
        for images in (1, 9) if count < 100 else (1, 32, 128, 300):
            step = step_of(images, channels, hidden, channels)
            cases.append(Case(f"{images} of {channels} by {hidden}", step, channels, rounding=2.0**-21))
    check(runner, cases)


def test_channels_of_a_larger_image(runner: Runner, count: int) -> None:
    """Some of the channels of each pixel, from an odd one on: no access of 16 bytes fits."""
    step = step_of(3, 16, 5, 24)
    around = Tensor(Buffer("input0", BufferKind.INPUT, 2 * (3 * 21 + 16)), F16, (3, 16, 1, 1), (21, 1, 1, 1), 3)
    step = replace(step, inputs=(around, *step.inputs[1:]))
    check(runner, [Case("window", step, 16, rounding=2.0**-21)])


@pytest.mark.parametrize(
    ("images", "channels", "hidden", "blocks"),
    [(1, 32, 8, (1, 1, 1)), (1, 1152, 48, (4, 1, 1)), (128, 1152, 48, (1, 128, 1)), (1024, 240, 10, (1, 512, 1))],
)
def test_blocks_share_an_image_where_multiprocessors_idle(
    images: int, channels: int, hidden: int, blocks: tuple[int, int, int]
) -> None:
    (launch,) = family_of(Excitation(ACC, (ACC,))).lower(step_of(images, channels, hidden, channels), CONTEXT)
    assert launch.grid == blocks


def test_what_it_does_not_take() -> None:
    step = step_of(2, 16, 4, 16)
    computed = replace(step.inputs[1], buffer=Buffer("input1", BufferKind.INPUT, 2 * 16 * 4))
    with pytest.raises(UnsupportedOp, match="constants"):
        requirements(step.op, (step.inputs[0], computed, *step.inputs[2:]))
    with pytest.raises(UnsupportedOp, match="multiples of 8"):
        requirements(step.op, step_of(2, 12, 4, 16).inputs)
    assert lower(step_of(0, 16, 4, 16), CONTEXT) == []


def test_graphs_are_made_with_it_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for taken in (False, True):
        monkeypatch.setattr(excitation, "TAKEN", taken)
        assert traits_of(SM_90A).excitations == taken
