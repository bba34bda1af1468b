"""Convolutions that store only the maxima over windows of their sums: `ConvMax`. Those of 2 × 2 pixels lie in tiles
whose rows are pairs of lines (conv_pooled.cuh, conv_cluster_pooled.cuh, conv_lines.cuh), those of 3 × 3 behind the
first layer of a network in conv_stem_pooled.cuh. Where the convolution and a pool should be faster apart, or no such
kernel can run it, the result between them lies in the step's workspace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import TypeAlias

from engine.ir.ops import ConvMax, Op
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda import conv, conv_lines, conv_stem_pooled, conv_wgmma, pool
from engine.targets.cuda.conv_geometry import AXES, Geometry, image_at, padded_k, row_length, sizes_of
from engine.targets.cuda.conv_halo import panel_channels
from engine.targets.cuda.conv_lines import LinesTile
from engine.targets.cuda.conv_simt import epilogue_for
from engine.targets.cuda.conv_stem_pooled import PooledStemTile, is_threes, launch_pooled
from engine.targets.cuda.conv_tiles import taken
from engine.targets.cuda.gemm_wgmma import wgmma_function
from engine.targets.cuda.kernel import (
    STORAGE,
    Context,
    Instruction,
    Launch,
    PixelMap,
    Pointer,
    TensorMap,
    ceildiv,
    launch,
    with_scratch_behind,
)
from engine.targets.cuda.tiles import GATHERED, Choice, Operands, WgmmaTile, wgmma_cycles

PooledTile: TypeAlias = WgmmaTile | LinesTile | PooledStemTile

TILES = (
    WgmmaTile(128, 128, 6),
    WgmmaTile(128, 64, 8),
    WgmmaTile(128, 32, 8),
    WgmmaTile(256, 128, 4, cooperative=True),
    WgmmaTile(256, 64, 5, cooperative=True),
    WgmmaTile(256, 128, 4, cooperative=True, cluster_m=2),
    WgmmaTile(256, 128, 4, cooperative=True, cluster_n=2),
    WgmmaTile(128, 128, 6, cluster_m=2),
    WgmmaTile(128, 128, 6, cluster_n=2),
)
"""Tiles of gathered patches: a consumer has 64 pixels of the upper lines of windows, and the 64 below them."""
_POOL, _POOL_RATE = 2500, 1700
"""Cycles of a pool apart: its launch and end, and the bytes that all multiprocessors move in one."""


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Those of the convolution."""
    assert isinstance(op, ConvMax)
    return conv.requirements(op.conv, inputs)


def lower(step: Step, context: Context) -> list[Launch]:
    if not step.outputs[0].elements:
        return []
    tiles = tiles_of(step, context)
    return lower_in(step, taken(tiles, step, unpooled(step), context), context) if tiles else lower_apart(step, context)


def unpooled(step: Step) -> Step:
    """The convolution alone, whose result has a buffer of its own."""
    op = step.op
    assert isinstance(op, ConvMax)
    ((dtype, shape),) = op.conv.infer(step.inputs)
    sizes = sizes_of(shape)
    sums = Buffer("sums", BufferKind.ARENA, prod(sizes) * dtype.itemsize)
    return replace(step, op=op.conv, outputs=(image_at(sums, dtype, sizes, 0),))


def lower_apart(step: Step, context: Context) -> list[Launch]:
    """The convolution, then the pool, with what lies between them in the workspace."""
    assert isinstance(step.op, ConvMax)
    convolution = unpooled(step)
    windows = replace(step, op=step.op.pool, inputs=convolution.outputs)
    launches = [*conv.lower(convolution, context), *pool.lower(windows, context)]
    return with_scratch_behind(launches, convolution.outputs[0].buffer)


def tiles_of(step: Step, context: Context) -> Sequence[Choice[PooledTile]]:
    """The tiles that store maxima, from what should be the fastest on; none where the convolution and a pool should be
    faster apart."""
    bare = unpooled(step)
    geometry = Geometry(bare)
    if not step.outputs[0].elements or not context.architecture.wgmma:
        return ()
    ranked = sorted(estimates(step, geometry, context), key=lambda choice: choice.cycles)
    return ranked if ranked and ranked[0].cycles <= cycles_apart(step, context) else ()


def cycles_apart(step: Step, context: Context) -> float:
    """What the convolution and a pool should take."""
    bare = unpooled(step)
    convolution = min((choice.cycles for choice in conv.tiles_of(bare, context)), default=0.0)
    return convolution + _POOL + (bare.outputs[0].nbytes + step.outputs[0].nbytes) / _POOL_RATE


