"""Every kernel family against float64 on the covering set: what `make kernels` compiles, run."""

from __future__ import annotations

from engine.targets.cuda import covering as cv
from tests.engine.targets.cuda.cases import check
from tests.engine.targets.cuda.harness import Case, Runner


def test_covering_set(runner: Runner, count: int) -> None:
    check(runner, [Case(step.name, step, 2000) for step in cv.steps()])
