"""Pools against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

from engine.ir.ops import Pool, PoolKind
from engine.targets.cuda import covering as cv
from engine.targets.cuda.covering import ACC, F16, make_step
from tests.engine.targets.cuda.cases import check, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner


def test_pools_match_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("pool"), []
    while len(cases) < count:
        i = len(cases)
        kernel = tuple(int(rng.integers(1, 5)) for _ in range(2))
        strides = tuple(int(rng.integers(1, 4)) for _ in range(2))
        pads = tuple((int(rng.integers(0, k)), int(rng.integers(0, k))) for k in kernel)
        size = tuple(k + int(rng.integers(0, 20)) for k in kernel)
        shape = (int(rng.integers(1, 4)), ragged(rng, 70, 8 if i % 3 else 1), *size)
        op = Pool(list(PoolKind)[i % 2], kernel, strides, pads, (1, 1), i % 4 > 1, i % 3 == 0, (cv.stored(ACC),))
        if (
            op.kind is PoolKind.AVERAGE
            and not op.count_include_pad
            and any(b >= k or e >= k for (b, e), k in zip(pads, kernel, strict=True))
        ):
            continue
        cases.append(Case(f"{op} {shape}", make_step(op, [(F16, shape)]), 25))
    check(runner, cases)
