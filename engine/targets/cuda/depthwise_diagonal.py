"""Tiles of depthwise_rows.cuh, where the weights of two taps are a diagonal matrix of eight channels: which fit a
convolution, and what they should take."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from engine.targets.cuda.depthwise import Window
from engine.targets.cuda.depthwise_tiles import BLOCKS, PANELS, STAGES, Rates, RowsTile, live_rows, rows_of_stages
from engine.targets.cuda.kernel import ceildiv

_SUMS_BYTES = 2048  # that a warp passes its sums through
_OTHERS = 64  # registers of a thread for addresses and what changes from row to row

# Instructions of a warp for a pair of taps and for a stage, and how many a multiprocessor issues a cycle. With the
# rates fitted to 888 timings of 111 convolutions on an H100: 11 % off in the root mean square, and the tile picked
# takes 4 % longer than the best one timed, on average.
_READ, _STAGE, _ISSUED = 3.5, 23.0, 1.1
_SUMMED = 4.0  # for a row whose pixels are added up, too: eight additions, and whether an image ends


@dataclass(frozen=True)
class DiagonalRows(RowsTile):
    """Units of eight pixels; a warp has two of them and 16 channels."""

    kernel: ClassVar[str] = "depthwise_rows.cuh"
    unit: ClassVar[int] = 8
    leaves: ClassVar[bool] = False
    rates: ClassVar[Rates] = Rates(
        copy=3.7, latency=1663.0, alone_read=137.0, alone_product=7.34, alone_row=341.0, start=3158.0, sharpness=2.3,
        twice=1.12, drift=9.0,
    )  # fmt: skip

    @property
    def warps(self) -> int:
        return ceildiv(self.units * self.streams, 2) * (self.panel // 16)

    def met(self, window: Window) -> int:
        return window.span(self.pixels, 1)

    def row_bytes(self, window: Window) -> int:
        """A row of all streams, in whole atoms of the swizzle."""
        return self.streams * ceildiv(self.met(window), 8) * 8 * 2 * self.panel

    def shared_bytes(self, window: Window) -> int:
        """The ring, what warps pass their sums through, and the barriers `full` and `empty` of each stage."""
        return self.stages * self.rows * self.row_bytes(window) + self.warps * _SUMS_BYTES + 2 * 8 * self.stages

    def registers(self, window: Window) -> int:
        return 8 * live_rows(window) + 4 * window.kernel[0] * window.tap_pairs + _OTHERS

    def products(self, window: Window) -> float:
        return _reads(window) * window.kernel[0] / window.stride[0]

    def busy(self, window: Window, inputs: int, outputs: int, warps: float, sums: bool) -> tuple[float, ...]:
        each = self.products(window) + _reads(window) * _READ + _STAGE / self.rows
        return (warps * (inputs * each + (outputs * _SUMMED if sums else 0.0)) / _ISSUED,)


def _reads(window: Window) -> int:
    """Of a warp from shared memory, for a row of inputs."""
    return 2 * window.tap_pairs


def candidates(window: Window, shared_bytes: int, sums: bool = False) -> tuple[DiagonalRows, ...]:
    """The tiles that registers and shared memory have room for. `sums`: while they add up the pixels of images."""
    every = ceildiv(window.output[1], DiagonalRows.unit)
    across = sorted({ceildiv(every, part) for part in range(1, every + 1)})
    # Several streams only where a unit would have no partner.
    spreads = [(units, streams) for units in across for streams in ((1, 2) if units % 2 else (1,))]
    every_tile = (
        DiagonalRows(panel, units, streams, rows, stages, blocks)
        for panel, (units, streams), rows, stages, blocks in product(
            PANELS, spreads, rows_of_stages(window), STAGES, BLOCKS
        )
    )
    return tuple(tile for tile in every_tile if tile.fits(window, shared_bytes, sums))
