"""Every kernel family against float64 on the covering set: what `make kernels` compiles, run."""

from __future__ import annotations

from dataclasses import replace

from engine.plan.plan import Step
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.families import family_of
from engine.targets.cuda.kernel import WeightStore
from tests.engine.targets.cuda.cases import check
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner


def test_covering_set(runner: Runner, count: int) -> None:
    check(runner, [Case(step.name, step, 2000) for step in cv.steps() if not _is_emulated_already(runner, step)])


def _is_emulated_already(runner: Runner, step: Step) -> bool:
    """Whether the emulator of sm_90a runs the same kernels for a step."""
    if not isinstance(runner, EmulatedRunner) or runner.context.architecture is SM_90A:
        return False
    newer = replace(runner.context, architecture=SM_90A, weights=WeightStore())
    own, others = (
        {launch.kernel.source for launch in family_of(step.op).lower(step, context)}
        for context in (replace(runner.context, weights=WeightStore()), newer)
    )
    return own <= others
