"""Products against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

from engine.ir.ops import Gemm
from engine.targets.cuda import covering as cv
from engine.targets.cuda.covering import ACC, F16, make_step, weight
from engine.targets.cuda.gemm import epilogue_of, launch_product, product_of
from engine.targets.cuda.tiles import MMA_TILES, WGMMA_TILES
from tests.engine.targets.cuda.cases import check, fed, ragged, rng_of
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner

GEMM_STORES = {"bias": cv.BIAS, "bias gelu": cv.BIAS_GELU, "residual": cv.BIAS_RESIDUAL, "plain": ACC}


def test_gemm_with_weight_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("gemm"), []
    tiles = [*MMA_TILES, *(WGMMA_TILES if runner.context.architecture.wgmma else ())]
    for i in range(count):
        tile = tiles[i % len(tiles)]
        aligned = tile in WGMMA_TILES or rng.random() < 0.6
        m, k, n = (
            ragged(rng, 700),
            ragged(rng, 900, 8 if aligned else 1),
            ragged(rng, 500, 8 if rng.random() < 0.6 else 1),
        )
        name = list(GEMM_STORES)[i % 4]
        inputs: list[cv.Given] = [(F16, (m, k)), weight(k, n)]
        inputs += [] if name == "plain" else [weight(n)]
        inputs += [(F16, (m, n))] if name == "residual" else []
        step = make_step(Gemm((GEMM_STORES[name],)), inputs)
        launch = launch_product(
            product_of(step, runner.context), epilogue_of(step, (GEMM_STORES[name],), (0, 1), n), tile, runner.context
        )
        cases.append(Case(f"{m}x{n}x{k} {name}", step, k, lowered=[launch]))
    check(runner, cases)


def test_gemm_of_more_tiles_than_multiprocessors(runner: Runner, count: int) -> None:
    """A persistent block takes several tiles: its rings and turns wrap around."""
    cases = []
    large, small = ((3000, 1512, 200), (5000, 1000, 1096), (20000, 200, 40)), ((420, 264, 200), (900, 40, 40))
    for m, n, k in small if isinstance(runner, EmulatedRunner) else large:
        step = make_step(Gemm((cv.BIAS_RESIDUAL,)), [(F16, (m, k)), weight(k, n), weight(n), (F16, (m, n))])
        product, epilogue = product_of(step, runner.context), epilogue_of(step, (cv.BIAS_RESIDUAL,), (0, 1), n)
        for tile in [*MMA_TILES, *(WGMMA_TILES if runner.context.architecture.wgmma else ())]:
            launch = launch_product(product, epilogue, tile, runner.context)
            cases.append(Case(f"{m}x{n}x{k} {tile}", step, k, lowered=[launch]))
    check(runner, cases)


def test_gemm_of_activations_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("batch"), []
    for i in range(count):
        m, k, n = (ragged(rng, 200, 8 if rng.random() < 0.5 else 1) for _ in range(3))
        lead = tuple(int(rng.integers(1, 4)) for _ in range(int(rng.integers(0, 3))))
        b_lead = lead if i % 3 else lead[1:]
        b = fed(F16, (*b_lead, k, n), inner=-2 if i % 2 else -1)
        step = make_step(Gemm((cv.stored(ACC),)), [(F16, (*lead, m, k)), b])
        cases.append(Case(f"{lead}{m}x{n}x{k} b{b_lead}", step, k))
    check(runner, cases)
