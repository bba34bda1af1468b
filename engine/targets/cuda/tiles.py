"""Tile shapes of the matrix kernels and the cost model that ranks them. Called by `gemm.py` and `conv.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.targets.cuda.architecture import Architecture
from engine.targets.cuda.kernel import ceildiv


@dataclass(frozen=True)
class MmaTile:
    """A block's tile for mma.sync: `warps_m` × `warps_n` warps share it, `blocks` blocks share a multiprocessor."""

    m: int
    n: int
    k: int
    warps_m: int
    warps_n: int
    stages: int
    blocks: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.m + self.n) * self.k * 2

    @property
    def config(self) -> dict[str, int | bool | str]:
        return {
            "tile_m": self.m, "tile_n": self.n, "tile_k": self.k, "warps_m": self.warps_m, "warps_n": self.warps_n,
            "stages": self.stages, "blocks": self.blocks, "shared_bytes": self.shared_bytes,
        }  # fmt: skip


MMA_TILES = (
    MmaTile(128, 128, 32, 2, 4, 4, 2),
    MmaTile(128, 64, 64, 4, 2, 3, 2),
    MmaTile(128, 32, 64, 4, 1, 3, 3),
    MmaTile(64, 64, 64, 2, 2, 4, 3),
    MmaTile(32, 64, 64, 2, 2, 4, 4),
    MmaTile(16, 64, 64, 1, 2, 6, 4),
)


@dataclass(frozen=True)
class WgmmaTile:
    """A tile for wgmma. Two consumer warpgroups take tiles in turn, or (`cooperative`) halve the rows of each."""

    m: int
    n: int
    stages: int
    cooperative: bool = False

    @property
    def shared_bytes(self) -> int:
        """The ring, and the barriers `full` and `empty` of each stage and `turn` of each consumer."""
        return self.stages * (self.m + self.n) * 128 + 8 * (2 * self.stages + 2)

    @property
    def config(self) -> dict[str, int | bool | str]:
        return {
            "tile_m": self.m, "tile_n": self.n, "stages": self.stages, "cooperative": self.cooperative,
            "shared_bytes": self.shared_bytes,
        }  # fmt: skip


WGMMA_TILES = (
    WgmmaTile(128, 128, 6),
    WgmmaTile(128, 64, 8),
    WgmmaTile(64, 128, 8),
    WgmmaTile(64, 64, 12),
    WgmmaTile(128, 32, 10),
    WgmmaTile(128, 256, 4, cooperative=True),
    WgmmaTile(128, 192, 5, cooperative=True),
    WgmmaTile(128, 128, 6, cooperative=True),
    WgmmaTile(128, 96, 7, cooperative=True),
    WgmmaTile(128, 64, 8, cooperative=True),
)

# Per multiprocessor and clock: multiply-adds on fp16 (NVIDIA's architecture papers: A100 1024, H100 2048 of which
# mma.sync reaches about 0.6), and bytes from L2 (64 nominal; 48 leaves room for what never overlaps).
_MMA_RATE = 1024
_WGMMA_RATE = 2048
_L2_RATE = 48
_LAUNCH_CYCLES = 1500  # first loads and the drain of the last tile


def _cycles(
    m: int, n: int, k: int, batch: int, tile: tuple[int, int, int], rate: int, workers: int, share: int
) -> float:
    """Estimated cycles of a product in tiles over `workers` multiprocessors, `share` tiles at once on each."""
    tile_m, tile_n, tile_k = tile
    tiles = ceildiv(m, tile_m) * ceildiv(n, tile_n) * batch
    step = max(tile_m * tile_n * tile_k / rate, (tile_m + tile_n) * tile_k * 2 / _L2_RATE)
    # A lone block hides little of its own latency: charge a step as at least this many cycles, shared by its
    # neighbours.
    step = max(step, 250 / share)
    epilogue = tile_m * tile_n * 4 / _L2_RATE
    return _LAUNCH_CYCLES + ceildiv(tiles, workers) * (ceildiv(k, tile_k) * step + epilogue)


def pick_mma(m: int, n: int, k: int, batch: int, architecture: Architecture, multiprocessors: int) -> MmaTile:
    """The tile with the least estimated time among those whose ring fits the architecture."""
    fitting: Iterable[MmaTile] = (tile for tile in MMA_TILES if tile.shared_bytes <= architecture.shared_bytes)
    return min(
        fitting,
        key=lambda t: _cycles(m, n, k, batch, (t.m, t.n, t.k), _MMA_RATE, multiprocessors, t.blocks),
    )


def pick_wgmma(m: int, n: int, k: int, multiprocessors: int) -> WgmmaTile:
    """The wgmma tile with the least estimated time."""
    return min(WGMMA_TILES, key=lambda t: _cycles(m, n, k, 1, (t.m, t.n, 64), _WGMMA_RATE, multiprocessors, 2))
