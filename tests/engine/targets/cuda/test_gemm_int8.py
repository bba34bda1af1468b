"""Products of integers of 8 bits, which are exact: on wgmma summed in 32 bits, on mma.sync as halves in fp32, which
holds every whole number up to 2²⁴. Only what follows the sum rounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Gemm
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.covering import ACC, F16, F32, make_step
from engine.targets.cuda.gemm import launches_of, lower, ranked_tiles
from engine.targets.cuda.joined_tiles import JOINED_PRODUCTS
from engine.targets.cuda.kernel import Context, Instruction, WeightStore
from engine.targets.cuda.tiles import BATCHED_TILES, PRODUCT_TILES, MmaTile, WgmmaTile
from tests.engine.targets.cuda.cases import broadcast_of, check, fed, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.test_gemm_fp8 import parts, parts_in, random_tile, twice_in

I8 = DType.I8
EXACT = 2.0**-23
HOPPER = Context(SM_90A, 132, WeightStore())


def numbers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape, dtype=np.int8)


def test_products_with_weights_are_exact(runner: Runner, count: int) -> None:
    """In every tile, k in one part or in several, with all that a quantised layer does behind the sum."""
    rng, cases = rng_of("int8"), []
    for i in range(2 * count):
        tile, granularity = random_tile(rng, i, runner.context)
        m, k, n = ragged(rng, 300), ragged(rng, 900, granularity), ragged(rng, 300)
        scaled = cv.mul(cv.add(ACC, cv.arg(2, F32)), cv.arg(3, F32))
        # Whole numbers and powers of two, so that no rounding lies beside a middle.
        levels = ex.apply(ex.PointOp.ROUND, scaled)
        limited = ex.apply(ex.PointOp.MIN, ex.apply(ex.PointOp.MAX, levels, cv.constant(-128)), cv.constant(127))
        store = (ACC, cv.stored(scaled, F16), ex.cast(limited, I8))[int(rng.integers(0, 3))]
        inputs: list[cv.Given] = [fed(I8, (m, k), -1, 0), numbers(rng, k, n)]
        if store is not ACC:
            inputs += [
                rng.integers(-1000, 1000, n).astype(np.float32),
                (2.0 ** rng.integers(-14, -8, n)).astype(np.float32),
            ]
        step = make_step(Gemm((store,)), inputs)
        feeds = {0: numbers(rng, m, k)}
        launches, label = twice_in(step, tile, runner.context), f"{m}x{n}x{k} {tile} to {store.dtype.value}"
        cases.append(Case(label, step, 1, feeds, lowered=launches, rounding=EXACT))
    check(runner, cases)


def test_products_of_activations_are_exact(runner: Runner, count: int) -> None:
    """Batches that broadcast in any way, k innermost in both, rows at any byte."""
    rng, cases = rng_of("int8 activations"), []
    for i in range(count):
        m, k, n = (ragged(rng, 150, int(rng.choice([1, 4, 16]))) for _ in range(3))
        lead = tuple(int(rng.integers(1, 4)) for _ in range(int(rng.integers(0, 4))))
        a, b = fed(I8, (*broadcast_of(rng, lead), m, k), -1, 0), fed(I8, (*broadcast_of(rng, lead), k, n), -2, 1)
        step = make_step(Gemm((ACC,)), [a, b])
        feeds = {0: numbers(rng, *a.shape), 1: numbers(rng, *b.shape)}
        cases.append(Case(f"{a.shape} {b.shape}", step, 1, feeds, lower(step, runner.context), rounding=EXACT))
        product, epilogue = parts(step, runner.context)
        if runner.context.architecture.wgmma and product.suits_tma_batched:
            launches = launches_of(product, epilogue, BATCHED_TILES[i % len(BATCHED_TILES)], runner.context)
            cases.append(Case(f"{a.shape} {b.shape} in turn", step, 1, feeds, launches, rounding=EXACT))
    check(runner, cases)


def test_sums_of_the_largest_products_are_rounded_once(hopper: Runner) -> None:
    """Beyond what fp32 holds: every product is 2¹⁴, but for one, whose ones show."""
    k = 4096
    a, b = np.full((64, k), -128, np.int8), np.full((k, 32), -128, np.int8)
    a[:, 7], b[7] = 1, 3
    store = ex.apply(ex.PointOp.SUB, ACC, cv.constant((k - 1) * 2.0**14))
    step = make_step(Gemm((store,)), [fed(I8, a.shape, -1, 0), b])
    small = next(tile for tile in PRODUCT_TILES if (tile.m, tile.n) == (64, 32))
    joined = next(tile for tile in JOINED_PRODUCTS if (tile.m, tile.n, tile.cluster_k) == (64, 32, 3))
    for tile in (small, replace(small, splits=3), joined):
        launches = parts_in(step, tile, hopper.context)
        assert all(hopper.prepare(launch.kernel) is None for launch in launches)
        (got,) = hopper.run(step, launches, [a, b])
        assert (got == np.float32((k - 1) * 2.0**14 + 3) - np.float32((k - 1) * 2.0**14)).all()


@pytest.mark.parametrize("k", [131056, 131072])
def test_sums_that_may_not_fit_32_bits_are_not_made_by_warpgroups(k: int) -> None:
    step = make_step(Gemm((ACC,)), [(I8, (256, k)), fed(I8, (k, 256), -2, 1)])
    product, epilogue = parts(step, HOPPER)
    kinds = {type(ranked.tile) for ranked in ranked_tiles(product, HOPPER, epilogue.reads)}
    assert kinds == ({MmaTile, WgmmaTile} if k < 131072 else {MmaTile})


def test_the_instruction_is_that_of_integers() -> None:
    step = make_step(Gemm((cv.stored(ACC),)), [(I8, (4096, 1024)), numbers(rng_of("kind"), 1024, 512)])
    for architecture, expected in ((SM_90A, Instruction.WGMMA_INT8), (SM_80, Instruction.MMA)):
        (launch,) = lower(step, Context(architecture, 132, WeightStore()))
        assert launch.kernel.instruction is expected
