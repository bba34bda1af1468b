"""Depthwise convolutions of fp16 and bf16 images on the matrix units (depthwise_mma.cuh). Called by `conv.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from heapq import nsmallest
from itertools import product

import numpy as np

from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.targets.cuda.architecture import share_of
from engine.targets.cuda.conv_geometry import AXES, Geometry
from engine.targets.cuda.conv_simt import epilogue_for
from engine.targets.cuda.kernel import (
    STORAGE,
    Argument,
    Context,
    Instruction,
    Launch,
    Pointer,
    ceildiv,
    is_constant,
    launch,
)
from engine.targets.cuda.spaces import VECTOR

_LARGEST = 7  # kernel size whose weights a lane has registers for
_LARGEST_EXPANDED = 5  # beyond, they are expanded to operands when they are used
_MOST_ROWS = 8  # of outputs that a warp goes through at a time
_MOST_UNITS = 8  # of eight pixels side by side in a tile
_WARPS = 4
_FEW = 6  # tiles that the tuner may choose from
_CELL = 16  # bytes: eight channels of a pixel


@dataclass(frozen=True)
class Window:
    """What the tile depends on of a convolution: sizes along (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    output: tuple[int, int]
    images: int
    channels: int

    @property
    def tap_pairs(self) -> int:
        """Pairs of horizontal taps."""
        return ceildiv(self.kernel[1], 2)

    @property
    def words(self) -> int:
        """Pairs of taps that a channel has, in whole vectors of four."""
        return ceildiv(self.kernel[0] * self.tap_pairs, 4) * 4

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor has registers for."""
        return 4 if max(self.kernel) <= 3 else 3

    def span(self, outputs: int, axis: int) -> int:
        """Inputs that so many neighbouring outputs meet along an axis."""
        return (outputs - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1


@dataclass(frozen=True)
class DepthwiseTile:
    """A block's tile: `images` × `bands` · `rows` × `units` · 8 outputs of `group_pairs` · 16 channels, in a ring of
    `stages` windows."""

    rows: int
    bands: int
    units: int
    images: int
    group_pairs: int
    stages: int

    @property
    def channels(self) -> int:
        return 16 * self.group_pairs

    def count(self, window: Window) -> int:
        """Tiles of the whole result for one set of channels."""
        height, width = window.output
        across, down = ceildiv(width, 8 * self.units), ceildiv(height, self.rows * self.bands)
        return ceildiv(window.images, self.images) * across * down

    def phase_cells(self, window: Window) -> int:
        """Pixels of a line that lie a stride apart, with a gap that lets the copies of a warp meet in few banks."""
        least = ceildiv(window.span(8 * self.units, 1), window.stride[1])
        return min(range(least, least + 8), key=lambda cells: _conflicts(cells, window.stride[1], 2 * self.group_pairs))

    def stage_bytes(self, window: Window) -> int:
        lines = self.images * window.span(self.rows * self.bands, 0) * 2 * self.group_pairs
        return lines * window.stride[1] * self.phase_cells(window) * _CELL


@lru_cache(maxsize=1024)
def _conflicts(phase_cells: int, stride: int, groups: int) -> int:
    """Turns that the copies of a warp take in shared memory: 8 cells at a time, unless they meet in the same banks."""
    turns = 0
    for first in range(0, 32, 8):
        cells = [(i // groups, i % groups) for i in range(first, first + 8)]
        places = [group * stride * phase_cells + x % stride * phase_cells + x // stride for x, group in cells]
        turns += max(sum(place % 8 == bank for place in places) for bank in range(8))
    return turns


def candidates(window: Window, shared_bytes: int) -> Iterator[DepthwiseTile]:
    """The tiles whose ring lets several blocks share a multiprocessor with so much shared memory."""
    height, width = window.output
    every = ceildiv(width, 8)
    parts = range(ceildiv(every, _MOST_UNITS), 4 * ceildiv(every, _MOST_UNITS) + 1)
    across = sorted({ceildiv(every, part) for part in parts})
    for rows, bands, units, images, group_pairs, stages in product(
        range(1, min(height, _MOST_ROWS) + 1), (1, 2, 4), across, (1, 2, 4), (1, 2, 4), (1, 2)
    ):
        tile = DepthwiseTile(rows, bands, units, images, group_pairs, stages)
        # More bands or channels only where there are some, several images only where one is small.
        fits = (bands == 1 or rows * (bands - 1) < height) and 16 * (group_pairs - 1) < window.channels
        small = images == 1 or (units * images <= 4 and units == every and images <= window.images)
        if fits and small and stages * tile.stage_bytes(window) <= share_of(shared_bytes, window.blocks):
            yield tile


# In cycles of a multiprocessor: a step of mma.sync for a 16×8 block, ldmatrix of one matrix, a line of the cache that a
# copy of a warp meets, an epilogue of 256 outputs; the memory's bytes a cycle; the way of a first input from memory,
# the start of a block, what a tile costs beside; how much of an input comes from memory once, however often it is read.
# Fitted to 144 timings of nine layers on an H100, which they meet within 11 % (root mean square); the tile picked takes
# 7 % longer than the best one there on average. That loads cost next to nothing is what the fit says: they hide.
_MMA, _LOAD, _LINE, _EPILOGUE, _BYTES, _LATENCY, _START, _TILE = 2.9, 0.13, 0.64, 32.5, 10.1, 3300.0, 2300.0, 210.0
_ONCE = 0.34


def cycles(window: Window, tile: DepthwiseTile, multiprocessors: int) -> float:
    """Estimated time of the convolution in a tile."""
    kernel, rows = window.kernel, tile.rows
    tensor = rows * kernel[0] * window.tap_pairs * 2 * _MMA
    loaded = window.span(rows, 0) * window.tap_pairs * 2 * 4 * _LOAD
    item = max(tensor, loaded) + rows * _EPILOGUE
    items = tile.bands * ceildiv(tile.images * tile.units, 2) * tile.group_pairs
    read = tile.images * window.span(rows * tile.bands, 0) * window.span(8 * tile.units, 1) * tile.channels * 2
    copied = read / 512 * max(4, 16 // tile.group_pairs) * _LINE
    outputs = tile.images * rows * tile.bands * tile.units * 8 * tile.channels
    # Memory moves part of an input once, and part of what neighbouring tiles share again.
    moved = 2 * outputs + _ONCE * 2 * outputs * window.stride[0] * window.stride[1] + (1 - _ONCE) * read
    count = tile.count(window) * ceildiv(window.channels, tile.channels)
    share = max(items * item + copied, moved / _BYTES) + _TILE  # of the multiprocessor's time
    alone = ceildiv(items, _WARPS) * _WARPS * item + copied + 3 * _TILE + _LATENCY
    if tile.stages == 1:
        return max(count / multiprocessors * share, count / multiprocessors / window.blocks * alone) + alone + _START
    rounds, resident = _rounds(window, tile, multiprocessors), min(window.blocks, ceildiv(count, multiprocessors))
    return rounds * max(resident * share, alone - _LATENCY / 2) + _LATENCY + _START


def _rounds(window: Window, tile: DepthwiseTile, multiprocessors: int) -> int:
    """Tiles that each block of a ring takes, where all blocks are resident at once: one more than that would wait for
    the others to end, and double the time."""
    slabs = ceildiv(window.channels, tile.channels)
    blocks = max(1, max(1, multiprocessors) * window.blocks // slabs)  # with the same channels
    return ceildiv(tile.count(window), blocks)


@lru_cache(maxsize=4096)
def best_tiles(window: Window, shared_bytes: int, multiprocessors: int) -> tuple[DepthwiseTile, ...]:
    """A few tiles, from the one with the least estimated time on; none where none fits."""
    fitting = candidates(window, shared_bytes)
    return tuple(nsmallest(_FEW, fitting, key=lambda tile: cycles(window, tile, multiprocessors)))


def pick_tile(window: Window, shared_bytes: int, multiprocessors: int) -> DepthwiseTile | None:
    """The tile with the least estimated time, if any fits."""
    return next(iter(best_tiles(window, shared_bytes, multiprocessors)), None)


def window_of(geometry: Geometry) -> Window:
    kernel, stride, dilation, output = (
        (sizes[1], sizes[2]) for sizes in (geometry.kernel, geometry.strides, geometry.dilations, geometry.output)
    )
    return Window(kernel, stride, dilation, output, geometry.images, geometry.groups)


def is_depthwise_product(step: Step, geometry: Geometry, context: Context) -> bool:
    """Whether the kernel on the matrix units runs it: a depthwise filter of 16-bit floats whose channels come in
    vectors."""
    element = step.inputs[1].dtype
    return (
        element in (DType.F16, DType.BF16)
        and is_constant(step.inputs[1])
        and geometry.channels == geometry.n == 1
        and geometry.groups % VECTOR == 0
        and not geometry.transposed
        and geometry.axes < len(AXES)
        and min(geometry.kernel) > 0
        and max(geometry.kernel) <= _LARGEST
        and geometry.reads_chunks(VECTOR, element)
        and pick_tile(window_of(geometry), context.architecture.shared_bytes, context.multiprocessors) is not None
    )


def launch_depthwise_product(
    step: Step, geometry: Geometry, context: Context, tile: DepthwiseTile | None = None
) -> Launch:
    """The launch of a convolution that `is_depthwise_product`, in a given tile or the one that should be fastest."""
    window, element = window_of(geometry), step.inputs[1].dtype
    tile = tile or pick_tile(window, context.architecture.shared_bytes, context.multiprocessors)
    assert tile is not None
    slabs, count = ceildiv(geometry.groups, tile.channels), tile.count(window)
    config: dict[str, int | bool | str] = {
        "operand": STORAGE[element], "kernel_h": window.kernel[0], "kernel_w": window.kernel[1],
        "stride_h": window.stride[0], "stride_w": window.stride[1], "dilation_h": window.dilation[0],
        "dilation_w": window.dilation[1], "rows": tile.rows, "bands": tile.bands, "units": tile.units,
        "images": tile.images, "group_pairs": tile.group_pairs, "stages": tile.stages, "warps": _WARPS,
        "blocks": window.blocks, "phase_cells": tile.phase_cells(window), "exact": False,
        "expanded": max(window.kernel) <= _LARGEST_EXPANDED,
        "shared_bytes": tile.stages * tile.stage_bytes(window),
    }  # fmt: skip
    padded = slabs * tile.channels
    packed = context.weights.packed(
        step.inputs[1], f"tap pairs c{padded}", lambda w: pack_tap_pairs(w.reshape(w.shape[0], *window.kernel), padded)
    )
    known = {f"{name}_{axis}" for name in ("stride", "dilation") for axis in AXES}
    arguments: dict[str, Argument] = {
        **{name: value for name, value in geometry.arguments().items() if name not in known},
        "w": Pointer(packed, ctype=STORAGE[element]), "channels": geometry.groups, "tiles": count,
    }  # fmt: skip
    # Blocks take turns as evenly as the tiles allow; with a single stage every tile has a block of its own.
    rounds = 1 if tile.stages == 1 else _rounds(window, tile, context.multiprocessors)
    return launch(
        "depthwise", "depthwise_mma.cuh", config, [epilogue_for(step, VECTOR)], arguments,
        (slabs, min(ceildiv(count, rounds), 65535), 1), 32 * _WARPS, tile.stages * tile.stage_bytes(window),
        Instruction.MMA,
    )  # fmt: skip


def pack_tap_pairs(w: np.ndarray, channels: int) -> np.ndarray:
    """A filter [c, h, w] as depthwise_mma.cuh reads it: for each of `channels` its pairs of horizontal taps, zeros
    behind them and behind c."""
    count, height, width = w.shape
    pairs = ceildiv(width, 2)
    taps = np.zeros((channels, height, 2 * pairs), w.dtype)
    taps[:count, :, :width] = w
    words = np.zeros((channels, ceildiv(height * pairs, 4) * 8), w.dtype)
    words[:, : height * pairs * 2] = taps.reshape(channels, -1)
    return words.reshape(-1)