def estimates(step: Step, geometry: Geometry, context: Context) -> Iterator[Choice[PooledTile]]:
    """What each tile that can run the step should take."""
    assert isinstance(step.op, ConvMax)
    if is_threes(step.op):
        yield from conv_stem_pooled.estimates(step, unpooled(step), geometry, context)
    if step.op.pool.kernel != (2, 2) or not conv_wgmma.suits(step, geometry):
        return
    yield from conv_lines.estimates(step, geometry, context)
    if not _gathers(geometry):
        return
    epilogue, operands, size = epilogue_for(step, geometry.n), Operands.HALF, step.inputs[1].dtype.itemsize
    rows = _rows(step)
    for panel_bytes in conv_wgmma.PANELS:
        k = padded_k(geometry, panel_bytes // size)
        for tile in TILES:
            if tile.n * tile.cluster_n >= 2 * geometry.n and tile.n > 32:
                continue
            cycles = wgmma_cycles(
                rows, geometry.n, k, tile, context.multiprocessors, operands, 1, step.cost.bytes, GATHERED,
                epilogue.reads, conv_wgmma.lines_of(geometry, panel_bytes),
            )  # fmt: skip
            yield Choice(replace(tile, panel_bytes=panel_bytes), cycles)


def _gathers(geometry: Geometry) -> bool:
    """Whether the copy engine can walk through upper lines alone, and reach the lower ones by its offset."""
    (phase,) = geometry.phases
    reach = (phase.kernel[1] - 1) * geometry.dilations[1] + geometry.strides[1]
    lowest, highest, farthest = conv_wgmma.REACH[2]
    return (
        geometry.axes == 2
        and 2 * geometry.strides[1] <= conv_wgmma.MOST_STEP
        and reach <= farthest
        and all(lowest <= corner <= highest for axis in _corners(geometry) for corner in axis)
    )


def _corners(geometry: Geometry) -> tuple[tuple[int, int], tuple[int, int]]:
    """The corners of the walk along x and y, whose last places are those of whole windows."""
    (phase,) = geometry.phases
    (_, height, width), (_, stride_y, stride_x), (_, pad_y, pad_x) = geometry.output, geometry.strides, phase.pads
    last_x = (width // 2 * 2 - 1) * stride_x - pad_x
    last_y = (height // 2 * 2 - 2) * stride_y - pad_y
    _, size_y, size_x = geometry.input
    return (-pad_x, last_x - (size_x - 1)), (-pad_y, last_y - (size_y - 1))


def _rows(step: Step) -> int:
    """The sums that a window takes in, of all images."""
    images, _, height, width = step.outputs[0].shape
    return images * 4 * height * width


def lower_in(step: Step, tile: PooledTile, context: Context) -> list[Launch]:
    """The launch of a step in one of its `tiles_of`."""
    bare = unpooled(step)
    geometry = Geometry(bare)
    if isinstance(tile, PooledStemTile):
        return [launch_pooled(step, geometry, tile, context)]
    if isinstance(tile, LinesTile):
        filters, _ = conv.filters_of(bare, geometry, context, panel_channels(bare))
        return [conv_lines.launch_lines(step, geometry, filters, tile, context)]
    filters, _ = conv.filters_of(bare, geometry, context, conv_wgmma.panel_channels(tile, bare))
    return [_launch_gathered(step, geometry, filters, tile, context)]


def _launch_gathered(step: Step, geometry: Geometry, filters: Pointer, tile: WgmmaTile, context: Context) -> Launch:
    dtype, (phase,) = step.inputs[1].dtype, geometry.phases
    panel = conv_wgmma.panel_channels(tile, step)
    k, rows = padded_k(geometry, panel), _rows(step)
    tiles = tile.tiles(rows, geometry.n)
    sizes = {"kernel": phase.kernel, "dilation": geometry.dilations, "pad": phase.pads}
    return launch(
        "conv",
        "conv_cluster_pooled.cuh" if tile.cluster > 1 else "conv_pooled.cuh",
        {
            **tile.config, "operand": STORAGE[dtype], "grouped": False, "depth": False,
            "band": tile.band(geometry.n * k * dtype.itemsize),
        },
        [epilogue_for(step, geometry.n)],
        {
            "map_a": _upper_pixels(geometry, panel, tile.m // 2),
            "map_b": TensorMap(filters, geometry.n, k, k, tile.n // tile.cluster_m, 128 // dtype.itemsize),
            "m": rows, "n": geometry.n, "k": k, "channels": geometry.channels,
            # A copy begins at channels that lie at a multiple of 16 bytes, where there are none, too.
            "all_channels": row_length(geometry.channels, 16 // dtype.itemsize),
            "blocks": ceildiv(geometry.channels, panel),
            "out_h": geometry.output[1] // 2, "out_w": geometry.output[2] // 2 * 2, "out_d": 1,
            "stride_h": 2 * geometry.strides[1], "stride_w": geometry.strides[2], "stride_d": 1,
            "below": geometry.strides[1],
            **{f"{name}_{axis}": values[i] for name, values in sizes.items() for i, axis in enumerate(AXES)},
        },
        (tile.blocks(tiles, context.multiprocessors), 1, 1),
        tile.threads,
        tile.shared_bytes,
        Instruction.WGMMA,
        helpers=f'#include "ptx/wgmma.cuh"\n{wgmma_function(tile.n, dtype)}',
        cluster=tile.cluster,
    )  # fmt: skip


def _upper_pixels(geometry: Geometry, panel: int, pixels: int) -> PixelMap:
    """The image as the copy engine walks through the upper lines of windows."""
    sizes = geometry.input[:0:-1]  # x first
    strides, image_stride = conv_wgmma.pixel_strides(geometry, sizes, (1, 1))
    lower, upper = zip(*_corners(geometry), strict=True)
    steps = (geometry.strides[2], 2 * geometry.strides[1])
    return PixelMap(
        geometry.x, geometry.channels, geometry.images, image_stride, sizes, strides, lower, upper, steps, panel, pixels
    )
