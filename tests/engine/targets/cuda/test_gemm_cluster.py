"""Products by blocks in pairs that share an operand's tile, against float64; and what the tuner makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.plan.tensor import Buffer, Tensor
from engine.targets.cuda import gemm, tiles
from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.choices import choice_of, key_of, tile_of, tile_text
from engine.targets.cuda.gemm import needs_staged, operands_of, other_tiles, pick_tile, ranked_tiles
from engine.targets.cuda.kernel import TensorMap
from engine.targets.cuda.product_cost import Way
from engine.targets.cuda.tiles import CLUSTER_TILES, PRODUCT_TILES, STAGED_TILES, Operands, WgmmaTile
from tests.engine.targets.cuda.cases import check, check_late, thinned
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.test_gemm import EXACT, launched
from tests.engine.targets.cuda.test_gemm_staged import HOPPER, parts, random_products, step_of
from tests.engine.targets.cuda.wrong_kernels import check_is_caught, emulator_or_skip


def test_products_in_pairs_match_float64(hopper: Runner, count: int) -> None:
    check(hopper, random_products(hopper, "pairs", CLUSTER_TILES, 2 * count, (600, 600)))


@pytest.mark.parametrize("k", [40, 200, 680])
def test_products_of_several_tiles_a_block_in_pairs(hopper: Runner, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings wrap around, or are not filled once."""
    if k == 200:  # bands of two pairs of rows, or of four rows
        monkeypatch.setattr(tiles, "_KEPT_BYTES", 0)
        monkeypatch.setattr(tiles, "_BAND", 4)
    sizes: tuple[tuple[int, int], ...] = ((3000, 1512), (5000, 1000), (20000, 200))
    if isinstance(hopper, EmulatedRunner):
        sizes = ((300, 264),) if k < 600 else ((130, 8),)
    cases = []
    for i, tile in enumerate(thinned(hopper, CLUSTER_TILES, first=k // 200)):
        for m, n in sizes:
            name = ("residual", "bias gelu", "plain")[i % 3]
            step = step_of(m, n, k, name)
            launches = launched(step, tile, hopper.context)
            cases.append(Case(f"{m}x{n}x{k} {name} {tile}", step, k, lowered=launches, rounding=EXACT))
    check_late(hopper, cases)
    if isinstance(hopper, EmulatedRunner):
        with hopper.in_reverse():
            check(hopper, cases)


def test_a_tile_wholly_outside_the_result_takes_part(hopper: Runner) -> None:
    """The neighbour of the last tile along m, or along n; alone, and behind whole pairs."""
    cases = []
    for i, tile in enumerate(CLUSTER_TILES):
        beside = (1 + 100 * (tile.cluster_m > 1), 8 + 80 * (tile.cluster_n > 1))
        behind = (1 + 2 * tile.m * (tile.cluster_m > 1), 8 + 2 * tile.n * (tile.cluster_n > 1))
        for m, n in (beside, behind):
            assert tile.tiles(m, n) > -(-m // tile.m) * -(-n // tile.n)
            step = step_of(m, n, 136, ("residual", "bias")[i % 2])
            launches = launched(step, tile, hopper.context)
            cases.append(Case(f"{m}x{n} {tile}", step, 136, lowered=launches, rounding=EXACT))
    check_late(hopper, cases)


def test_pairs_follow_each_other_in_one_run(hopper: Runner) -> None:
    """Launches may overlap: the barriers of one are not those of the next."""
    cases = []
    for tile in CLUSTER_TILES:
        step = step_of(130, 264, 72, "bias")
        launches = launched(step, tile, hopper.context)
        cases.append(Case(f"{tile}", step, 72, lowered=launches * 3, rounding=EXACT))
    check(hopper, cases)


def test_rows_of_results_in_pairs_may_lie_apart(hopper: Runner) -> None:
    cases = []
    for tile in CLUSTER_TILES:
        m, n, k = 150, 136, 72
        step = step_of(m, n, k, "residual")

        def apart(tensor: Tensor, more: int, m: int = m, n: int = n) -> Tensor:
            buffer = Buffer(tensor.buffer.name, tensor.buffer.kind, m * (n + more) * 2)
            return replace(tensor, buffer=buffer, strides=(n + more, 1), offset=8)

        inputs = (*step.inputs[:3], apart(step.inputs[3], 24))
        step = replace(step, inputs=inputs, outputs=(apart(step.outputs[0], 40),))
        cases.append(Case(f"{tile}", step, k, lowered=launched(step, tile, hopper.context), rounding=EXACT))
    check(hopper, cases)


WRONG = {
    "a stage is filled before the neighbour has read it": (
        "if constexpr (CLUSTER > 1) barrier_arrive_in_cluster(neighbour + 8 * stage);",
        "if constexpr (CLUSTER > 1) barrier_arrive(own + 8 * stage);",
    ),
    "nobody waits for the neighbour's barriers": (
        "if constexpr (CLUSTER * CLUSTER_K > 1) meet_cluster();",
        "if constexpr (CLUSTER * CLUSTER_K > 1) __syncthreads();",
    ),
    "a block ends before its neighbour": ("      wait_for_readers<STAGES>(empty, stage, parity);\n", ""),
    "a block brings all to itself": ("all_sharers<SHARERS>());", "1 << cluster_rank());"),
    "both bring the same half": ("const u32 first = rank_of_sharer() * PART;", "const u32 first = 0;"),
}
"""Kernels that are wrong: what stands in their source, and instead of it."""


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("tile", [CLUSTER_TILES[0], CLUSTER_TILES[3], CLUSTER_TILES[7]], ids=str)
def test_the_emulator_shows_what_is_wrong_with_a_pair(
    what: str, tile: WgmmaTile, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, step = emulator_or_skip(), step_of(300, 264, 600, "bias")
    launches = launched(step, tile, runner.context)
    check_is_caught(runner, Case(what, step, 600, lowered=launches, rounding=EXACT), WRONG[what], monkeypatch)


def test_pairs_are_for_what_the_copy_engine_can_share() -> None:
    step = step_of(4096, 4096, 256, "bias")
    for tile in CLUSTER_TILES:
        assert tile.cluster == 2 and tile.most_splits == 1 and tile.shared_bytes <= SM_90A.shared_bytes
        (launch,) = launched(step, tile, HOPPER)
        kernel, maps = launch.kernel, dict(launch.arguments)
        a, b = maps["map_a"], maps["map_b"]
        assert kernel.cluster == 2 and launch.grid == (132, 1, 1) and launch.grid[0] % kernel.cluster == 0
        assert isinstance(a, TensorMap) and a.box_rows == tile.m // tile.cluster_n
        assert isinstance(b, TensorMap) and b.box_rows == tile.n // tile.cluster_m
        for multiprocessors in (1, 3, 113):
            (launch,) = launched(step, tile, replace(HOPPER, multiprocessors=multiprocessors))
            assert launch.grid[0] % 2 == 0 and 2 <= launch.grid[0] <= max(2, multiprocessors)
    assert launched(step_of(64, 64, 64, "bias"), CLUSTER_TILES[0], HOPPER)[0].grid == (2, 1, 1)


def test_pairs_are_timed_but_not_chosen_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    from engine.targets.cuda.tunables import OTHER_CANDIDATES, candidates

    product, epilogue = parts(step_of(8192, 4096, 256, "bias"))
    chosen = pick_tile(product, epilogue, HOPPER)
    assert chosen not in CLUSTER_TILES
    timed = [ranked.tile for ranked in candidates(product, epilogue, HOPPER)]
    assert sum(tile in CLUSTER_TILES for tile in timed) == OTHER_CANDIDATES and timed[0] == chosen
    bare = replace(epilogue, stage=lambda: None)
    assert not any(map(needs_staged, (ranked.tile for ranked in candidates(product, bare, HOPPER))))
    monkeypatch.setattr(gemm, "CHOSEN_BY_MODEL", frozenset({Way.CLUSTER}))
    best = other_tiles(product, epilogue, HOPPER)[Way.CLUSTER][0]
    single = ranked_tiles(product, HOPPER, epilogue.reads)[0]
    assert pick_tile(product, epilogue, HOPPER) == min((best, single), key=lambda one: one.estimate.cycles).tile
    older = replace(HOPPER, architecture=SM_80)
    assert not other_tiles(*parts(step_of(8192, 4096, 256, "bias"), older), older)[Way.CLUSTER]


def test_a_pair_that_was_fastest_is_taken() -> None:
    product, epilogue = parts(step_of(4096, 768, 768, "residual"))
    for tile in CLUSTER_TILES:
        assert tile_of(choice_of(tile, 1.0), product, Operands.HALF) == tile
        assert tile_of({**choice_of(tile, 1.0), "splits": 2}, product, Operands.HALF) is None
        key = key_of(product, operands_of(product, HOPPER), epilogue)
        assert pick_tile(product, epilogue, replace(HOPPER, choices={key: choice_of(tile, 9.0)})) == tile
    every = (*CLUSTER_TILES, *STAGED_TILES, *PRODUCT_TILES)
    assert len({tile_text(tile) for tile in every}) == len(every)
