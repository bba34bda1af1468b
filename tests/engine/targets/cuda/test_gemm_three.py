"""Products in tiles whose rows three consumers share: what they are for, and what their kernels would be without a part
of what the third one needs. That they match float64 is checked with the other tiles (test_gemm.py, test_gemm_staged.py,
test_gemm_cluster.py)."""

from __future__ import annotations

import pytest

from engine.targets.cuda import conv
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.covering import make_step, weight
from engine.targets.cuda.gemm import estimated_best, launches_of, pick_tile
from engine.targets.cuda.tiles import CLUSTER_TILES, PRODUCT_TILES, STAGED_TILES, WgmmaTile
from tests.engine.targets.cuda.harness import Case
from tests.engine.targets.cuda.test_gemm import EXACT, launched
from tests.engine.targets.cuda.test_gemm_staged import HOPPER, parts, step_of
from tests.engine.targets.cuda.wrong_kernels import check_is_caught, emulator_or_skip

THREE = [tile for tile in (*PRODUCT_TILES, *STAGED_TILES, *CLUSTER_TILES) if tile.consumers == 3]


def test_three_consumers_have_an_instruction_of_rows_each() -> None:
    assert {(tile.m, tile.n) for tile in THREE} == {(192, 128), (192, 192)}
    for tile in THREE:
        assert tile.cooperative and tile.consumer_rows == 64 and tile.threads == 512 and tile.most_splits == 1
        assert tile.accumulators <= 96, "an instruction's fit the 128 registers with which a thread starts"
        assert tile.shared_bytes <= SM_90A.shared_bytes
    others = {tile for tile in (*PRODUCT_TILES, *STAGED_TILES, *CLUSTER_TILES) if tile not in THREE}
    assert {tile.threads for tile in others} == {384}
    assert {tile.accumulators for tile in (WgmmaTile(128, 256, 4, True), WgmmaTile(128, 128, 6))} == {128}


@pytest.mark.parametrize(
    ("m", "n", "k", "name", "size"),
    [
        (6272, 512, 1024, "bias", (192, 128)),
        (6272, 512, 2048, "bias", (192, 128)),
        (6304, 768, 3072, "residual", (192, 192)),
    ],
)
def test_they_fill_every_multiprocessor_once(m: int, n: int, k: int, name: str, size: tuple[int, int]) -> None:
    """Where 128 rows make 98, 150 or 196 tiles for 132 multiprocessors."""
    step = step_of(m, n, k, name)
    product, epilogue = parts(step)
    tile = pick_tile(product, epilogue, HOPPER)
    assert isinstance(tile, WgmmaTile) and (tile.m, tile.n) == size and tile.tiles(m, n) == HOPPER.multiprocessors
    (launch,) = launches_of(product, epilogue, tile, HOPPER)
    assert launch.grid == (132, 1, 1) and launch.kernel.threads == 512
    assert estimated_best(product, epilogue, HOPPER).estimate.limit == "products"


@pytest.mark.parametrize(("n", "k"), [(96, 576), (112, 672)])
def test_they_are_not_taken_unmeasured_where_columns_are_missing(n: int, k: int) -> None:
    """131 tiles of 192 × 128 would be one full round."""
    product, epilogue = parts(step_of(25088, n, k, "residual"))
    tile = pick_tile(product, epilogue, HOPPER)
    assert isinstance(tile, WgmmaTile) and tile.consumers == 2


def test_a_pointwise_convolution_takes_them() -> None:
    """1×1, 1024 → 512 channels at 14 × 14, batch 32."""
    pixels = cv.channels_inner(32, 1024, 14, 14)
    step = make_step(cv.conv_op(1), [pixels, weight(512, 1024, 1, 1), weight(512, 1, 1)])
    (launch,) = conv.lower(step, HOPPER)
    assert launch.kernel.threads == 512 and launch.grid == (132, 1, 1)


WRONG = {
    "a stage is filled before the third has read it": (
        "READERS = CLUSTER * (COOPERATIVE ? CONSUMERS : 1);",
        "READERS = CLUSTER * 2;",
    ),
    "the third has no courier": ("if (consumer < CONSUMERS && threadIdx", "if (consumer < 2 && threadIdx"),
    "the third stores the rows of the second": (
        "return tile.m * TILE_M + (COOPERATIVE ? consumer * CONSUMER_M : 0);",
        "return tile.m * TILE_M + (consumer > 0 ? CONSUMER_M : 0);",
    ),
}
"""Kernels that are wrong: what stands in their source, and instead of it."""


@pytest.mark.parametrize("what", WRONG)
def test_the_emulator_shows_what_is_wrong_with_three(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, step = emulator_or_skip(), step_of(200, 136, 600, "bias")
    tile = next(tile for tile in STAGED_TILES if tile.consumers == 3 and tile.n == 128)
    launches = launched(step, tile, runner.context)
    check_is_caught(runner, Case(what, step, 600, lowered=launches, rounding=EXACT), WRONG[what], monkeypatch)
