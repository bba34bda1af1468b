"""What the tuner times, and for how long. Needs the CUDA packages, no GPU (tests/gpu/test_tuner.py does)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import cast

import pytest

pytest.importorskip("cupy")

from engine.ir.ops import Conv, Gemm, Pointwise
from engine.plan.plan import Step
from engine.targets.cuda import conv, tunables, tuner
from engine.targets.cuda.architecture import ARCHITECTURES
from engine.targets.cuda.choices import choice_of, key_of
from engine.targets.cuda.covering import ACC, F16, channels_inner, make_step, stored, weight
from engine.targets.cuda.gemm import launches_of, pick_tile, ranked_tiles
from engine.targets.cuda.kernel import Choice, Context, Launch, WeightStore
from engine.targets.cuda.launch_timing import Rounds
from engine.targets.cuda.target import CudaTarget
from engine.targets.cuda.tiles import Operands

HOPPER = Context(ARCHITECTURES["sm_90a"], 132, WeightStore())
HALF = Operands.HALF


def pixels(batch: int = 2, channels: int = 64, taps: int = 1) -> Step:
    """A convolution of 28×28 images with 128 filters, in NHWC."""
    op = Conv((taps, taps), ((taps // 2, taps // 2),) * 2, (1, 1), stores=(stored(ACC),))
    image = channels_inner(batch, channels, 28, 28)
    return make_step(op, [image, weight(128, channels, taps, taps)])


def test_convolutions_that_are_products_are_tuned_as_such() -> None:
    step = pixels()
    found = tunables.product_of(step, HOPPER)
    assert found is not None
    one, epilogue = found
    assert (one.m, one.n, one.k) == (2 * 28 * 28, 128, 64)
    named = key_of(one, HALF, epilogue)
    other = ranked_tiles(one, HOPPER, epilogue.reads)[3].tile
    timed = replace(HOPPER, choices={named: choice_of(other, 1.0)})
    assert pick_tile(one, epilogue, timed) == other
    (launch,) = conv.lower(step, timed)
    (expected,) = launches_of(one, epilogue, other, HOPPER)
    assert launch.kernel.source.text == expected.kernel.source.text
    assert tunables.product_of(pixels(taps=3), HOPPER) is None
    relu = make_step(Pointwise((stored(ACC),)), [(F16, (4, 4))])
    assert tunables.product_of(relu, HOPPER) is None


@dataclass
class FakeTarget:
    """Keeps choices; its device loads anything."""

    choices: dict[str, Choice] = field(default_factory=dict)
    loads: list[int] = field(default_factory=list)
    lock: nullcontext[None] = field(default_factory=nullcontext)

    @property
    def context(self) -> Context:
        return replace(HOPPER, choices=self.choices)

    @property
    def device(self) -> SimpleNamespace:
        def load(kernels: Iterable[object]) -> None:
            self.loads.append(len(list(kernels)))

        return SimpleNamespace(load=load, errors=nullcontext, current=nullcontext)

    def keep_choices(self, found: Mapping[str, Choice]) -> None:
        self.choices |= found


def test_convolutions_are_timed_beside_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest is kept, unless the estimate's own is as fast but for noise, and lowering takes it."""
    step, other = pixels(taps=3), pixels(batch=3, taps=3)
    found = tunables.tunable(step, HOPPER)
    assert found is not None
    rows = [found.launches(i, HOPPER) for i in range(len(found.candidates))]

    def times(target: object, one: Step, rows: Sequence[object], rounds: Rounds) -> list[float]:
        return [10.0] * (len(rows) - 1) + [9.7 if one is step else 9.9]

    monkeypatch.setattr(tuner, "timed_launches", times)
    target = FakeTarget()
    trials = list(tuner.trials(cast(CudaTarget, target), [step, step, other], timed=True))
    assert len(target.choices) == 2
    assert [t.chosen for t in trials if t.product == found.key] == [False] * (len(rows) - 1) + [True]
    assert next(t.chosen for t in trials if t.product != found.key), "1 % faster is noise"
    (launch,) = conv.lower(step, target.context)
    assert launch.kernel.source.text == rows[-1][0].kernel.source.text != rows[0][0].kernel.source.text
    explained = list(tuner.trials(cast(CudaTarget, target), [step], timed=False))
    assert [t.chosen for t in explained] == [t.chosen for t in trials if t.product == found.key]
    assert not any(t.measured_us for t in explained)


