"""Norms and softmax against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

from engine.ir.ops import Norm, NormKind, Softmax
from engine.targets.cuda import covering as cv
from engine.targets.cuda.covering import ACC, F16, make_step, weight
from tests.engine.targets.cuda.cases import check, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner


def test_norms_match_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("norm"), []
    for i in range(count):
        rows, columns = ragged(rng, 200), ragged(rng, 5000, 8 if rng.random() < 0.6 else 1)
        kind = list(NormKind)[i % 3]
        residual = i % 2 == 0
        source = cv.add(cv.arg(0), cv.arg(3)) if residual else cv.arg(0)
        inputs: list[cv.Given] = [(F16, (rows, columns)), weight(columns), weight(columns)]
        inputs += [(F16, (rows, columns))] if residual else []
        stores = (cv.SCALE_SHIFT, source) if i % 5 == 0 else (cv.SCALE_SHIFT,)
        step = make_step(Norm(kind, (1,), 1e-5, source, stores=stores), inputs)
        cases.append(Case(f"{kind} {rows}x{columns}", step, columns))
    check(runner, cases)


def test_embedding_norm_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("embedding"), []
    for _ in range(40):
        batch, sequence, features = int(rng.integers(1, 5)), ragged(rng, 100), ragged(rng, 800, 8)
        step = cv.embedding_norm(batch, sequence, features)
        ids = rng.integers(-1000, 1000, (batch, sequence))
        cases.append(Case(f"{batch}x{sequence}x{features}", step, features, {3: ids}))
    check(runner, cases)


def test_softmax_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("softmax"), []
    for i in range(count):
        shape = (int(rng.integers(1, 4)), ragged(rng, 40), ragged(rng, 5000, 8 if i % 3 else 1))
        step = make_step(Softmax(2, i % 2 == 1, cv.arg(0), (ACC,)), [(F16, shape)])
        cases.append(Case(f"{shape} log={i % 2}", step, shape[2]))
    check(runner, cases)
