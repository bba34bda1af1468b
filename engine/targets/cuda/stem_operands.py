"""What the kernels for images with few channels (conv_stem.cuh, conv_stem_wgmma.cuh, conv_stem_pooled.cuh) read: how k
runs, the window under a tile, and the packed weights. Called by `conv_stem.py` and `conv_stem_pooled.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from engine.plan.plan import Step
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
    launch,
)

WARPS = 4  # of a block
_MOST_TABLE = 20  # half steps whose places a lane has registers for
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
class Window:
    """The input under a tile, with what the padded pairs read: rows, and whole pairs of pixels, of so many elements."""

    rows: int
    pixels: int
    channels: int

    @classmethod
    def under(cls, geometry: Geometry, pairs: Pairs, rows: int, pixels: int) -> Window:
        """That of so many output pixels in each of so many rows."""
        down = (rows - 1) * geometry.strides[1] + (geometry.kernel[1] - 1) * geometry.dilations[1] + 1
        dilation, taps = geometry.dilations[2], geometry.kernel[2]
        run = 2 * pairs.row if dilation == 1 else ((taps - 1) * dilation + 1) * pairs.channels
        across = (pixels - 1) * geometry.strides[2] + ceildiv(run, pairs.channels)
        return cls(down, ceildiv(across, 2) * 2, pairs.channels)

    @property
    def elements(self) -> int:
        return self.rows * self.pixels

    def shared_bytes(self, pairs: Pairs, n_blocks: int) -> int:
        """With the packed weights of 8 · `n_blocks` columns."""
        return pairs.steps * n_blocks * 256 + self.elements * self.channels * 2


def launch_windows(
    step: Step,
    geometry: Geometry,
    context: Context,
    body: str,
    pairs: Pairs,
    window: Window,
    sizes: Mapping[str, int],
    tiles: int,
    blocks: int,
    more: Mapping[str, Argument],
) -> Launch:
    """The launch of kernel file `body` over so many tiles. `sizes`: what else it is compiled for, `n_blocks` columns of
    eight among them; `blocks` share a multiprocessor; `more`: what it is told beside the usual."""
    element, columns, on_wgmma = step.inputs[1].dtype, 8 * sizes["n_blocks"], body != "conv_stem.cuh"
    shared_bytes = window.shared_bytes(pairs, sizes["n_blocks"])
    config: dict[str, int | bool | str] = {
        "operand": STORAGE[element], "x_t": geometry.x.ctype, "channels": geometry.channels,
        "padded_channels": pairs.channels, "kernel_h": geometry.kernel[1], "stride_h": geometry.strides[1],
        "stride_w": geometry.strides[2], "dilation_h": geometry.dilations[1], "dilation_w": geometry.dilations[2],
        "window_w": window.pixels, **sizes, "warps": WARPS, "blocks": blocks, "row_pairs": pairs.row,
        "steps": pairs.steps, "regular": pairs.regular, **_lies(geometry), "exact": False, "shared_bytes": shared_bytes,
    }  # fmt: skip
    layout = f"stem n{columns} {pairs}{' wgmma' if on_wgmma else ''}"
    packed = context.weights.packed(step.inputs[1], layout, lambda w: pack_stem(w, pairs, columns, on_wgmma))
    slabs = ceildiv(geometry.n, columns)
    known = {f"{name}_{axis}" for name in ("stride", "dilation") for axis in AXES}
    arguments: dict[str, Argument] = {
        **{name: value for name, value in geometry.arguments().items() if name not in known},
        "w": Pointer(packed, ctype=STORAGE[element]), "tiles": tiles, **more,
    }  # fmt: skip
    # Blocks take turns as evenly as the tiles allow, all of them resident at once.
    rounds = ceildiv(tiles, max(1, max(1, context.multiprocessors) * blocks // slabs))
    return launch(
        "conv", body, config, [epilogue_for(step, geometry.n)], arguments, (ceildiv(tiles, rounds), slabs, 1),
        32 * WARPS, shared_bytes, Instruction.WGMMA if on_wgmma else Instruction.MMA,
        helpers=f'#include "ptx/wgmma_panels.cuh"\n{register_product(columns, element)}' if on_wgmma else "",
    )  # fmt: skip


def _lies(geometry: Geometry) -> dict[str, int | bool | str]:
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
