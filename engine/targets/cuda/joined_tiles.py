"""Tiles of clusters of blocks that share the k of a tile (kernels/scheduler/joined_k.cuh). Called by `conv_wgmma.py`,
`product_cost.py` and `choices.py`."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.kernel import ceildiv
from engine.targets.cuda.tiles import WgmmaTile

_SHARED = (
    WgmmaTile(128, 128, 5, cooperative=True),
    WgmmaTile(128, 96, 6, cooperative=True),
    WgmmaTile(128, 64, 8, cooperative=True),
    WgmmaTile(64, 192, 5),
    WgmmaTile(64, 128, 8),
    WgmmaTile(64, 64, 12),
)
_NARROW = (WgmmaTile(128, 32, 10, cooperative=True), WgmmaTile(64, 96, 10), WgmmaTile(64, 32, 16))
_SIZES = (2, 3, 4, 5, 6, 8)


def _joined(tile: WgmmaTile, blocks: int) -> WgmmaTile:
    """The tile of a cluster, with as long a ring as the sums leave room for."""
    joined = replace(tile, cluster_k=blocks)
    while joined.shared_bytes > SM_90A.shared_bytes:
        joined = replace(joined, stages=joined.stages - 1)
    return joined


JOINED_TILES = tuple(_joined(tile, blocks) for tile, blocks in product(_SHARED, _SIZES))
"""Tiles of clusters that share k."""
JOINED_PRODUCTS = (*JOINED_TILES, *(_joined(tile, blocks) for tile, blocks in product(_NARROW, _SIZES)))
"""Those of products, which may have few columns and a long k."""
JOINED_PAIRS = (_joined(WgmmaTile(128, 128, 5, cooperative=True, cluster_n=2), 2),)
"""Tiles of clusters of two pairs of blocks: each shares pixels, both share k. Of others NVRTC 13.0 moves descriptors to
uniform registers in every step (the gate shows it)."""


def has_steps(tile: WgmmaTile, steps: int) -> bool:
    """Whether every block of a cluster has two of so many steps of k on average, and none of them none."""
    return 2 * tile.cluster_k <= steps and (tile.cluster_k - 1) * ceildiv(steps, tile.cluster_k) < steps
