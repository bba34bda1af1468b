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
_LEAST_K, _SHORTEST_K = 128, 33  # below, the warps of large blocks have nothing to divide, and slices take it
_STEP = 64  # of k, that a warp takes at once: a line of the cache
_SPLITS = (1, 2, 4, 8)
_EARLY_REGISTERS, _FEWER_EARLY_REGISTERS = 16, 9
"""For what the epilogue reads of eight columns of a row, held while the block multiplies. The second number: of 16
warps, a bias of fp32 and the factor of a row; there are none with more than 8 rows (the gate shows spills)."""


@dataclass(frozen=True)
class RowsTile:
    """All rows of `columns` columns, whose k `warps` warps of each of `splits` blocks divide. A warp has its next
    `stages` steps under way, and the rows' elements for `ahead` of them."""

    columns: int
    warps: int
    stages: int
    ahead: int
    splits: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        return self.warps * self.stages * self.columns * _STEP * 2

    def early_registers(self, rows: int) -> int:
        """The registers for what the epilogue reads while the block multiplies."""
        return _EARLY_REGISTERS if self.warps <= 8 else _FEWER_EARLY_REGISTERS if rows <= VECTOR else 0

    def resident(self, rows: int) -> int:
        """The blocks that a multiprocessor has room for: of its registers where rows take few, else of its shared
        memory."""
        if self.warps == 2:
            return 8
        return 3 if self.columns * self.warps == 128 and rows <= VECTOR else 2


AnyTile: TypeAlias = Tile | StreamTile | RowsTile

ROWS_TILES = (
    RowsTile(16, 16, 2, 1),
    RowsTile(16, 8, 2, 2),
    RowsTile(16, 8, 3, 3),
    RowsTile(32, 8, 3, 3),
)
"""On an H100 each of them was the fastest of about 40 for some product, or within 1 % of it. Not worth it were 64
columns, 4 or 12 warps, warps of a block with columns of their own, steps of 64 bytes, a next kernel that starts later,
and the copy engine bringing long pieces of a column to the L2 cache ahead. Weights in the order in which they are read
would take up to 10 % less, but for rows of another number they would lie in memory twice."""


SHORT_ROWS_TILES = (RowsTile(32, 2, 1, 1),)
"""For a k of up to two lines, of which all is under way at once: small blocks, of which many fit."""


def rows_tiles(product: Product) -> Iterator[RowsTile]:
    """The tiles that can take a product: few rows of 16 bits, single matrices that are read 16 bytes at once."""
    if product.m <= MOST_ROWS and product.dtype.itemsize == 2 and product.suits_tma:
        if product.k < _LEAST_K:
            yield from SHORT_ROWS_TILES if product.k >= _SHORTEST_K else ()
            return
        lines = ceildiv(product.k, _STEP)
        for tile in ROWS_TILES:
            for splits in _SPLITS:
                if splits == 1 or lines >= splits * tile.warps * tile.stages:
                    yield replace(tile, splits=splits)


def launch_rows(product: Product, epilogue: Functor, tile: RowsTile) -> Launch:
    """The launch of a product of few rows: a block for every so many columns."""
    reads, blocks, row_tiles = epilogue.reads, ceildiv(product.n, tile.columns), ceildiv(product.m, VECTOR)
    early = reads.fixed + reads.varying <= tile.early_registers(product.m)
    finishers = ceildiv(row_tiles * tile.columns, 32)  # warps that have results
    return launch(
        "gemm",
        "gemm_rows.cuh",
        {
            "columns": tile.columns, "warps": tile.warps, "stages": tile.stages, "ahead": tile.ahead,
            "blocks": tile.resident(product.m), "split": tile.splits > 1, "shared_bytes": tile.shared_bytes,
            "operand": STORAGE[product.dtype], "row_tiles": row_tiles,
            "constant_b": product.b.is_constant, "early": early,
        },
        [epilogue],
        {
            "a": product.a.pointer, "a_stride": I64(product.a.stride),
            "b": product.b.pointer, "b_stride": I64(product.b.stride),
            "m": product.m, "n": product.n, "k": product.k,
            **split_arguments(blocks, 32 * VECTOR * finishers, finishers, tile.splits),
        },
        (blocks, tile.splits, 1),
        tile.threads,
        tile.shared_bytes,
        Instruction.MMA,
    )  # fmt: skip
