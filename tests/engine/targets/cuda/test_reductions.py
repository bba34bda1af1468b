"""Reductions against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

import numpy as np

from engine.ir import expr as ex
from engine.ir.ops import Reduce, ReduceKind
from engine.targets.cuda import covering as cv
from engine.targets.cuda.covering import ACC, F16, I64, make_step
from tests.engine.targets.cuda.cases import check, fed, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner


def test_reductions_match_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("reduce"), []
    for i in range(count):
        rank = int(rng.integers(1, 5))
        shape = tuple(ragged(rng, 60, 8 if axis == rank - 1 and i % 2 else 1) for axis in range(rank))
        axes = tuple(axis for axis in range(rank) if rng.random() < 0.5) or (rank - 1,)
        kind = list(ReduceKind)[i % 5]
        if kind is ReduceKind.PROD:
            axes = axes[:1]
        integers = i % 7 == 0 and kind is not ReduceKind.MEAN
        dtype = I64 if integers else F16
        source: ex.Expr = ex.Arg(0, I64) if integers else cv.arg(0)
        store: ex.Expr = ex.Acc(I64) if integers else ACC
        op = Reduce(kind, axes, bool(i % 2), source, (store,))
        given: cv.Given = fed(dtype, shape, int(rng.integers(0, rank)), 0) if i % 3 == 0 else (dtype, shape)
        cases.append(Case(f"{kind} {shape} {axes}", make_step(op, [given]), int(np.prod(shape))))
    check(runner, cases)
