"""The summary of a run: what is counted for which family, and what a comparison says of an error."""

from __future__ import annotations

import numpy as np

from engine.ir.ops import Conv, Gemm, Running, RunningKind
from engine.targets.cuda import covering as cv
from engine.targets.cuda.covering import ACC, F16, F32, make_step, weight
from tests.engine.targets.cuda.harness import compare
from tests.engine.targets.cuda.tally import FAMILIES, Tally, family, lines


def test_families_are_told_apart() -> None:
    kinds = {step.name: family(step) for step in cv.steps()}
    assert set(kinds.values()) == set(FAMILIES) - {"transposed convolution"}
    turned = Conv((2, 2), ((0, 0), (0, 0)), (1, 1), transposed=True, stores=(cv.stored(ACC),))
    assert family(make_step(turned, [(F16, (1, 8, 4, 4)), weight(8, 8, 2, 2)])) == "transposed convolution"


def test_cases_of_several_tests_are_added_up() -> None:
    product = make_step(Gemm((ACC,)), [(F16, (4, 8)), weight(8, 8)])
    running = make_step(Running(RunningKind.SUM, 0), [(F32, (4,))])
    first, second = Tally(), Tally()
    for ratio in (0.25, 0.5):
        first.count(product, ratio, failed=False)
    second.count(product, 7.0, failed=True)
    second.count(running, 0.125, failed=False)
    printed = {line.split("  ")[0]: line for line in lines([first.rows, second.rows], least=2)}
    assert list(printed) == list(FAMILIES)
    assert printed["gemm"].endswith("3 cases    1 failing  worst error/bound 0.50")
    assert printed["running sum"].endswith("1 cases    0 failing  worst error/bound 0.12  fewer than 2 cases")
    assert printed["pool"].endswith("0 cases    0 failing  worst error/bound 0.00  fewer than 2 cases")


def test_an_error_is_a_share_of_its_bound() -> None:
    want = np.ones((2, 4), np.float32)
    ratio, problem = compare(want, want, 8)
    assert ratio == 0 and problem is None
    ratio, problem = compare(want + np.float32(2**-12), want, 8)
    assert 0 < ratio < 1 and problem is None
    more, problem = compare(want + np.float32(2**-6), want, 8)
    assert more > 1 and problem is not None and "8 of 8 off" in problem
    assert 63 < more / ratio < 65
    assert compare(want * np.nan, want, 8)[0] == np.inf
    assert compare(np.array([1, 2]), np.array([1, 2]), 1) == (0.0, None)
    assert compare(np.array([1, 3]), np.array([1, 2]), 1)[0] == np.inf
