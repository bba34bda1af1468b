"""Products of several matrices, and of a second operand whose columns are innermost, on warpgroups, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.ir.dtype import DType
from engine.ir.ops import Gemm
from engine.plan.plan import Step
from engine.plan.tensor import row_major
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.choices import choice_of, key_of, tile_of, tile_text
from engine.targets.cuda.covering import ACC, F16, F32, make_step, stored, weight
from engine.targets.cuda.gemm import launches_of, operands_of, other_tiles, parts_of, pick_tile
from engine.targets.cuda.kernel import Context, Functor, WeightStore
from engine.targets.cuda.product import Product
from engine.targets.cuda.product_cost import Way
from engine.targets.cuda.tiles import BATCHED_TILES, PRODUCT_TILES, STAGED_TILES, MmaTile, Operands
from tests.engine.targets.cuda.cases import broadcast_of, check, fed, ragged, rng_of
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.test_gemm import EXACT

BF16 = DType.BF16
HOPPER = Context(SM_90A, 132, WeightStore())


def parts(step: Step, context: Context = HOPPER) -> tuple[Product, Functor]:
    found = parts_of(step, context)
    assert found is not None
    return found


def test_batched_products_match_float64(hopper: Runner, count: int) -> None:
    """In every tile: batches of two axes along which either operand may be the same, k or the columns innermost."""
    rng, cases = rng_of("batched"), []
    for i in range(2 * count):
        tile, dtype = BATCHED_TILES[i % len(BATCHED_TILES)], (F16, BF16)[int(rng.integers(0, 2))]
        m, n, k = ragged(rng, 300), ragged(rng, 300, 8), ragged(rng, 300, 8)
        lead = tuple(int(rng.integers(1, 4)) for _ in range(int(rng.integers(0, 3))))
        across = not lead or rng.random() < 0.5
        a = fed(dtype, (*broadcast_of(rng, lead), m, k), -1, 0)
        b = fed(dtype, (*broadcast_of(rng, lead), k, n), -1 if across else -2, 1)
        step = make_step(Gemm((stored(ACC, dtype),)), [a, b])
        product, epilogue = parts(step, hopper.context)
        if not product.suits_tma_batched:  # one matrix after all, or one row of k
            assert product.batch.count == 1 and product.b.k_inner
            continue
        launches = launches_of(product, epilogue, tile, hopper.context)
        cases.append(Case(f"{dtype} {a.shape} {b.shape} {b.strides} {tile}", step, k, lowered=launches, rounding=EXACT))
    assert len(cases) > count
    check(hopper, cases)


def test_batched_products_of_more_tiles_than_multiprocessors(hopper: Runner, count: int) -> None:
    """With what an epilogue reads of every matrix; heads of a token that lie in one another."""
    cases = []
    batch, m, n, k = (5, 200, 136, 72) if isinstance(hopper, EmulatedRunner) else (30, 700, 584, 264)
    for tile in BATCHED_TILES:
        residual: cv.Given = (F16, (batch, 2, m, n))
        inputs: list[cv.Given] = [(F16, (batch, 2, m, k)), (F16, (batch, 2, k, n)), weight(n), residual]
        step = make_step(Gemm((cv.BIAS_RESIDUAL,)), inputs)
        apart = [replace(t, strides=row_major(t.shape, (0, 2, 1, 3))) for t in step.inputs[:2]]
        (result,) = step.outputs
        result = replace(result, strides=row_major(result.shape, (0, 2, 1, 3)))
        step = replace(step, inputs=(*apart, *step.inputs[2:]), outputs=(result,))
        product, epilogue = parts(step, hopper.context)
        assert product.suits_tma_batched and product.batch.count == 2 * batch and not product.b.k_inner
        launches = launches_of(product, epilogue, tile, hopper.context)
        cases.append(Case(f"{tile}", step, k, lowered=launches, rounding=EXACT))
    check(hopper, cases)
    if isinstance(hopper, EmulatedRunner):
        with hopper.in_reverse():
            check(hopper, cases)


def test_which_products_can_be_batched() -> None:
    def suits(a: cv.Given, b: cv.Given) -> bool:
        return parts(make_step(Gemm((ACC,)), [a, b]))[0].suits_tma_batched

    assert suits((F16, (3, 40, 64)), (F16, (3, 64, 72)))
    assert suits((F16, (40, 64)), (F16, (64, 72))), "one matrix, columns innermost"
    assert not suits((F16, (40, 64)), weight(64, 72)), "a weight is packed with k innermost"
    assert not suits((F32, (3, 40, 64)), (F32, (3, 64, 72)))
    assert not suits((F16, (3, 40, 60)), (F16, (3, 60, 72))) and not suits((F16, (3, 40, 64)), (F16, (3, 64, 70)))
    lead = [fed(F16, (2, 3, 2, 40, 64), -1, 0), fed(F16, (2, 1, 2, 64, 72), -1, 1)]
    assert not suits(*lead), "a batch of three axes"
    inner = fed(F16, (3, 40, 64), -2, 0)
    assert not suits(inner, (F16, (3, 64, 72))), "rows innermost"


def test_batched_tiles_are_chosen_by_their_estimates_and_timed() -> None:
    pytest.importorskip("cupy")
    from engine.targets.cuda.tunables import OTHER_CANDIDATES, candidates

    step = make_step(Gemm((stored(ACC),)), [(F16, (96, 512, 512)), (F16, (96, 512, 64))])
    product, epilogue = parts(step)
    chosen = pick_tile(product, epilogue, HOPPER)
    assert chosen in BATCHED_TILES
    timed = [ranked.tile for ranked in candidates(product, epilogue, HOPPER)]
    assert sum(tile in BATCHED_TILES for tile in timed) == OTHER_CANDIDATES and timed[0] == chosen
    assert len(set(timed)) == len(timed) and any(isinstance(tile, MmaTile) for tile in timed)
    older = replace(HOPPER, architecture=SM_80)
    assert not other_tiles(*parts(step, older), older)[Way.BATCHED]


def test_a_batched_tile_that_was_fastest_is_taken() -> None:
    step = make_step(Gemm((stored(ACC),)), [(F16, (96, 512, 512)), (F16, (96, 512, 64))])
    product, epilogue = parts(step)
    single = parts(make_step(Gemm((stored(ACC),)), [(F16, (512, 512)), weight(512, 64)]))[0]
    for tile in BATCHED_TILES:
        assert tile_of(choice_of(tile, 1.0), product, Operands.HALF) == tile
        assert tile_of(choice_of(tile, 1.0), single, Operands.HALF) is None
        assert tile_of(choice_of(replace(tile, batched=False), 1.0), product, Operands.HALF) is None
    every = (*BATCHED_TILES, *STAGED_TILES, *PRODUCT_TILES)
    assert len({tile_text(tile) for tile in every}) == len(every)
    key = key_of(product, operands_of(product, HOPPER), epilogue)
    assert (
        pick_tile(product, epilogue, replace(HOPPER, choices={key: choice_of(BATCHED_TILES[2], 9.0)}))
        == BATCHED_TILES[2]
    )
