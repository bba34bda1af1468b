"""Tiles of depthwise_bands.cuh, where the weights of a row of the filter are a band down a matrix of pixels: which fit
a convolution, what they should take, and how filters are packed for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np

from engine.targets.cuda.depthwise import Window
from engine.targets.cuda.depthwise_tiles import (
    BLOCKS,
    PANELS,
    REGISTERS,
    STAGES,
    Rates,
    RowsTile,
    live_rows,
    rows_of_stages,
)
from engine.targets.cuda.kernel import ceildiv

_UNIT = 4  # pixels side by side
_PLACES = 16  # units that a warp has
_GROUP = 4  # channels of a warp
_MOST_STREAMS = 32
_MOST_REGISTERS = 255  # of a thread
_OTHERS = 50  # registers of a thread for addresses and what changes from row to row

# Instructions of a warp for a row of inputs beside products, for a stage and for a row of results, and how many a
# multiprocessor issues a cycle; cycles for a product with k of two steps. With the rates fitted to 1,812 timings of 161
# convolutions on an H100: 13 % off in the root mean square, and the tile picked takes 3 % longer than the best one
# timed, on average.
_READ, _STAGE, _STORED, _ISSUED, _PRODUCT = 8.6, 47.0, 48.0, 2.77, 1.28
_SUMMED = 24.0  # for a row whose pixels are added up, too


@dataclass(frozen=True)
class BandedRows(RowsTile):
    """Units of four pixels; a warp has 16 of them and four channels."""

    kernel: ClassVar[str] = "depthwise_bands.cuh"
    unit: ClassVar[int] = _UNIT
    leaves: ClassVar[bool] = True
    rates: ClassVar[Rates] = Rates(
        copy=3.87, latency=2022.0, alone_read=496.0, alone_product=3.04, alone_row=349.0, start=2231.0, sharpness=2.41,
        twice=1.16, drift=28.0,
    )  # fmt: skip

    @property
    def warps(self) -> int:
        return ceildiv(self.units * self.streams, _PLACES) * (self.panel // _GROUP)

    def met(self, window: Window) -> int:
        return _UNIT * ((self.units - 1) * window.stride[1] + _steps(window))

    def row_bytes(self, window: Window) -> int:
        """A row of all streams, which begin four pixels off, in whole atoms of the swizzle."""
        line = (self.met(window) // _UNIT | 1) * _UNIT  # an odd number of units
        return ceildiv(self.streams * line, 8) * 8 * 2 * self.panel

    def shared_bytes(self, window: Window) -> int:
        """The ring with the barriers `full` and `empty` of each stage, and two slots of fp32 sums for each 16 places,
        with a barrier each."""
        slots = 2 * ceildiv(self.units * self.streams, _PLACES)
        ring = self.stages * (self.rows * self.row_bytes(window) + 2 * 8)
        return ring + slots * (_PLACES * _UNIT * self.panel * 4 + 8)

    def expanded(self, window: Window, sums: bool) -> bool:
        """Whether a thread has registers for weights as operands."""
        share = REGISTERS // self.threads // 8 * 8  # given in eights
        return self.registers_with(window, sums) + _weight_registers(window) <= min(share, _MOST_REGISTERS)

    def registers(self, window: Window) -> int:
        return 8 * live_rows(window) + _weight_registers(window) + _OTHERS

    def products(self, window: Window) -> float:
        """Of two steps each."""
        return 4 * _steps(window) / 2 * window.kernel[0] / window.stride[0]

    def busy(self, window: Window, inputs: int, outputs: int, warps: float, sums: bool) -> tuple[float, ...]:
        products = inputs * self.products(window)
        each = 3 * products + inputs * (_READ + 2 * _steps(window) + _STAGE / self.rows)
        each += outputs * (_STORED + (_SUMMED if sums else 0.0))
        return warps * each / _ISSUED, warps * products * _PRODUCT


def _steps(window: Window) -> int:
    """Of four pixels, what a unit of results meets of a row of inputs."""
    return ceildiv(window.span(_UNIT, 1), _UNIT)


def _weight_registers(window: Window) -> int:
    """For those of four channels, two in one."""
    return window.kernel[0] * _steps(window)


def _spreads(every: int, warps: int) -> Iterator[tuple[int, int]]:
    """Units and streams of blocks of so many warps for the same channels, for a width of `every` units: as many streams
    as there are places for."""
    for units in sorted({ceildiv(every, part) for part in range(1, every + 1)}):
        streams = min(_MOST_STREAMS, warps * _PLACES // units)
        if streams and ceildiv(units * streams, _PLACES) == warps:
            yield units, streams


def candidates(window: Window, shared_bytes: int, sums: bool = False) -> tuple[BandedRows, ...]:
    """The tiles that registers and shared memory have room for. `sums`: while they add up the pixels of images."""
    every = ceildiv(window.output[1], _UNIT)
    every_tile = (
        BandedRows(panel, units, streams, rows, stages, blocks)
        for panel, warps, rows, stages, blocks in product(PANELS, (1, 2), rows_of_stages(window), STAGES, BLOCKS)
        for units, streams in _spreads(every, warps)
    )
    return tuple(tile for tile in every_tile if tile.fits(window, shared_bytes, sums))


def pack_bands(w: np.ndarray, window: Window) -> np.ndarray:
    """A filter [c, h, w] as mma/banded.cuh reads it, for each four channels [words / 4][32 lanes][8 halves]: the
    halves of a lane are the weights [row][pair of channels][step] between its pixel of a step and its pixel of the
    results, of its channel of the pair, zero where the filter has no tap there."""
    count, height, width = w.shape
    steps = _steps(window)
    lane, pair, step = np.arange(32)[:, None, None], np.arange(_GROUP // 2)[:, None], np.arange(steps)
    channel = 2 * pair + lane // 4 % 2 + 0 * step
    distance = 4 * step + lane % 4 - lane // 8 * window.stride[1] + 0 * pair
    tap = distance // window.dilation[1]
    there = (distance % window.dilation[1] == 0) & (tap >= 0) & (tap < width)
    groups = w.reshape(count // _GROUP, _GROUP, height, width)
    taps = np.where(there[..., None, None], groups[:, channel, :, np.where(there, tap, 0)], w.dtype.type(0))
    halves = np.moveaxis(taps, (3, 4), (0, 2))  # from [lane, pair, step, group, row] to [group, lane, row, pair, step]
    words = ceildiv(height * steps, 4) * 4
    packed = np.zeros((len(groups), 32, 2 * words), w.dtype)
    packed[:, :, : 2 * height * steps] = halves.reshape(len(groups), 32, -1)
    return np.ascontiguousarray(packed.reshape(len(groups), 32, words // 4, 8).transpose(0, 2, 1, 3)).reshape(-1)
