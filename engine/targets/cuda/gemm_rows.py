"""Products of up to 16 rows (gemm_rows.cuh): memory takes as long to deliver the second operand as all the rest. Called
by `gemm.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from engine.targets.cuda.gemm_stream import StreamTile
from engine.targets.cuda.gemm_wgmma import split_arguments
from engine.targets.cuda.kernel import I64, STORAGE, Functor, Instruction, Launch, ceildiv, launch
from engine.targets.cuda.product import Product
from engine.targets.cuda.spaces import VECTOR
from engine.targets.cuda.tiles import Tile

MOST_ROWS = 16
_STEP_BYTES = 128  # of a column that a warp takes at once
_LEAST_K = 128  # below, warps have nothing to divide
_HALF = 512
"""Threads of 64 registers that leave half of a multiprocessor's to the next kernel's blocks."""
_EARLY_REGISTERS = 16
"""For what the epilogue reads of a row of eight columns, held while the block multiplies."""


@dataclass(frozen=True)
class RowsTile:
    """All rows of `columns` columns, whose k `warps` warps divide. Each has its next `stages` steps of 64 under way,
    and the rows' elements for `ahead` of them. The next kernel may start when `trigger` steps of a warp are left."""

    columns: int
    warps: int
    stages: int
    ahead: int
    trigger: int
    lookahead: int = 0
    splits: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        return self.warps * self.stages * self.columns * _STEP_BYTES

    @property
    def config(self) -> dict[str, int | bool | str]:
        return {
            "columns": self.columns, "warps": self.warps, "stages": self.stages, "ahead": self.ahead,
            "trigger": self.trigger, "lookahead": self.lookahead, "split": self.splits > 1, "blocks": max(2, _HALF // self.threads), "shared_bytes": self.shared_bytes,
        }  # fmt: skip


AnyTile: TypeAlias = Tile | StreamTile | RowsTile

ROWS_TILES = (
    RowsTile(32, 8, 3, 3, 99, 2),
    RowsTile(16, 8, 3, 3, 99, 2),
    RowsTile(16, 16, 3, 1, 99, 2, 2),
)


def rows_tiles(product: Product) -> Iterator[RowsTile]:
    """The tiles that can take a product: few rows of 16 bits, single matrices that are read 16 bytes at once."""
    fits = product.m <= MOST_ROWS and product.dtype.itemsize == 2 and product.k >= _LEAST_K and product.suits_tma
    if fits:
        yield from ROWS_TILES


def launch_rows(product: Product, epilogue: Functor, tile: RowsTile) -> Launch:
    """The launch of a product of few rows: a block for every so many columns."""
    reads, blocks, row_tiles = epilogue.reads, ceildiv(product.n, tile.columns), ceildiv(product.m, VECTOR)
    finishers = ceildiv(row_tiles * tile.columns, 32)  # warps that have results
    return launch(
        "gemm",
        "gemm_rows.cuh",
        {
            **tile.config, "operand": STORAGE[product.dtype], "row_tiles": row_tiles,
            "constant_b": product.b.is_constant, "early": reads.fixed + reads.varying <= _EARLY_REGISTERS,
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
