"""Tiles of depthwise convolutions whose rows stream through shared memory by the copy engine of sm_90a: what those of
depthwise_rows.cuh (depthwise_diagonal.py) and of depthwise_bands.cuh (depthwise_bands.py) have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from engine.targets.cuda.architecture import share_of
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.depthwise import Window, window_of
from engine.targets.cuda.kernel import ceildiv

PANELS = (64, 32)
NARROW = PANELS[-1]
STAGES, BLOCKS = (2, 3, 4, 6), (1, 2, 3, 4)
REGISTERS = 65536  # of a multiprocessor
MEMORY_BYTES = 14.1  # of memory in a cycle of a multiprocessor, fitted to timings of an H100
_LARGEST_BOX = 256  # pixels of one copy
_MOST_WARPS = 16
_SUM_REGISTERS = 16  # of a thread that adds up the pixels of eight channels


@dataclass(frozen=True)
class Column:
    """All images of a convolution, of `size` (height, width), on top of each other: `pitch` rows of inputs from one to
    the next, `lines` rows of results from the first image's first one to the last image's last one."""

    size: tuple[int, int]
    pitch: int
    lines: int

    @classmethod
    def of(cls, geometry: Geometry) -> Column:
        window, pad = window_of(geometry), geometry.pads[1]
        size, stride, out = (geometry.input[1], geometry.input[2]), window.stride[0], window.output[0]
        # The next image's padding begins behind this one, and behind the last row that this one's results meet.
        met = window.span(out, 0) - pad
        pitch = ceildiv(max(size[0] + max(pad, 0), met, out * stride), stride) * stride
        return cls(size, pitch, (window.images - 1) * (pitch // stride) + out)


@dataclass(frozen=True)
class Rates:
    """What a kernel's estimate is made of, in cycles of a multiprocessor: a row of a box in the copy engine (`copy`),
    the way of a row from memory; what one warp that waits for nobody takes for a row of inputs, a product, and a row of
    results; a launch with its first row. What is far from being the limit costs nothing, what is close to it something
    (`sharpness`). Where blocks of neighbouring panels meet in lines of the L2 cache, a share `twice` of what is read
    comes from memory again once a ring lets the blocks drift apart by more than `drift` rows."""

    copy: float
    latency: float
    alone_read: float
    alone_product: float
    alone_row: float
    start: float
    sharpness: float
    twice: float
    drift: float


@dataclass(frozen=True)
class RowsTile(ABC):
    """A block's tile: `panel` channels, `units` of pixels of the width, `streams` parts of the column; a ring of
    `stages` of `rows` rows. `blocks` share a multiprocessor."""

    panel: int
    units: int
    streams: int
    rows: int
    stages: int
    blocks: int

    kernel: ClassVar[str]
    unit: ClassVar[int]
    """Pixels side by side that a warp has together."""
    leaves: ClassVar[bool]
    """Whether warps whose channels are not there do next to nothing."""
    rates: ClassVar[Rates]

    @property
    def pixels(self) -> int:
        """Of the width."""
        return self.units * self.unit

    @property
    def threads(self) -> int:
        """Whose registers a multiprocessor gives away: to a block in four equal parts, one for each scheduler."""
        return self.blocks * ceildiv(self.warps, 4) * 128

    @property
    @abstractmethod
    def warps(self) -> int: ...

    @abstractmethod
    def met(self, window: Window) -> int:
        """Pixels of a row of inputs that a stream brings."""

    @abstractmethod
    def shared_bytes(self, window: Window) -> int: ...

    @abstractmethod
    def registers(self, window: Window) -> int:
        """Of a thread, as far as they are known: sums, weights, addresses."""

    def registers_with(self, window: Window, sums: bool) -> int:
        """The same. `sums`: while it adds up the pixels of images."""
        return self.registers(window) + (_SUM_REGISTERS if sums else 0)

    def fits(self, window: Window, shared_bytes: int, sums: bool) -> bool:
        """Whether there are channels for it, and registers and shared memory of a multiprocessor."""
        return (
            (self.panel == NARROW or window.channels > self.panel // 2)
            and self.warps <= _MOST_WARPS
            and self.met(window) <= _LARGEST_BOX
            and self.threads * self.registers_with(window, sums) <= REGISTERS
            and self.shared_bytes(window) <= share_of(shared_bytes, self.blocks)
        )

    @abstractmethod
    def products(self, window: Window) -> float:
        """Instructions of a warp that multiply, for a row of inputs."""

    @abstractmethod
    def busy(self, window: Window, inputs: int, outputs: int, warps: float, sums: bool) -> tuple[float, ...]:
        """Cycles for which a multiprocessor's units are busy, where so many `warps` go through so many rows each."""

    def cycles(self, window: Window, column: Column, multiprocessors: int, sums: bool = False) -> float:
        """Estimated time of the convolution. `sums`: with those over the pixels of images."""
        wide, sharing, outputs = parts_of(window, self, column.lines, multiprocessors)
        stride, rates = window.stride[0], self.rates
        inputs = window.span(outputs, 0)  # rows that a stream goes through
        blocks, most = wide * sharing, max(1, multiprocessors) * self.blocks
        resident = min(self.blocks, ceildiv(blocks, max(1, multiprocessors)))
        streams, met, across = resident * self.streams, self.met(window), ceildiv(window.output[1], self.pixels)
        # Of pixels that a block goes through, those that there are.
        read = inputs * column.size[0] / column.pitch * min(met, column.size[1])
        written = outputs * stride * window.output[0] / column.pitch * window.output[1] / across
        if self._reads_lines_twice(window):
            read *= 1 + rates.twice * max(0.0, 1 - rates.drift / (self.rows * self.stages))
        share = window.channels / (ceildiv(window.channels, self.panel) * self.panel)
        alone = rates.alone_read + self.products(window) * rates.alone_product
        limits = (
            *self.busy(window, inputs, outputs, resident * self.warps * (share if self.leaves else 1.0), sums),
            streams * inputs * met * rates.copy,
            streams * 2 * self.panel * share * (read + written) / MEMORY_BYTES,
            inputs / (self.rows * (self.stages - 1)) * rates.latency,
            inputs * alone + outputs * rates.alone_row,
        )
        return rates.start + ceildiv(blocks, most) * float(np.linalg.norm(limits, rates.sharpness))

    def _reads_lines_twice(self, window: Window) -> bool:
        """Whether blocks of neighbouring panels meet in lines of the L2 cache: panels of half a line, where pixels do
        not begin at multiples of them."""
        return self.panel == NARROW < window.channels and window.channels % NARROW > 0


def rows_of_stages(window: Window) -> list[int]:
    """How many rows a stage may have: those of one row of results, or of a whole turn of the accumulators."""
    return sorted({window.stride[0], window.stride[0] * live_rows(window)})


def live_rows(window: Window) -> int:
    """Rows of results that a row of inputs belongs to, at most."""
    return (window.kernel[0] - 1) * window.dilation[0] // window.stride[0] + 1


def parts_of(window: Window, tile: RowsTile, lines: int, multiprocessors: int) -> tuple[int, int, int]:
    """Panels and pieces of the width, blocks that share the column of each, and the rows of results of a stream."""
    wide = ceildiv(window.channels, tile.panel) * ceildiv(window.output[1], tile.pixels)
    sharing = max(1, max(1, multiprocessors) * tile.blocks // wide)
    outputs = ceildiv(lines, sharing * tile.streams)
    return wide, ceildiv(lines, outputs * tile.streams), outputs
