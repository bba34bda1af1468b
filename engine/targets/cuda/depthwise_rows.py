"""Depthwise convolutions whose rows stream through shared memory by the copy engine of sm_90a (depthwise_rows.cuh,
depthwise_bands.cuh): which they are, in which tile, and their launch. Called by `conv.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from engine.ir.dtype import DType
from engine.ir.ops import Conv
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, Tensor, row_major
from engine.targets.cuda import codegen, depthwise, depthwise_bands, depthwise_diagonal
from engine.targets.cuda.conv_bias import packed_bias, without_bias
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_simt import epilogue_for
from engine.targets.cuda.conv_wgmma import pixel_strides
from engine.targets.cuda.depthwise import Window, is_depthwise_product, pack_tap_pairs, window_of
from engine.targets.cuda.depthwise_bands import BandedRows, pack_bands
from engine.targets.cuda.depthwise_tiles import MEMORY_BYTES, Column, RowsTile, live_rows, parts_of
from engine.targets.cuda.kernel import (
    STORAGE,
    Argument,
    Context,
    Instruction,
    Launch,
    Pointer,
    TensorMap,
    ceildiv,
    launch,
    pointer_to,
    workspace,
)
from engine.targets.cuda.spaces import MAX_COUNT, VECTOR

_LONGEST_PERIOD = 8  # rows that the loop is unrolled over


@lru_cache(maxsize=1024)
def candidates(window: Window, shared_bytes: int, sums: bool = False) -> tuple[RowsTile, ...]:
    """The tiles that registers and shared memory have room for. `sums`: while they add up the pixels of images."""
    kernels = (depthwise_diagonal.candidates, depthwise_bands.candidates)
    return tuple(tile for fitting in kernels for tile in fitting(window, shared_bytes, sums))


def has_rows(step: Step, geometry: Geometry, context: Context) -> bool:
    """Whether the kernel can run a step."""
    if not context.architecture.wgmma or not is_depthwise_product(step, geometry, context):
        return False
    window, column = window_of(geometry), Column.of(geometry)
    lies = zip((geometry.images, *geometry.input), geometry.x_strides, strict=True)
    return (
        live_rows(window) * window.stride[0] <= _LONGEST_PERIOD
        and geometry.images > 0
        and all(stride > 0 for size, stride in lies if size > 1)
        and (geometry.images + _LONGEST_PERIOD) * column.pitch <= MAX_COUNT
        and bool(candidates(window, context.architecture.shared_bytes))
    )


def ranked(step: Step, geometry: Geometry, context: Context, sums: bool = False) -> list[tuple[float, RowsTile]]:
    """The tiles of a step that `has_rows` with their estimated cycles, from what should be the fastest on. `sums`: with
    those over the pixels of images."""
    shared_bytes, multiprocessors = context.architecture.shared_bytes, context.multiprocessors
    return list(_ranked(window_of(geometry), Column.of(geometry), shared_bytes, multiprocessors, sums))


@lru_cache(maxsize=256)
def _ranked(
    window: Window, column: Column, shared_bytes: int, multiprocessors: int, sums: bool
) -> tuple[tuple[float, RowsTile], ...]:
    fitting = candidates(window, shared_bytes, sums)
    estimates = ((tile.cycles(window, column, multiprocessors, sums), tile) for tile in fitting)
    return tuple(sorted(estimates, key=lambda one: one[0]))


def pick(step: Step, geometry: Geometry, context: Context, sums: bool = False) -> RowsTile | None:
    """The tile of a depthwise product that should be faster than in depthwise_mma.cuh, if there is one. `sums`: while
    it adds up the pixels of images, for which the other would need another pass."""
    if not has_rows(step, geometry, context):
        return None
    window = window_of(geometry)
    other = depthwise.pick_tile(window, context.architecture.shared_bytes, context.multiprocessors)
    tiles = ranked(step, geometry, context, sums)
    if not tiles:
        return None
    estimate, tile = tiles[0]
    if other is None:
        return tile
    rival = depthwise.cycles(window, other, context.multiprocessors)
    if sums:
        rival += step.outputs[0].nbytes / (MEMORY_BYTES * max(1, context.multiprocessors))
    return tile if estimate < rival else None


@dataclass(frozen=True)
class ImageSums:
    """Where a launch leaves what it has added up: [images, parts · units, channels] in the step's workspace. The unit
    is the tile's; the parts of an image are the streams that have rows of it, as many as any image has."""

    parts: int
    units: int
    tensor: Tensor

    @classmethod
    def of(cls, geometry: Geometry, tile: RowsTile, context: Context) -> ImageSums:
        window, column = window_of(geometry), Column.of(geometry)
        _, _, outputs = parts_of(window, tile, column.lines, context.multiprocessors)
        first = np.arange(window.images) * (column.pitch // window.stride[0])
        parts = int(np.max((first + window.output[0] - 1) // outputs - first // outputs)) + 1
        units = ceildiv(window.output[1], tile.unit)
        shape = (window.images, parts * units, window.channels)
        return cls(parts, units, Tensor(workspace(4 * prod(shape)), DType.F32, shape, row_major(shape)))


def launch_rows(
    step: Step, geometry: Geometry, tile: RowsTile, context: Context, sums: ImageSums | None = None
) -> Launch:
    """The launch of a step that `has_rows` in the given tile. `sums`: it adds up the pixels of each image, too."""
    window, element = window_of(geometry), step.inputs[1].dtype
    column = Column.of(geometry)
    panels = ceildiv(window.channels, tile.panel)
    wide, sharing, outputs = parts_of(window, tile, column.lines, context.multiprocessors)
    packed, more = _weights(step, tile, window, sums is not None, context)
    _, height, width = geometry.input
    (pixel_stride, row_stride), image_stride = pixel_strides(geometry, (width, height), (1, 1))
    pixels = TensorMap(
        geometry.x, width, window.channels, pixel_stride, tile.met(window), tile.panel,
        ((height, row_stride), (geometry.images, image_stride)),
    )  # fmt: skip
    added: dict[str, Argument] = {}
    if sums is not None:
        added = {"sums": pointer_to(sums.tensor), "sum_parts": sums.parts, "sum_units": sums.units}
    step, bias = without_bias(step)
    if bias is not None:
        added["bias"] = Pointer(packed_bias(bias, panels * tile.panel, context), ctype="float")
    assert isinstance(step.op, Conv)
    return launch(
        "depthwise",
        tile.kernel,
        {
            "operand": STORAGE[element], "kernel_h": window.kernel[0], "kernel_w": window.kernel[1],
            "stride_h": window.stride[0], "stride_w": window.stride[1], "dilation_h": window.dilation[0],
            "dilation_w": window.dilation[1], "panel": tile.panel, "units": tile.units, "streams": tile.streams,
            "rows": tile.rows, "stages": tile.stages, "blocks": tile.blocks, "sums": sums is not None,
            "bias": bias is not None,
            "shared_bytes": tile.shared_bytes(window), **more,
        },
        [epilogue_for(step, VECTOR), codegen.result(step.op.stores[0])],
        {
            "map_x": pixels, "w": Pointer(packed, ctype=STORAGE[element]), "channels": window.channels,
            "panels": panels, "pitch": column.pitch, "lines": column.lines, "outputs": outputs,
            "out_h": window.output[0], "out_w": window.output[1], "pad_h": geometry.pads[1], "pad_w": geometry.pads[2],
            **added,
        },
        (wide, sharing, 1),
        32 * tile.warps,
        tile.shared_bytes(window),
        Instruction.MMA,
    )  # fmt: skip


def _weights(
    step: Step, tile: RowsTile, window: Window, sums: bool, context: Context
) -> tuple[Buffer, dict[str, bool]]:
    """A filter as the tile's kernel reads it, and what the kernel has to know of it."""
    filters, shape = step.inputs[1], (window.channels, *window.kernel)
    if isinstance(tile, BandedRows):
        layout = f"bands stride {window.stride[1]} dilation {window.dilation[1]}"
        packed = context.weights.packed(filters, layout, lambda w: pack_bands(w.reshape(shape), window))
        return packed, {"expanded": tile.expanded(window, sums)}
    padded = ceildiv(window.channels, tile.panel) * tile.panel
    packed = context.weights.packed(filters, f"tap pairs c{padded}", lambda w: pack_tap_pairs(w.reshape(shape), padded))
    return packed, {}
