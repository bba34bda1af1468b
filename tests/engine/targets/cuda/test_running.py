"""Running sums and products against float64, on random shapes, layouts and types (conftest.py says on what)."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Running, RunningKind
from engine.targets.cuda import covering as cv
from engine.targets.cuda.covering import F16, F32, I64, make_step
from tests.engine.targets.cuda.cases import check, fed, order_of, ragged, rng_of, wide
from tests.engine.targets.cuda.harness import Case, Runner

DTYPES = [F32, F16, I64, DType.F64, DType.BF16, DType.I32, DType.U8]


def test_running_matches_float64(runner: Runner, family_count: int) -> None:
    """Lines in one piece and in several, along any axis, one after the other and side by side."""
    rng, cases = rng_of("running"), []
    for i in range(family_count):
        rank, dtype, kind = int(rng.integers(1, 4)), DTYPES[i % len(DTYPES)], list(RunningKind)[i % 2]
        shape = [int(rng.integers(1, 14)) for _ in range(rank)]
        axis = int(rng.integers(0, rank))
        shape[axis] = ragged(rng, 3000 if i % 3 == 0 else 60)
        if i % 4 == 1 and rank > 1:
            shape[axis - 1] = 32 * runner.context.multiprocessors + 5  # enough lines side by side
            shape[axis] = ragged(rng, 30)
        x = rng.standard_normal(shape)
        if kind is RunningKind.PROD:
            x = np.exp(x / np.sqrt(shape[axis]))  # a product of any length stays near 1
        if not dtype.is_float:
            x = rng.integers(0, 4, shape) if kind is RunningKind.SUM else 1 + (rng.random(shape) < 0.01)
        op = Running(kind, axis, bool(rng.random() < 0.5), bool(rng.random() < 0.5))
        step = make_step(op, [fed(dtype, tuple(shape), int(rng.integers(0, rank)), 0)])
        step = cv.results_in(step, order_of(rng, rank))
        label, feeds = f"{kind} {dtype.value} {shape} axis {axis}", {0: x.astype(dtype.numpy)}
        cases.append(Case(label, step, shape[axis], feeds, computed=wide(dtype)))
    check(runner, cases)


def test_types_without_a_sum_are_named() -> None:
    with pytest.raises(UnsupportedOp, match="sum of bool"):
        make_step(Running(RunningKind.SUM, 0), [(DType.BOOL, (3,))])
