"""Packed attention as the tests of its kernels ask for it, and what all of these kernels have to stand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from engine.ir.dtype import DType
from engine.ir.ops import Attention
from engine.plan.plan import Step
from engine.targets.cuda import covering as cv
from engine.targets.cuda.covering import ACC, F16, make_step
from engine.targets.cuda.kernel import Launch
from tests.engine.targets.cuda.cases import check
from tests.engine.targets.cuda.harness import Case, Runner

Lowering = Callable[[Step], Sequence[Launch]]


def starts_of(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int32)


def packed(dtype: DType, tokens: int, heads: int, head: int, sequences: int, causal: bool = False) -> Step:
    shape = (dtype, (1, heads, tokens, head))
    op = Attention(head**-0.5, causal, stores=(cv.stored(ACC, dtype),), packed=True)
    return make_step(op, [shape, shape, shape, (DType.I32, (sequences + 1,))])


def check_other_lengths(runner: Runner, lower: Lowering) -> None:
    """One launch, as a graph replays it, whatever the lengths: one sequence, all short ones, all empty ones."""
    step = packed(F16, 300, 2, 64, 6)
    launches = list(lower(step))
    rows = ([300, 0, 0, 0, 0, 0], [1] * 6, [0] * 6, [50] * 6, [0, 0, 0, 0, 0, 299], [7, 120, 0, 63, 64, 1])
    check(runner, [Case(str(lengths), step, 300, {3: starts_of(lengths)}, launches) for lengths in rows])


def check_sequences_apart(runner: Runner, lengths: list[int], lowerings: Callable[[Step], Iterable[Lowering]]) -> None:
    """No sequence reaches another, not even infinities and NaN: neither of a neighbour, the second sequence's, nor of
    the tokens that belong to none. The first two are of 100 and 60 tokens."""
    step, end = packed(F16, 290, 2, 64, len(lengths)), sum(lengths)
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal((1, 2, 290, 64)).astype(np.float16) for _ in range(3)]
    for lower in lowerings(step):
        launches = list(lower(step))
        (want,) = runner.run(step, launches, [*arrays, starts_of(lengths)])
        dirty = [array.copy() for array in arrays]
        for array in dirty:
            array[:, :, 100:160] = np.nan
            array[:, :, end:] = np.inf
        (got,) = runner.run(step, launches, [*dirty, starts_of(lengths)])
        kept = np.r_[0:100, 160:290]
        assert np.isfinite(want).all() and np.array_equal(got[:, :, kept], want[:, :, kept]), launches
        assert not got[:, :, end:].any()


def run_senseless_starts(runner: Runner, lower: Lowering) -> None:
    """They fall, are negative, or lie beyond the tokens: the runner finds stores outside the results."""
    step = packed(F16, 150, 2, 64, 4)
    rng = np.random.default_rng(4)
    arrays = [rng.standard_normal((1, 2, 150, 64)).astype(np.float16) for _ in range(3)]
    for starts in ([0, 900, 20, -5, 140], [-3, -2, -1, 0, 2**31 - 1], [150, 0, 150, 0, 7]):
        runner.run(step, list(lower(step)), [*arrays, np.array(starts, np.int32)])
