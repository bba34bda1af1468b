"""Tiles of depthwise_rows.cuh, where the weights of two taps are a diagonal matrix of eight channels: which fit a
convolution, and what they should take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import ClassVar

import numpy as np

from engine.targets.cuda.architecture import share_of
from engine.targets.cuda.depthwise import Window
from engine.targets.cuda.depthwise_tiles import (
    LARGEST_BOX,
    MEMORY_BYTES,
    MOST_WARPS,
    REGISTERS,
    SUM_REGISTERS,
    Column,
    RowsTile,
    live_rows,
    parts_of,
)
from engine.targets.cuda.kernel import ceildiv

_SUMS_BYTES = 2048  # that a warp passes its sums through

# Instructions of a warp for a pair of taps and for a stage, and how many a multiprocessor issues a cycle.
_READ, _STAGE, _ISSUED = 3.5, 23.0, 1.1
_SUMMED = 4.0  # for a row whose pixels are added up, too: eight additions, and whether an image ends
# Cycles of a multiprocessor, beside the bytes of memory in one: a row of a box in the copy engine; the way of a row
# from memory; what one warp that waits for nobody takes for a row of inputs, a product, and a row of results; a launch
# with its first row. Fitted to 888 timings of 111 convolutions on an H100: 11 % off in the root mean square, and the
# tile picked takes 4 % longer than the best one timed, on average.
_COPY = 3.7
_LATENCY, _ALONE_READ, _ALONE_PRODUCT, _ALONE_ROW, _START = 1663.0, 137.0, 7.34, 341.0, 3158.0
_SHARPNESS = 2.3
# Where blocks of neighbouring panels meet in lines, these come from memory twice once a ring lets the blocks drift
# apart by more than some rows.
_TWICE, _DRIFT = 1.12, 9.0


@dataclass(frozen=True)
class DiagonalRows(RowsTile):
    """Units of eight pixels; a warp has two of them and 16 channels."""

    kernel: ClassVar[str] = "depthwise_rows.cuh"
    unit: ClassVar[int] = 8

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

    def cycles(self, window: Window, column: Column, multiprocessors: int, sums: bool = False) -> float:
        wide, sharing, outputs = parts_of(window, self, column.lines, multiprocessors)
        stride, across = window.stride[0], self.pixels
        inputs = window.span(outputs, 0)  # rows that a stream goes through
        blocks, most = wide * sharing, max(1, multiprocessors) * self.blocks
        resident = min(self.blocks, ceildiv(blocks, max(1, multiprocessors)))
        reads = inputs * 2 * window.tap_pairs
        products = reads * window.kernel[0] / stride
        each = products + reads * _READ + (outputs * _SUMMED if sums else 0.0) + inputs / self.rows * _STAGE
        streams, width = resident * self.streams, window.span(across, 1)
        # Of pixels that a block goes through, those that there are.
        read = inputs * column.size[0] / column.pitch * min(width, column.size[1])
        written = (
            outputs * stride * window.output[0] / column.pitch * window.output[1] / ceildiv(window.output[1], across)
        )
        if self.reads_lines_twice(window):
            read *= 1 + _TWICE * max(0.0, 1 - _DRIFT / (self.rows * self.stages))
        share = window.channels / (ceildiv(window.channels, self.panel) * self.panel)
        alone = inputs * _ALONE_READ + products * _ALONE_PRODUCT + outputs * _ALONE_ROW
        limits = (
            resident * self.warps * each / _ISSUED,
            streams * inputs * width * _COPY,
            streams * 2 * self.panel * share * (read + written) / MEMORY_BYTES,
            inputs / (self.rows * (self.stages - 1)) * _LATENCY,
            alone,
        )
        # What is far from being the limit costs nothing, what is close to it something.
        return _START + ceildiv(blocks, most) * float(np.linalg.norm(limits, _SHARPNESS))


def _registers(window: Window, sums: bool) -> int:
    """What a thread is known to need: sums, weights, addresses."""
    return 8 * live_rows(window) + 4 * window.kernel[0] * window.tap_pairs + 64 + (SUM_REGISTERS if sums else 0)


@lru_cache(maxsize=1024)
def candidates(window: Window, shared_bytes: int, sums: bool = False) -> tuple[DiagonalRows, ...]:
    """The tiles that registers and shared memory have room for. `sums`: while they add up the pixels of images."""
    live, stride, every = live_rows(window), window.stride[0], ceildiv(window.output[1], 8)
    across = sorted({ceildiv(every, part) for part in range(1, every + 1)})
    found = []
    for panel, units, streams, rows, stages, blocks in product(
        (64, 32), across, (1, 2), sorted({stride, stride * live}), (2, 3, 4, 6), (1, 2, 3, 4)
    ):
        tile = DiagonalRows(panel, units, streams, rows, stages, blocks)
        if (panel > 32 and window.channels <= panel // 2) or tile.met(window) > LARGEST_BOX:
            continue
        # Several streams only where a unit would have no partner.
        if tile.warps > MOST_WARPS or (streams > 1 and units % 2 == 0):
            continue
        if tile.threads * _registers(window, sums) > REGISTERS:
            continue
        if tile.shared_bytes(window) <= share_of(shared_bytes, blocks):
            found.append(tile)
    return tuple(found)
