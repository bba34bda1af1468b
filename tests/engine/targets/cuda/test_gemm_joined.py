"""Products by clusters of blocks that share the k of a tile, against float64: every tile and size of cluster; and which
products they are for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.choices import choice_of, key_of, tile_of, tile_text
from engine.targets.cuda.covering import F16
from engine.targets.cuda.gemm import operands_of, other_tiles, pick_tile
from engine.targets.cuda.joined_tiles import JOINED_PRODUCTS
from engine.targets.cuda.product_cost import Way
from engine.targets.cuda.tiles import PRODUCT_TILES, Operands
from tests.engine.targets.cuda.cases import check, check_late, ragged, rng_of
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.test_gemm import EXACT, KINDS, context_of, launched, rounding, stores_of
from tests.engine.targets.cuda.test_gemm_staged import HOPPER, parts, step_of


def test_clusters_that_share_k_match_float64(hopper: Runner, count: int) -> None:
    """Every size of cluster, every kind of operands, ragged rows and columns, tiles beyond them, rows that are copied
    first, and clusters of which some have no k left."""
    rng, cases = rng_of("gemm joined"), []
    for i in range(2 * count):
        tile = replace(JOINED_PRODUCTS[5 * i % len(JOINED_PRODUCTS)], aligns=i % 3 == 0)
        kind = ("fp16", "bf16", "tf32")[int(rng.integers(0, 3))]
        name = list(stores_of(F16))[int(rng.integers(0, 4))]
        m, n = ragged(rng, 300), ragged(rng, 300)
        k = ragged(rng, 1200, 1 if tile.aligns else 8)
        step = step_of(m, n, k, name, KINDS[kind][0])
        launches = launched(step, tile, context_of(hopper, kind))
        kernel = launches[-1].kernel
        assert kernel.cluster == tile.cluster_k and "gemm_joined.cuh" in kernel.source.text
        assert launches[-1].grid[0] == tile.tiles(m, n) * tile.cluster_k
        cases.append(Case(f"{kind} {m}x{n}x{k} {name} {tile}", step, k, lowered=launches, rounding=rounding(kind)))
    check(hopper, cases)


def test_the_largest_cluster_with_the_deepest_ring_matches_float64(hopper: Runner) -> None:
    tile = max(JOINED_PRODUCTS, key=lambda one: (one.cluster_k * one.stages, one.cluster_k))
    cases = []
    for name in ("bias", "residual"):
        step = step_of(129, 72, 64 * 9 + 24, name)
        launches = launched(step, tile, hopper.context)
        cases.append(Case(f"{name} {tile}", step, 64 * 9 + 24, lowered=launches, rounding=EXACT))
    check(hopper, cases)


def test_clusters_follow_each_other_in_one_run(hopper: Runner) -> None:
    """Launches may overlap: the sums of one are not those of the next."""
    cases = []
    for tile in JOINED_PRODUCTS[:: 11 if isinstance(hopper, EmulatedRunner) else 3]:
        step = step_of(130, 136, 72 * 16, "bias")
        launches = launched(step, tile, hopper.context)
        cases.append(Case(f"{tile}", step, 72 * 16, lowered=launches * 2, rounding=EXACT))
    check_late(hopper, cases)


@pytest.mark.parametrize(("m", "n", "k"), [(72, 280, 9400), (88, 184, 5640), (128, 768, 3072), (208, 400, 5504)])
def test_few_tiles_with_a_long_k_are_timed_in_clusters(m: int, n: int, k: int) -> None:
    product, epilogue = parts(step_of(m, n, k, "bias"))
    ranked = other_tiles(product, epilogue, HOPPER)[Way.JOINED]
    assert len(ranked) > 10
    for one in ranked:
        tile = one.tile
        steps = -(-k // 64)
        assert 2 * tile.cluster_k <= steps and (tile.cluster_k - 1) * -(-steps // tile.cluster_k) < steps
        assert tile.tiles(m, n) * tile.cluster_k <= 132, "all clusters have room at once"
        assert tile.shared_bytes <= SM_90A.shared_bytes and tile.most_splits == 1 and tile.divides_rows
    older = replace(HOPPER, architecture=SM_80)
    assert not other_tiles(*parts(step_of(m, n, k, "bias"), older), older)[Way.JOINED]


def test_many_tiles_and_a_short_k_have_no_clusters() -> None:
    for m, n, k in ((8192, 4096, 4096), (64, 64, 128)):
        product, epilogue = parts(step_of(m, n, k, "bias"))
        assert not other_tiles(product, epilogue, HOPPER)[Way.JOINED]


def test_a_cluster_that_was_fastest_is_taken() -> None:
    product, epilogue = parts(step_of(72, 280, 9400, "bias"))
    for tile in JOINED_PRODUCTS:
        assert tile_of(choice_of(tile, 1.0), product, Operands.HALF) == tile
    texts = {tile_text(tile) for tile in (*JOINED_PRODUCTS, *PRODUCT_TILES)}
    assert len(texts) == len(JOINED_PRODUCTS) + len(PRODUCT_TILES)
    key = key_of(product, operands_of(product, HOPPER), epilogue)
    context = replace(HOPPER, choices={key: choice_of(JOINED_PRODUCTS[-1], 9.0)})
    assert pick_tile(product, epilogue, context) == JOINED_PRODUCTS[-1]
