"""Products of few rows (gemm_rows.cuh) against float64; and when they are chosen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Gemm
from engine.plan.plan import Step
from engine.plan.tensor import row_major
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import ARCHITECTURES, SM_80, SM_90A
from engine.targets.cuda.choices import choice_of, key_of, tile_of, tile_text
from engine.targets.cuda.covering import ACC, F16, F32, add, arg, make_step, mul, stored, weight
from engine.targets.cuda.gemm import launches_of, lower, operands_of, parts_of, pick_tile, ranked_tiles
from engine.targets.cuda.gemm_rows import (
    CLUSTER_ROWS_TILES,
    MOST_ROWS,
    ROWS_TILES,
    SHORT_ROWS_TILES,
    RowsTile,
    rows_tiles,
)
from engine.targets.cuda.kernel import Context, WeightStore, content
from engine.targets.cuda.product import Product
from engine.targets.cuda.tiles import Operands
from tests.engine.targets.cuda.cases import check, check_late, fed, ragged, rng_of, thinned, wiped
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.test_gemm import EXACT, launched, stores_of
from tests.engine.targets.cuda.test_gemm_staged import parts, step_of

BF16 = DType.BF16
HOPPER = Context(SM_90A, 132, WeightStore())
IN_CLUSTERS = [  # a cluster, and several that share k
    replace(tile, splits=parts * (3 + 2 * i), cluster=3 + 2 * i)
    for i, tile in enumerate(CLUSTER_ROWS_TILES)
    for parts in (1, 2)
]
SPLIT = [replace(tile, splits=2 + i) for i, tile in enumerate(ROWS_TILES)]
TILES = [*ROWS_TILES, *SPLIT, *IN_CLUSTERS, *SHORT_ROWS_TILES]


def product(m: int, n: int, k: int, dtype: DType = F16) -> Product:
    return parts(step_of(m, n, k, "plain", dtype), HOPPER)[0]


def test_few_rows_match_float64(runner: Runner, count: int) -> None:
    """Every tile, every epilogue, ragged rows, columns and k; weights of less than a step of a warp, and of many."""
    rng, cases, tiles = rng_of("few rows"), [], thinned(runner, TILES)
    for i in range(max(2 * count, len(tiles))):
        tile, dtype = tiles[i % len(tiles)], (F16, BF16)[i // 2 % 2]
        name = list(stores_of(F16))[int(rng.integers(0, 4))]
        m, n, k = int(rng.integers(1, MOST_ROWS + 1)), ragged(rng, 200), ragged(rng, 6000, 8)
        step = step_of(m, n, k, name, dtype)
        launches = launched(step, tile, runner.context)
        # Twice, with the result wiped in between: a split product must leave its counters as it found them.
        launches = [*launches, *wiped(step.outputs[0], runner.context), *launches] if tile.splits > 1 else launches
        cases.append(Case(f"{dtype} {m}x{n}x{k} {name} {tile}", step, k, lowered=launches, rounding=EXACT))
    check(runner, cases)


def test_a_split_product_has_the_same_bits_in_every_run(runner: Runner, count: int) -> None:
    step = step_of(9, 90, 5000, "bias")
    rng = rng_of("bits")
    arrays = [rng.standard_normal((9, 5000)).astype(F16.numpy), *(content(x) for x in step.inputs[1:])]
    for tile in (tile for tile in TILES if tile.splits > 1):
        launches = launched(step, tile, runner.context)
        first, *others = (runner.run(step, launches, arrays)[0].copy() for _ in range(max(2, count // 10)))
        assert all(np.array_equal(first, other) for other in others), tile


def test_computed_columns_match_float64(runner: Runner, count: int) -> None:
    """The second operand is not a constant, and nothing follows its rows but the next ones."""
    rng, cases = rng_of("computed"), []
    for i in range(count):
        tile, dtype = ROWS_TILES[i % len(ROWS_TILES)], (F16, BF16)[i // 2 % 2]
        m, n, k = int(rng.integers(1, MOST_ROWS + 1)), ragged(rng, 200), ragged(rng, 3000, 8)
        b = fed(dtype, (k, n), inner=0, number=1)
        step = make_step(Gemm((stored(ACC, dtype),)), [fed(dtype, (m, k), inner=-1, number=0), b])
        launches = launched(step, tile, runner.context)
        cases.append(Case(f"{dtype} {m}x{n}x{k} {tile}", step, k, lowered=launches, rounding=EXACT))
    check(runner, cases)


def test_epilogues_of_any_kind(runner: Runner, count: int) -> None:
    """More results than one, fp32 results, numbers for each row, rows in two levels, and more than registers should
    hold while a block multiplies."""
    m, n, k, cases = 12, 77, 1000, []
    tiles = [(F32, (m, n))] * 4
    several = add(add(add(add(ACC, arg(2, F32)), arg(3, F32)), arg(4, F32)), arg(5, F32))
    kinds: list[tuple[str, tuple[ex.Expr, ...], list[cv.Given]]] = [
        ("two results", (stored(ACC), add(ACC, ACC)), []),
        ("a number for each row", (stored(mul(ACC, arg(2, F32))),), [(F32, (m, 1))]),
        ("many tiles", (stored(several),), [*tiles]),
    ]
    for what, stores, more in kinds:
        step = make_step(Gemm(stores), [(F16, (m, k)), weight(k, n), *more])
        for tile in ROWS_TILES:
            launches = launched(step, tile, runner.context)
            cases.append(Case(f"{what} {tile}", step, k, lowered=launches, rounding=EXACT))
    apart = make_step(Gemm((stored(ACC),)), [(F16, (3, 4, k)), weight(k, n)])
    (result,) = apart.outputs
    apart = replace(apart, outputs=(replace(result, strides=row_major(result.shape, (1, 0, 2))),))
    for tile in ROWS_TILES:
        launches = launches_of(*parts(apart, runner.context), tile, runner.context)
        cases.append(Case(f"rows in two levels {tile}", apart, k, lowered=launches, rounding=EXACT))
    check(runner, cases)


def test_warps_may_be_late(runner: Runner) -> None:
    """Sums take the place of rings, whose warp alone knows when it is through with its own."""
    cases = []
    for tile in thinned(runner, (*ROWS_TILES, *IN_CLUSTERS), first=1):
        step = step_of(9, 2 * tile.columns + 3, 4000, "residual")
        launches = launched(step, tile, runner.context)
        cases.append(Case(f"{tile}", step, 4000, lowered=launches, rounding=EXACT))
    check_late(runner, cases)


def test_which_products_have_few_rows() -> None:
    short = list(SHORT_ROWS_TILES)
    assert list(rows_tiles(product(16, 100, 128))) == [*short[:1], *ROWS_TILES]
    assert list(rows_tiles(product(16, 100, 120))) == list(rows_tiles(product(1, 100, 40))) == short[:1]
    assert list(rows_tiles(product(1, 4000, 264, BF16))) == [*short[1:2], *ROWS_TILES]
    assert next(rows_tiles(product(1, 4000, 1024))) == short[2]
    alone = [tile for tile in rows_tiles(product(1, 100, 8192)) if tile.cluster == 1]
    assert {tile.splits for tile in alone} == {1, 2, 4, 8}
    narrow = make_step(Gemm((ACC,)), [(F32, (4, 4096)), weight(4096, 4096, dtype=F32)])
    across = make_step(Gemm((ACC,)), [(F16, (4, 4096)), (F16, (4096, 4096))])
    several = make_step(Gemm((ACC,)), [(F16, (3, 4, 4096)), (F16, (3, 4096, 64))])
    others = [product(17, 100, 128), product(16, 100, 32), product(16, 100, 132)]
    others += [parts(step, HOPPER)[0] for step in (narrow, across, several)]
    assert not any(list(rows_tiles(one)) for one in others)
    assert all(
        tile.shared_bytes(MOST_ROWS) <= architecture.shared_bytes
        for tile in (*ROWS_TILES, *SHORT_ROWS_TILES)
        for architecture in ARCHITECTURES.values()
    )


@pytest.mark.parametrize("m", [1, 4, 16])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (11008, 2048), (2048, 11008)])
def test_they_are_chosen_where_weights_are_many(m: int, n: int, k: int) -> None:
    step = step_of(m, n, k, "bias")
    for context in (HOPPER, replace(HOPPER, architecture=SM_80)):
        one, epilogue = parts(step, context)
        assert isinstance(pick_tile(one, epilogue, context), RowsTile)
        (launch,) = lower(step, context)
        assert '#include "gemm_rows' in launch.kernel.source.text


def test_a_tile_that_was_fastest_is_taken() -> None:
    one, epilogue = parts(step_of(4, 1000, 2048, "bias"), HOPPER)
    assert len({tile_text(tile) for tile in TILES}) == len(TILES)
    key = key_of(one, operands_of(one, HOPPER), epilogue)
    for tile in (*ROWS_TILES, replace(CLUSTER_ROWS_TILES[0], splits=2, cluster=2)):
        assert tile_of(choice_of(tile, 1.0), one, Operands.HALF) == tile
        assert pick_tile(one, epilogue, replace(HOPPER, choices={key: choice_of(tile, 1.0)})) == tile
        assert tile_of(choice_of(tile, 1.0), product(17, 1000, 2048), Operands.HALF) is None
    assert tile_of({**choice_of(ROWS_TILES[0], 1.0), "columns": 7}, one, Operands.HALF) is None


def test_blocks_divide_k_where_columns_are_few() -> None:
    def splits(n: int, k: int) -> int:
        best = ranked_tiles(product(8, n, k), HOPPER)[0].tile
        assert isinstance(best, RowsTile)
        return best.splits

    assert splits(1024, 16384) > 1 == splits(4096, 4096)


def test_clusters_divide_k_only_where_there_are_such_and_all_have_room() -> None:
    """Two blocks share a multiprocessor; of an H100's 132 those of eight find room for 30 clusters (tiles.py)."""
    for m, n, k in ((1, 512, 32768), (16, 256, 65536), (8, 1000, 25088), (16, 64, 262144), (3, 3000, 6000)):
        ranked = [one.tile for one in ranked_tiles(product(m, n, k), HOPPER) if isinstance(one.tile, RowsTile)]
        assert ranked[0].cluster > 1
        for tile in ranked:
            if tile.cluster > 1:
                assert tile.shared_bytes(m) <= (228 << 10) // 2 - (1 << 10)
                assert -(-n // tile.columns) * tile.splits <= 2 * HOPPER.multiprocessors
        older = ranked_tiles(product(m, n, k), replace(HOPPER, architecture=SM_80))
        assert not any(isinstance(one.tile, RowsTile) and one.tile.cluster > 1 for one in older)
    largest = [tile for tile in rows_tiles(product(16, 64, 262144)) if tile.cluster > 1]
    assert max(tile.splits for tile in largest) == 48 and {tile.cluster for tile in largest} == set(range(2, 9))


@pytest.mark.parametrize(("n", "k"), [(65536, 256), (33000, 512), (16384, 1024)])
def test_small_blocks_take_a_short_k(n: int, k: int) -> None:
    for m in (1, 8, 16):
        assert ranked_tiles(product(m, n, k), HOPPER)[0].tile in SHORT_ROWS_TILES


def test_the_estimate_is_no_less_than_the_time_of_memory() -> None:
    """3.35 TB/s is what an H100's memory has on paper."""
    for n, k in ((4096, 4096), (2048, 11008), (1000, 2048)):
        for ranked in ranked_tiles(product(8, n, k), HOPPER):
            if isinstance(ranked.tile, RowsTile):
                assert ranked.estimate.us > 2 * n * k / 3.35e6


def test_weights_are_asked_for_before_the_kernel_before_has_ended() -> None:
    """Only where they are constants."""

    def waits_last(step: Step) -> bool:
        (launch,) = launched(step, ROWS_TILES[0], HOPPER)
        return "constexpr bool constant_b = 1;" in launch.kernel.source.text

    computed = make_step(Gemm((stored(ACC),)), [(F16, (4, 4096)), fed(F16, (4096, 64), inner=0, number=1)])
    assert waits_last(step_of(4, 64, 4096, "plain"))
    assert not waits_last(computed)
    assert parts_of(computed, HOPPER) is not None
    assert np.prod(computed.outputs[0].shape) == 256
