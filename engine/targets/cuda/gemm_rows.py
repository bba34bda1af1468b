"""Products of up to 16 rows (gemm_rows.cuh): memory takes as long to deliver the second operand as all the rest. Called
by `gemm.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from engine.targets.cuda.gemm_stream import StreamTile
from engine.targets.cuda.gemm_wgmma import split_arguments
from engine.targets.cuda.kernel import I64, STORAGE, Functor, Instruction, Launch, ceildiv, launch
from engine.targets.cuda.product import Product
from engine.targets.cuda.spaces import VECTOR
from engine.targets.cuda.tiles import Tile

MOST_ROWS = 16
LEAST_K, _SHORTEST_K = 128, 33  # below, the warps of large blocks have nothing to divide, and slices take it
_STEP = 64  # of k, that a warp takes at once: a line of the cache
_SHORT_END_WARPS = 2
"""Of blocks for a k so short that the end of a row counts; larger ones have no registers to tell it from the rest (the
gate shows spills)."""
_SPLITS = (1, 2, 4, 8)
_CLUSTERS = (2, 3, 4, 5, 6, 7, 8)
_CLUSTERS_SIDE_BY_SIDE, _PARTS_OF_SEVERAL = (6, 8), (2, 3, 4, 6)
"""Sizes of clusters, those of which several share k, and how many do: where columns are few."""
MOST_COLUMNS, _MOST_BLOCKS = 3072, 400
"""Of products whose k clusters divide: with more columns there are blocks enough, and with more blocks too many."""
_EARLY_REGISTERS, _FEWER_EARLY_REGISTERS = 16, 9
"""For what the epilogue reads of eight columns of a row, held while the block multiplies. The second number: of 16
warps, a bias of fp32 and the factor of a row; there are none with more than 8 rows (the gate shows spills)."""


@dataclass(frozen=True)
class RowsTile:
    """All rows of `columns` columns, whose k `warps` warps of each of `splits` blocks divide. A warp has its next
    `stages` steps under way, and the rows' elements for `ahead` of them. `cluster` of the blocks add up in shared
    memory what they have, where there are such (mma/cluster_sums.cuh), the others in global memory."""

    columns: int
    warps: int
    stages: int
    ahead: int
    splits: int = 1
    cluster: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def ring_bytes(self) -> int:
        """Of all warps' rings."""
        return self.warps * self.stages * self.columns * _STEP * 2

    def shared_bytes(self, rows: int) -> int:
        """The rings, and what the others of a cluster send, with a barrier."""
        sums = ceildiv(rows, VECTOR) * VECTOR * self.columns * 4
        return self.ring_bytes + ((self.cluster - 1) * sums + 16 if self.cluster > 1 else 0)

    def early_registers(self, rows: int) -> int:
        """The registers for what the epilogue reads while the block multiplies."""
        return _EARLY_REGISTERS if self.warps <= 8 else _FEWER_EARLY_REGISTERS if rows <= VECTOR else 0

    def resident(self, rows: int) -> int:
        """The blocks that a multiprocessor has room for: of its registers where rows take few, else of its shared
        memory."""
        if self.warps <= 4:
            return 8 if self.ring_bytes <= 16 << 10 else 5
        return 3 if self.columns * self.warps == 128 and rows <= VECTOR else 2


AnyTile: TypeAlias = Tile | StreamTile | RowsTile

ROWS_TILES = (
    RowsTile(16, 16, 2, 2),
    RowsTile(16, 8, 2, 2),
    RowsTile(16, 8, 3, 3),
    RowsTile(32, 8, 3, 3),
)
"""On an H100 each of them was the fastest of about 40 for some product, or within 1 % of it. Not worth it were 64
columns, 4 or 12 warps, warps of a block with columns of their own, steps of 64 bytes, a next kernel that starts later,
and the copy engine bringing long pieces of a column to the L2 cache ahead. Weights in the order in which they are read
would take up to 10 % less, but for rows of another number they would lie in memory twice."""