def test_what_was_faster_once_has_to_be_so_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last candidate wins beside all others, but not beside the estimate's own alone; the one before it does."""
    step = pixels(taps=3)
    found = tunables.tunable(step, HOPPER)
    assert found is not None
    rows = [found.launches(i, HOPPER) for i in range(len(found.candidates))]

    def times(target: object, one: Step, now: Sequence[list[Launch]], rounds: Rounds) -> list[float]:
        if len(now) > 2:
            return [10.0] * (len(now) - 2) + [9.0, 8.0]
        return [10.0, 9.9 if now[1][0].kernel == rows[-1][0].kernel else 9.0]

    assert len(rows) > 3
    monkeypatch.setattr(tuner, "timed_launches", times)
    trials = list(tuner.trials(cast(CudaTarget, FakeTarget()), [step], timed=True))
    assert [trial.chosen for trial in trials] == [False] * (len(rows) - 2) + [True, False]


@pytest.mark.parametrize(("hot", "taken"), [([8.0, 7.9, 9.0], 0), ([8.0, 8.2, 7.8], 2), ([8.0, 7.0, 7.5], 1)])
def test_products_that_heat_the_chip_are_decided_on_a_hot_one(
    hot: list[float], taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that were near the fastest on a cool chip take turns, each behind its own work; what was far off does not."""
    step = pixels(batch=128, taps=3)  # 1.9 GFLOP
    found = tunables.tunable(step, HOPPER)
    assert found is not None
    count = len(found.candidates)
    asked: list[tuple[int, Rounds]] = []

    def times(target: object, one: Step, rows: Sequence[object], rounds: Rounds) -> list[float]:
        asked.append((len(rows), rounds))
        return hot if rounds.before else [5.1, 5.0, 5.05] + [5.6] * (count - 3)

    monkeypatch.setattr(tuner, "timed_launches", times)
    trials = list(tuner.trials(cast(CudaTarget, FakeTarget()), [step], timed=True))
    assert [number for number, _ in asked] == [count, 3]
    assert asked[1][1].before >= 0.04
    assert [trial.chosen for trial in trials].index(True) == taken


def test_products_are_timed_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifteen kinds of products, one of them twice; the clock goes on by a second for each that is timed."""
    clock = [0.0]

    def times(target: object, step: object, rows: Sequence[object], rounds: Rounds) -> list[float]:
        clock[0] += len(rows) > 2
        return [99.0 - 3 * i for i in range(len(rows))]  # the last tile is the fastest

    monkeypatch.setattr(tuner, "timed_launches", times)
    monkeypatch.setattr(tuner.time, "monotonic", lambda: clock[0])
    steps = [pixels(batch) for batch in range(1, 15)]
    steps += [pixels(), make_step(Gemm((ACC,)), [(F16, (4096, 768)), weight(768, 768)])]
    target = FakeTarget()
    first = list(tuner.trials(cast(CudaTarget, target), steps, timed=True, deadline=5.0))
    assert len({trial.product for trial in first}) == 15
    assert len({trial.product for trial in first if trial.measured_us is not None}) == len(target.choices) == 5
    assert len(target.loads) == 1, "no more is compiled than is timed soon"
    for product in target.choices:
        (chosen,) = (trial for trial in first if trial.product == product and trial.chosen)
        assert chosen.measured_us == min(t.measured_us or 99.0 for t in first if t.product == product)
    rest = list(tuner.trials(cast(CudaTarget, target), steps, timed=True))
    assert len({trial.product for trial in rest if trial.measured_us is not None}) == 10
    assert len(target.choices) == 15
    assert not any(trial.measured_us for trial in tuner.trials(cast(CudaTarget, target), steps, timed=True))
