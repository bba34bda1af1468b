"""Photos to the pixels of a model's input on the CPU: a box of a picture resized, as Pillow does it, to the bit.

Filters are widened by the scale when shrinking, so that no pixel is skipped; centres lie half a pixel in; weights are
renormalised at the edges and rounded to 22 bits; rows come first, and each pass is rounded to the 8 bits that the
pixels came from. What Pillow 13 does down the columns first (heights that shrink by more than twice what widths do) and
pictures smaller than a block of the kernels are left to it. `codegen/resample.py` has the kernels.

Public as `engine.images`; runs on the caller's thread, with the GIL released.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.targets.cpu.codegen.isa import Isa, host_isa
from engine.targets.cpu.codegen.resample import (
    CHANNELS,
    COLUMNS,
    PIXEL_BYTES,
    ROWS,
    TAPS,
    WEIGHT_BITS,
    ResampleColumns,
    ResampleRows,
)
from engine.targets.cpu.jit import compiler

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels."""

_Floats = NDArray[np.float64]
_Native = Callable[..., None]
_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64


class Filter(Enum):
    """Resampling filters, as Pillow defines them."""

    BILINEAR = 1  # the value is how far it reaches, in pixels of the smaller picture
    BICUBIC = 2


@dataclass(frozen=True)
class _Windows:
    """For each output `taps` neighbours, the first of them, and their weights."""

    first: NDArray[np.int64]
    weights: NDArray[np.int32]

    @property
    def taps(self) -> int:
        return int(self.weights.shape[1])


def resize(
    pixels: int, size: tuple[int, int], box: Box, output: tuple[int, int], filter_: Filter
) -> NDArray[np.uint8] | None:
    """The `box` of a picture as u8[3, *output]. `pixels` is the address of its first pixel, `size` its height and
    width: four bytes a pixel (red, green, blue, any), rows without gaps. The box lies within the picture.

    None where Pillow has to do it (see above). Raises DeviceError where the system forbids making memory executable.
    """
    (height, width), (out_height, out_width) = size, output
    left, top, right, bottom = box
    columns_first = height > out_height and height - out_height > 2 * (width - out_width)
    if columns_first or out_width < COLUMNS:
        return None
    across = _windows(width, left, right, out_width, filter_, TAPS)
    down = _windows(height, top, bottom, out_height, filter_, 1)
    if across is None or down is None:
        return None
    first_row = int(down.first.min())
    rows = int(down.first.max()) + down.taps - first_row
    if rows < ROWS:
        return None
    along_rows, along_columns = _kernels(host_isa())
    between = np.empty((rows, out_width, PIXEL_BYTES), np.uint8)
    out = np.empty((CHANNELS, out_height, out_width), np.uint8)
    pixel_row = width * PIXEL_BYTES
    along_rows(
        pixels + first_row * pixel_row, between.ctypes.data, rows, pixel_row, out_width, across.first.ctypes.data,
        across.weights.ctypes.data, across.taps,
    )  # fmt: skip
    along_columns(
        between.ctypes.data - first_row * out_width * PIXEL_BYTES, out.ctypes.data, out_width, out_height,
        down.first.ctypes.data, down.weights.ctypes.data, down.taps,
    )  # fmt: skip
    return out


@cache
def _kernels(isa: Isa) -> tuple[_Native, _Native]:
    rows, columns = ResampleRows(isa), ResampleColumns(isa)
    addresses = compiler().load([rows, columns])
    row_type = ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _POINTER, _COUNT)
    column_type = ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _COUNT, _COUNT, _POINTER, _POINTER, _COUNT)
    return row_type(addresses[rows.symbol]), column_type(addresses[columns.symbol])


@lru_cache(128)  # photos come in few sizes; the weights of a large one have some 60 KB
def _windows(size: int, begin: float, end: float, outputs: int, filter_: Filter, block: int) -> _Windows | None:
    """The windows of `outputs` pixels that cover [begin, end) of `size` ones, in whole blocks of taps; None where a
    window is longer than all there is.

    Pillow takes the edges in fp32 and goes on in fp64; sums are made one by one, in its order.
    """
    edge = float(np.float32(begin))
    scale = float(np.float32(end) - np.float32(begin)) / outputs
    widened = max(scale, 1.0)
    reach = filter_.value * widened
    centres = edge + (np.arange(outputs) + 0.5) * scale
    first = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    count = np.minimum((centres + reach + 0.5).astype(np.int64), size) - first
    taps = int(count.max())
    whole = -(-taps // block) * block
    if whole > size:
        return None
    places = np.arange(taps)
    valid = places < count[:, None]
    values = _filtered(filter_, (places + first[:, None] - centres[:, None] + 0.5) * (1.0 / widened))
    values[~valid] = 0.0
    values /= values.cumsum(axis=1)[:, -1:]
    fixed = (values * (1 << WEIGHT_BITS) + np.where(values < 0, -0.5, 0.5)).astype(np.int32)
    start = np.minimum(first, size - whole)  # a window that would end behind the last pixel begins earlier
    weights = np.zeros((outputs, whole), np.int32)
    output, place = np.nonzero(valid)
    weights[output, place + (first - start)[output]] = fixed[output, place]
    return _Windows(start, weights)


def _filtered(filter_: Filter, distances: _Floats) -> _Floats:
    x = np.abs(distances)
    if filter_ is Filter.BILINEAR:
        return np.maximum(1.0 - x, 0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