CLUSTER_ROWS_TILES = (RowsTile(16, 16, 2, 2), RowsTile(32, 8, 3, 3))
"""What clusters divide k in: of 27 products on an H100 one of them took 1 % longer than the best of all on average."""


SHORT_ROWS_TILES = (RowsTile(32, 2, 1, 1), RowsTile(32, 4, 1, 1), RowsTile(32, 4, 2, 1))
"""For a short k, of which all or much is under way at once: small blocks, of which many fit."""
_SHORT_K = ((_SHORTEST_K, 256), (257, 512), (769, 1024))
"""What each of them is for, from and up to. On an H100 they read weights of 65536×256, 33000×512 and 16384×1024 at 0.83
to 0.90 of the rate of a copy, where the others reached 0.68 to 0.85; with a k of 552 and 576, 6 % longer, no more."""


def rows_tiles(product: Product) -> Iterator[RowsTile]:
    """The tiles that can take a product: few rows of 16 bits, single matrices that are read 16 bytes at once. Those of
    clusters are for sm_90a."""
    if product.m > MOST_ROWS or product.dtype.itemsize != 2 or not product.suits_tma:
        return
    for tile, (shortest, longest) in zip(SHORT_ROWS_TILES, _SHORT_K, strict=True):
        if shortest <= product.k <= longest:
            yield tile
    if product.k < LEAST_K:
        return
    lines = ceildiv(product.k, _STEP)
    for tile in ROWS_TILES:
        for splits in _SPLITS:
            if splits == 1 or lines >= splits * tile.warps * tile.stages:
                yield replace(tile, splits=splits)
    if product.n <= MOST_COLUMNS:
        for tile in CLUSTER_ROWS_TILES:
            yield from _in_clusters(tile, ceildiv(product.n, tile.columns), lines)


def _in_clusters(tile: RowsTile, groups: int, lines: int) -> Iterator[RowsTile]:
    """The ways in which clusters divide so many `lines` of k, where columns are `groups`: every warp has a line."""
    several = ((cluster, parts) for cluster in _CLUSTERS_SIDE_BY_SIDE for parts in _PARTS_OF_SEVERAL)
    for cluster, parts in (*((cluster, 1) for cluster in _CLUSTERS), *several):
        splits = cluster * parts
        if lines >= splits * tile.warps and groups * splits <= _MOST_BLOCKS:
            yield replace(tile, splits=splits, cluster=cluster)


def launch_rows(product: Product, epilogue: Functor, tile: RowsTile) -> Launch:
    """The launch of a product of few rows: a block, or several, for every so many columns."""
    reads, blocks, row_tiles = epilogue.reads, ceildiv(product.n, tile.columns), ceildiv(product.m, VECTOR)
    early = reads.fixed + reads.varying <= tile.early_registers(product.m)
    finishers = ceildiv(row_tiles * tile.columns, 32)  # warps that have results
    parts, shared = tile.splits // tile.cluster, tile.shared_bytes(product.m)
    return launch(
        "gemm",
        "gemm_rows_joined.cuh" if tile.cluster > 1 else "gemm_rows.cuh",
        {
            "columns": tile.columns, "warps": tile.warps, "stages": tile.stages, "ahead": tile.ahead,
            "blocks": tile.resident(product.m), "split": parts > 1, "shared_bytes": shared,
            "cluster": tile.cluster, "operand": STORAGE[product.dtype], "row_tiles": row_tiles,
            "constant_b": product.b.is_constant, "early": early,
            "short_end": tile.warps <= _SHORT_END_WARPS and 0 < product.k % (2 * _STEP) <= 3 * _STEP // 2,
        },
        [epilogue],
        {
            "a": product.a.pointer, "a_stride": I64(product.a.stride),
            "b": product.b.pointer, "b_stride": I64(product.b.stride),
            "m": product.m, "n": product.n, "k": product.k,
            **split_arguments(blocks, 32 * VECTOR * finishers, finishers, parts),
        },
        (blocks * tile.cluster, parts, 1),
        tile.threads,
        shared,
        Instruction.MMA,
        cluster=tile.cluster,
    )  # fmt: skip
