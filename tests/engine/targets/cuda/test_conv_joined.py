"""Convolutions by clusters of blocks that share the k of a tile, against float64: every tile and size of cluster
(conftest.py says on what)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.conv import lower_in
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_wgmma import estimates
from engine.targets.cuda.covering import F16, make_step, weight
from engine.targets.cuda.joined_tiles import JOINED_PAIRS, JOINED_TILES
from engine.targets.cuda.kernel import Context, WeightStore
from engine.targets.cuda.tiles import Operands, WgmmaTile
from tests.engine.targets.cuda.cases import check, check_late, ragged, rng_of
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.test_conv import EPILOGUES, case, random_step
from tests.engine.targets.cuda.test_conv_wgmma import KINDS, PANELS, conv_step, described
from tests.engine.targets.cuda.wrong_kernels import check_is_caught, emulator_or_skip

TILES = (*JOINED_TILES, *JOINED_PAIRS)
HOPPER = Context(SM_90A, 132, WeightStore())


def test_clusters_that_share_k_match_float64(hopper: Runner, count: int) -> None:
    """Clusters of every size, also of pairs that share an operand, groups, epilogues with residuals, tiles beyond the
    last pixel and column, and clusters of which some have no k left."""
    rng, cases = rng_of("wgmma joined"), []
    for i in range(2 * count):
        kind, name = KINDS[i // 2 % 3], EPILOGUES[i % 4]
        tile = replace(TILES[7 * i % len(TILES)], panel_bytes=PANELS[i % 3])
        chunk, groups = 16 // kind.w.itemsize, 1 + (i % 5 == 4 and tile.cluster == 1)
        channels = ragged(rng, 300, tile.panel_bytes // kind.w.itemsize if groups > 1 else chunk)
        shape = described(rng, 2, groups, channels, ragged(rng, 200), False, kind)
        step = random_step(rng, kind, shape, name)
        launches = lower_in(step, Geometry(step), tile, kind.context(hopper))
        assert all(launch.kernel.cluster == tile.cluster * tile.cluster_k for launch in launches)
        cases.append(case(rng, kind, shape, step, launches, f"{name} {tile}"))
    check(hopper, cases)


WRONG = {
    "nobody waits for the other blocks' barriers": (
        "if constexpr (CLUSTER * CLUSTER_K > 1) meet_cluster();",
        "if constexpr (CLUSTER * CLUSTER_K > 1) __syncthreads();",
    ),
    "nobody waits for the sums of others": ("    barrier_wait(landed, 0);\n", ""),
    "a block gets its own sums only": ("address_in_cluster(place, number)", "place"),
    "blocks overwrite each other's sums": (
        "place = region + rank * FROM_BLOCK + 16 * thread",
        "place = region + 16 * thread",
    ),
    "every block has the same part of k": (
        "(CLUSTER_K > 1 ? rank_of_part() : blockIdx.y) * steps",
        "blockIdx.y * steps",
    ),
}
"""Kernels that are wrong: what stands in their source, and instead of it."""


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("tile", [JOINED_TILES[0], JOINED_TILES[-1], JOINED_PAIRS[0]], ids=str)
def test_the_emulator_shows_what_is_wrong(what: str, tile: WgmmaTile, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = emulator_or_skip()
    step = make_step(cv.conv_op(3), [(F16, (1, 72, 9, 9)), weight(72, 72, 3, 3), weight(72, 1, 1)])
    launches = lower_in(step, Geometry(step), tile, runner.context)
    check_is_caught(runner, Case(what, step, 9 * 72, lowered=launches, rounding=2.0**-21), WRONG[what], monkeypatch)


def test_clusters_follow_each_other_in_one_run(hopper: Runner) -> None:
    """Launches may overlap: the sums of one are not those of the next."""
    step = make_step(cv.conv_op(3), [(F16, (2, 72, 9, 9)), weight(136, 72, 3, 3), weight(136, 1, 1)])
    cases = []
    for tile in (*JOINED_TILES[::8], *JOINED_PAIRS[:1]) if isinstance(hopper, EmulatedRunner) else TILES[::3]:
        launches = lower_in(step, Geometry(step), tile, hopper.context)
        cases.append(Case(f"{tile}", step, 9 * 72, lowered=launches * 2, rounding=2.0**-21))
    check_late(hopper, cases)


def test_every_block_of_a_cluster_has_steps_of_its_own() -> None:
    for kernel, channels in ((3, 64), (1, 512), (3, 512)):
        step = conv_step((1, channels, 14, 14), (512, channels, kernel, kernel), pad=kernel // 2, strides=2)
        steps = kernel**2 * channels // 64
        found = [one.tile for one in estimates(step, Geometry(step), Operands.HALF, 1, HOPPER)]
        joined = [tile for tile in found if tile.cluster_k > 1]
        assert joined
        for tile in joined:
            assert 2 * tile.cluster_k <= steps
            assert (tile.cluster_k - 1) * -(-steps // tile.cluster_k) < steps
            (launch,) = lower_in(step, Geometry(step), tile, HOPPER)
            assert launch.kernel.cluster == tile.cluster * tile.cluster_k
            assert launch.grid[0] % launch.kernel.cluster == 0
            assert launch.kernel.shared_bytes <= SM_90A.shared_bytes
