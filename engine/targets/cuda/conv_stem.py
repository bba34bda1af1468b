"""The first convolution of a network: an image with few channels, read as it comes, on the matrix units
(conv_stem.cuh). Called by `conv.py`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.targets.cuda.architecture import Architecture, share_of
from engine.targets.cuda.attention_wgmma import register_product
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

_MOST_CHANNELS = 4
_MOST_SLABS = 6  # of output channels: each of them reads the whole image
_MOST_TABLE = 20  # half steps whose places a lane has registers for
_WARPS = 4
_FRAGMENTS = 2  # of 16 pixels, that a warp takes at a time
_BLOCKS = {8: 4, 4: 5}
"""How many blocks share a multiprocessor at most, by the 8-column blocks of their tiles, as registers allow: some bring
their windows while others multiply. On an H100 five images take 3 to 5 % less than with three blocks and 64 columns, 7
to 16 less than with three blocks, 32 columns and four fragments."""
_MOST_UNITS = 28  # of eight pixels side by side in a tile
_LINE_BYTES = 128


@dataclass(frozen=True)
class Pairs:
    """How k runs: over pairs of neighbouring elements, `row` of them for a row of the filter whose taps have `channels`
    elements each. `regular`: rows begin at whole half steps (four pairs)."""

    channels: int
    row: int
    kernel_h: int
    regular: bool

    @property
    def steps(self) -> int:
        """Steps of the matrix instruction."""
        return ceildiv(self.kernel_h * self.row, 8)


def pairs_of(geometry: Geometry, wgmma: bool = False) -> Pairs | None:
    """How k of a convolution runs in a kind of tile, if some order suits its kernel. On wgmma a step more costs less
    than the registers of a table."""
    kernel_h, taps = geometry.kernel[1:]
    stride, dilation, channels = geometry.strides[2], geometry.dilations[2], geometry.channels
    # A pair is read as a word: pixels, and taps that do not touch, lie whole words apart.
    padded = channels + channels % 2 if (stride * channels) % 2 or dilation > 1 else channels
    row = ceildiv(taps * padded, 2)
    table = Pairs(padded, row, kernel_h, regular=False)
    whole = Pairs(padded, ceildiv(row, 4) * 4, kernel_h, regular=True)
    if dilation > 1:
        return table if 2 * table.steps <= _MOST_TABLE else None
    return whole if whole.steps <= table.steps + wgmma or 2 * table.steps > _MOST_TABLE else table


@dataclass(frozen=True)
class StemTile:
    """A block's tile: `rows` × `units` · 8 output pixels, 8 · `n_blocks` output channels. `blocks` blocks share a
    multiprocessor. `wgmma`: its warps multiply as one."""

    rows: int
    units: int
    n_blocks: int
    blocks: int
    wgmma: bool = False

    @property
    def columns(self) -> int:
        return 8 * self.n_blocks

    @property
    def items(self) -> int:
        """What its warps take, one at a time."""
        return ceildiv(self.rows * self.units, 2 * _FRAGMENTS)

    def window(self, geometry: Geometry, pairs: Pairs) -> tuple[int, int]:
        """The rows and pixels of input that it meets, with what the padded pairs read; whole pairs of pixels."""
        rows = (self.rows - 1) * geometry.strides[1] + (geometry.kernel[1] - 1) * geometry.dilations[1] + 1
        dilation, taps = geometry.dilations[2], geometry.kernel[2]
        run = 2 * pairs.row if dilation == 1 else ((taps - 1) * dilation + 1) * pairs.channels
        pixels = (8 * self.units - 1) * geometry.strides[2] + ceildiv(run, pairs.channels)
        return rows, ceildiv(pixels, 2) * 2

    def shared_bytes(self, geometry: Geometry, pairs: Pairs) -> int:
        """The packed weights of its columns, and its window."""
        return pairs.steps * self.n_blocks * 256 + prod(self.window(geometry, pairs)) * pairs.channels * 2


def _columns(n: int) -> int:
    """The 8-column blocks of a tile: 64 columns, or 32 where half of the last ones would be empty."""
    return 4 if n <= 32 or 64 < n <= 96 else 8


def candidates(geometry: Geometry, architecture: Architecture) -> list[StemTile]:
    """The tiles that fit."""
    kinds = (False, True) if architecture.wgmma else (False,)
    return [tile for wgmma in kinds for tile in _fitting(geometry, architecture, wgmma)]


def _fitting(geometry: Geometry, architecture: Architecture, wgmma: bool) -> list[StemTile]:
    """The tiles of a kind that fit, as many to a multiprocessor as it can have of any."""
    pairs = pairs_of(geometry, wgmma)
    if pairs is None:
        return []
    height, width = geometry.output[1:]
    every = ceildiv(width, 8)
    n_blocks = _columns(geometry.n)
    across = ceildiv(every, _MOST_UNITS)
    shapes = [
        (rows, ceildiv(every, parts))
        for parts, rows in product((across, 2 * across, 4 * across), (8, 4, 2, 1))
        if rows < 2 * height and parts <= every
    ]
    for blocks in range(_BLOCKS[n_blocks], 0, -1):
        room = share_of(architecture.shared_bytes, blocks)
        tiles = [StemTile(rows, units, n_blocks, blocks, wgmma) for rows, units in shapes]
        fitting = [tile for tile in tiles if tile.shared_bytes(geometry, pairs) <= room]
        if fitting:
            return fitting
    return []


# Of an H100, in cycles of a multiprocessor: a step of mma.sync for a 16×8 block, with the reads of its operands; its
# share of the memory's 3 TB/s in bytes a cycle; loading and converting an input; the way of a first input from memory.
# Fitted to 45 timings of five images (8 % off; the best estimate's tile took 4 % longer than the best one).
_MMA, _BYTES, _INPUT, _LATENCY = 2.4, 13, 0.15, 3400


def _cycles(geometry: Geometry, tile: StemTile, multiprocessors: int) -> float:
    """Estimated time of the convolution in a tile."""
    pairs = pairs_of(geometry, tile.wgmma)
    assert pairs is not None
    height, width = geometry.output[1:]
    tiles = geometry.images * ceildiv(height, tile.rows) * ceildiv(ceildiv(width, 8), tile.units)
    count = tiles * ceildiv(geometry.n, tile.columns)
    pixels = 8 * tile.rows * tile.units
    item = _FRAGMENTS * (pairs.steps * tile.n_blocks * _MMA + 4 * tile.n_blocks)
    inputs = prod(tile.window(geometry, pairs)) * geometry.channels
    copied = inputs * (_INPUT + geometry.x_dtype.itemsize / (3 * _BYTES))
    stored = pixels * min(tile.columns, geometry.n) * 2 / _BYTES
    share = max(tile.items * item, stored) + copied  # of the multiprocessor's time
    alone = ceildiv(tile.items, _WARPS) * _WARPS * item + copied + _LATENCY
    slabs = ceildiv(geometry.n, tile.columns)
    rounds = ceildiv(tiles, max(1, multiprocessors * tile.blocks // slabs))
    resident = min(tile.blocks, ceildiv(count, multiprocessors))
    return rounds * max(resident * share, alone) + alone / 2


def ranked(geometry: Geometry, context: Context) -> list[tuple[float, StemTile]]:
    """The tiles that fit with their estimated cycles, from what should be the fastest on."""
    fitting = candidates(geometry, context.architecture)
    estimates = ((_cycles(geometry, tile, context.multiprocessors), tile) for tile in fitting)
    return sorted(estimates, key=lambda one: one[0])


def pick_tile(geometry: Geometry, context: Context) -> StemTile | None:
    """The tile with the least estimated time, if any fits."""
    return next((tile for _, tile in ranked(geometry, context)), None)


def is_stem(step: Step, geometry: Geometry, context: Context) -> bool:
    """Whether the kernel for images with few channels runs it. Operands are fp16 or bf16, the image may be fp32."""
    x, w = step.inputs[0].dtype, step.inputs[1].dtype
    return (
        w in (DType.F16, DType.BF16)
        and x in (w, DType.F32)
        and is_constant(step.inputs[1])
        and geometry.groups == 1
        and not geometry.transposed
        and geometry.axes < len(AXES)
        and 1 <= geometry.channels <= _MOST_CHANNELS
        and prod(geometry.kernel) > 0
        and ceildiv(geometry.n, 8 * _columns(geometry.n)) <= _MOST_SLABS
        and pick_tile(geometry, context) is not None
    )


def launch_stem(step: Step, geometry: Geometry, context: Context, tile: StemTile | None = None) -> Launch:
    """The launch of a convolution that `is_stem`, in a given tile or the one that should be fastest."""
    tile = tile or pick_tile(geometry, context)
    assert tile is not None
    pairs = pairs_of(geometry, tile.wgmma)
    assert pairs is not None
    element = step.inputs[1].dtype
    _, window_w = tile.window(geometry, pairs)
    config: dict[str, int | bool | str] = {
        "operand": STORAGE[element], "x_t": geometry.x.ctype, "channels": geometry.channels,
        "padded_channels": pairs.channels, "kernel_h": geometry.kernel[1], "stride_h": geometry.strides[1],
        "stride_w": geometry.strides[2], "dilation_h": geometry.dilations[1], "dilation_w": geometry.dilations[2],
        "rows": tile.rows, "units": tile.units, "window_w": window_w,
        **({} if tile.wgmma else {"fragments": _FRAGMENTS}),
        "n_blocks": tile.n_blocks, "warps": _WARPS, "blocks": tile.blocks, "row_pairs": pairs.row, "steps": pairs.steps,
         "regular": pairs.regular, **_steps(geometry),
        "exact": False, "shared_bytes": tile.shared_bytes(geometry, pairs),
    }  # fmt: skip
    layout = f"stem n{tile.columns} {pairs}{' wgmma' if tile.wgmma else ''}"
    packed = context.weights.packed(step.inputs[1], layout, lambda w: pack_stem(w, pairs, tile.columns, tile.wgmma))
    tiles = geometry.images * ceildiv(geometry.output[1], tile.rows) * ceildiv(geometry.output[2], 8 * tile.units)
    slabs = ceildiv(geometry.n, tile.columns)
    known = {f"{name}_{axis}" for name in ("stride", "dilation") for axis in AXES}
    arguments: dict[str, Argument] = {
        **{name: value for name, value in geometry.arguments().items() if name not in known},
        "w": Pointer(packed, ctype=STORAGE[element]), "tiles": tiles,
    }  # fmt: skip
    # Blocks take turns as evenly as the tiles allow, all of them resident at once.
    rounds = ceildiv(tiles, max(1, max(1, context.multiprocessors) * tile.blocks // slabs))
    return launch(
        "conv", "conv_stem_wgmma.cuh" if tile.wgmma else "conv_stem.cuh", config,
        [epilogue_for(step, geometry.n)], arguments, (ceildiv(tiles, rounds), slabs, 1), 32 * _WARPS,
        tile.shared_bytes(geometry, pairs), Instruction.WGMMA if tile.wgmma else Instruction.MMA,
        helpers=f'#include "ptx/wgmma_panels.cuh"\n{register_product(tile.columns, element)}' if tile.wgmma else "",
    )  # fmt: skip


def _steps(geometry: Geometry) -> dict[str, int | bool | str]:
    """How an image lies, as far as the kernel is compiled for it: elements from pixel to pixel and channel to channel
    (0: told at run time), the planes it is made of, and how many pixels of one lie in a line of the cache (no planes:
    they lie far apart, which no network's input does)."""
    pixel, channel = geometry.x_strides[3], geometry.x_channel
    planes = 1 if abs(channel) < abs(pixel) else geometry.channels
    line_pixels = _LINE_BYTES // (max(1, abs(pixel)) * geometry.x_dtype.itemsize)
    return {
        "pixel_step": pixel if pixel in (1, geometry.channels) else 0, "channel_step": int(channel == 1),
        "planes": planes if line_pixels > 1 else 0, "line_pixels": max(1, line_pixels),
    }  # fmt: skip


def pack_stem(w: np.ndarray, pairs: Pairs, columns: int, wgmma: bool = False) -> np.ndarray:
    """A filter [n, c, *kernel] as conv_stem.cuh reads it: [slab of `columns`][step][32 columns][two 8-column blocks]
    [lane][4 words of two elements], with zeros behind n, the channels, the rows of the filter and k; or as
    conv_stem_wgmma.cuh does: [slab][k][columns], swizzled."""
    n, channels, kernel_h, taps = w.shape[0], w.shape[1], prod(w.shape[2:-1]), w.shape[-1]
    slabs = ceildiv(n, columns)
    table = np.zeros((slabs * columns, kernel_h, taps, pairs.channels), w.dtype)
    table[:n, ..., :channels] = w.reshape(n, channels, kernel_h, taps).transpose(0, 2, 3, 1)
    rows = np.zeros((slabs * columns, kernel_h, 2 * pairs.row), w.dtype)
    rows[..., : taps * pairs.channels] = table.reshape(slabs * columns, kernel_h, -1)
    k = np.zeros((slabs * columns, 16 * pairs.steps), w.dtype)
    k[:, : kernel_h * 2 * pairs.row] = rows.reshape(slabs * columns, -1)
    if wgmma:
        return _swizzled(k.reshape(slabs, columns // 32, 8, 4, -1).transpose(0, 4, 1, 3, 2).reshape(slabs, -1, columns))
    # Column 4 g + 2 i + j of 32 is column g of block 2 i + j; a lane is (g, quad).
    parts = k.reshape(slabs, columns // 32, 8, 2, 2, pairs.steps, 2, 4, 2)  # slab, 32s, g, i, j, step, half, quad, pair
    return np.ascontiguousarray(parts.transpose(0, 5, 1, 3, 2, 7, 4, 6, 8)).reshape(-1)


def _swizzled(w: np.ndarray) -> np.ndarray:
    """Rows of 32 or 64 elements [slab, k, columns] as wgmma finds them in shared memory: the chunks of 16 bytes of
    eight rows of 128 bytes, or of four pairs of rows of 64, change places (PTX, "Swizzling modes")."""
    slabs, rows, columns = w.shape
    chunks = w.reshape(slabs, rows, columns // 8, 8)
    row, place = np.arange(rows)[:, None], np.arange(columns // 8)[None]
    turned = place ^ (row % 8 if columns == 64 else row // 2 % 4)
    return np.ascontiguousarray(np.take_along_axis(chunks, turned[None, :, :, None], axis=2)).reshape(-1)
