"""Convolutions on the warpgroup matrix units of sm_90a (conv_wgmma.cuh; staged, by clusters that share k, or by blocks
in pairs: conv_staged.cuh, conv_joined.cuh, conv_cluster.cuh, conv_cluster_staged.cuh): which of them the copy engine
can gather, in which tile, and their launch. Called by `conv.py`.

The limits are those that the CUDA driver documents of cuTensorMapEncodeIm2col.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from engine.plan.plan import Step
from engine.targets.cuda.conv_geometry import AXES, Geometry, padded_k, row_length
from engine.targets.cuda.conv_simt import epilogue_for
from engine.targets.cuda.gemm_wgmma import split_arguments, staged, wgmma_function
from engine.targets.cuda.joined_tiles import JOINED_PAIRS, JOINED_TILES, has_steps
from engine.targets.cuda.kernel import (
    STORAGE,
    Argument,
    Context,
    Functor,
    Instruction,
    Launch,
    PixelMap,
    Pointer,
    TensorMap,
    ceildiv,
    is_constant,
    launch,
)
from engine.targets.cuda.staging import STAGED_WIDTH
from engine.targets.cuda.tiles import (
    GATHERED,
    NOTHING,
    STAGED_TILES,
    WGMMA_TILES,
    Choice,
    Operands,
    WgmmaTile,
    clusters_at_once,
    wgmma_cycles,
    wgmma_tiles,
)

TILES = (
    *WGMMA_TILES,
    WgmmaTile(128, 160, 6, cooperative=True),
    WgmmaTile(64, 160, 7),
    WgmmaTile(256, 128, 4, cooperative=True),
)
"""Of 160 and 320 channels the other widths leave a sixth to a third empty. Of 128 the widest tile is half empty; one of
256 pixels is as large."""
STAGED = (
    *(tile for tile in STAGED_TILES if tile.consumers == 2),
    WgmmaTile(128, 128, 5, cooperative=True, slots=2),
    WgmmaTile(256, 128, 4, cooperative=True, slots=1),
)
"""Tiles whose results go through shared memory."""
PAIRS = (
    WgmmaTile(128, 256, 4, cooperative=True, cluster_m=2),
    WgmmaTile(128, 192, 5, cooperative=True, cluster_m=2),
    WgmmaTile(256, 128, 4, cooperative=True, cluster_m=2),
    WgmmaTile(256, 128, 4, cooperative=True, cluster_n=2),
    WgmmaTile(128, 128, 6, cluster_m=2),
    WgmmaTile(128, 128, 6, cluster_n=2),
    WgmmaTile(128, 256, 4, cooperative=True, slots=2, cluster_m=2),
    WgmmaTile(128, 192, 4, cooperative=True, slots=3, cluster_m=2),
    WgmmaTile(256, 128, 4, cooperative=True, slots=1, cluster_m=2),
    WgmmaTile(256, 128, 4, cooperative=True, slots=1, cluster_n=2),
    WgmmaTile(128, 192, 4, slots=2, cluster_m=2),
    WgmmaTile(128, 128, 5, slots=2, cluster_m=2),
    WgmmaTile(64, 128, 8, cluster_m=2),
    WgmmaTile(64, 128, 8, cluster_n=2),
    WgmmaTile(128, 96, 7, cooperative=True, cluster_n=2),
)
"""Tiles of two blocks that share filters (`cluster_m`) or pixels (`cluster_n`), with results staged or not. A step of
128 × 256, of 16 KB of pixels and 32 KB of filters, takes 47 bytes a cycle and multiprocessor from the L2 cache where
blocks share nothing, and 31 in pairs."""
_BUSY = 0.7  # of the multiprocessors, at least, of layers that pairs are timed for
PANELS = (128, 64, 32)  # bytes of channels that a copy can bring of each pixel
_LINE_BYTES = 128  # of the L2 cache
MOST_STEP = 8  # pixels between neighbours of the walk
REACH = {2: (-128, 127, 255), 3: (-16, 15, 31)}
"""By spatial axes: corners of the bounding box, and the largest offset of a copy."""


def suits(step: Step, geometry: Geometry) -> bool:
    """Whether the copy engine can gather the patches of a step's image, which it takes as it is: in the type of the
    weights."""
    first, *others = geometry.phases
    if others or not first.k or geometry.x_dtype is not step.inputs[1].dtype:
        return False
    if not geometry.reads_chunks(16 // geometry.x_dtype.itemsize, geometry.x_dtype):
        return False
    lowest, highest, reach = REACH[_spatial(geometry)]
    along = [_Axis.of(geometry, axis) for axis in range(3)[-_spatial(geometry) :]]
    lies = zip((geometry.images, *geometry.input), geometry.x_strides, strict=True)
    return (
        all(axis.step <= MOST_STEP and axis.reach <= reach for axis in along)
        and all(lowest <= corner <= highest for axis in along for corner in (axis.lower, axis.upper))
        and all(stride > 0 for size, stride in lies if size > 1)
    )


def _spatial(geometry: Geometry) -> int:
    """The spatial axes that the copy engine sees: two, of which one may have size 1, or three."""
    return max(2, geometry.axes)


@dataclass(frozen=True)
class _Axis:
    """The walk along one axis of `size` pixels that lie `spacing` pixels of the image apart: corners of the bounding
    box, the step, and the largest offset."""

    size: int
    spacing: int
    lower: int
    upper: int
    step: int
    reach: int

    @classmethod
    def of(cls, geometry: Geometry, axis: int) -> _Axis:
        (phase,) = geometry.phases
        along, stride, size = phase.axes[axis], geometry.strides[axis], geometry.input[axis]
        reach = (len(along.taps) - 1) * geometry.dilations[axis]
        if not reach and not along.pad and (along.out - 1) * stride < size:
            return cls(along.out, stride, 0, 0, 1, 0)  # the pixels that are met are an image of their own
        # The last patch begins at the last pixel of the box, whatever the padding at the end.
        last = (along.out - 1) * stride - along.pad
        return cls(size, 1, -along.pad, last - (size - 1), stride if along.out > 1 else 1, reach)


def estimates(
    step: Step,
    geometry: Geometry,
    operands: Operands,
    most_splits: int,
    context: Context,
) -> Iterator[Choice[WgmmaTile]]:
    """What each tile, whole and split, should take; nothing where no kernel of these can run the step."""
    w = step.inputs[1]
    if not context.architecture.wgmma or operands is Operands.EXACT or not suits(step, geometry):
        return
    m, n, groups, epilogue = geometry.rows, geometry.n, geometry.groups, epilogue_for(step, geometry.n)
    for panel_bytes in PANELS:
        panel = panel_bytes // w.dtype.itemsize
        # Filters that are packed on the device have no padding, and a panel must not reach into the next group.
        if geometry.channels % panel and (groups > 1 or not is_constant(w)):
            continue
        k = padded_k(geometry, panel)
        lines = lines_of(geometry, panel_bytes)
        tiles = wgmma_tiles(m, n, k, operands, most_splits, groups, panel_bytes, TILES)
        others = _other_tiles(epilogue, operands.wgmma_steps(k), groups, panel_bytes)
        pairs = _pairs(m, n, operands.wgmma_steps(k), epilogue, groups, panel_bytes, context.multiprocessors)
        for tile in (*tiles, *others, *pairs):
            if not has_registers(tile, geometry):
                continue
            waits = NOTHING if tile.slots else epilogue.reads
            cycles = wgmma_cycles(
                m, n, k, tile, context.multiprocessors, operands, groups, step.cost.bytes, GATHERED, waits, lines
            )
            yield Choice(tile, cycles)


def _other_tiles(epilogue: Functor, steps: int, groups: int, panel_bytes: int) -> Iterator[WgmmaTile]:
    """The tiles of clusters that share so many steps of k, and those with staged results."""
    for tile in JOINED_TILES:
        if has_steps(tile, steps):
            yield replace(tile, panel_bytes=panel_bytes)
    if groups == 1 and _is_staged(epilogue):
        yield from (replace(tile, panel_bytes=panel_bytes) for tile in STAGED)


def _is_staged(epilogue: Functor) -> bool:
    """Whether the copy engine can take the results."""
    return epilogue.staged is not None and not epilogue.staged.ragged


def _pairs(
    m: int, n: int, steps: int, epilogue: Functor, groups: int, panel_bytes: int, multiprocessors: int
) -> Iterator[WgmmaTile]:
    """The tiles of blocks in pairs, of layers that keep most multiprocessors, and with them the L2 cache, busy, and
    that have more than half of a pair's columns; and of pairs that share k, of which all clusters have room at once."""
    for tile in (*PAIRS, *JOINED_PAIRS) if groups == 1 else ():
        if tile.cluster_k > 1:
            fills = has_steps(tile, steps) and tile.tiles(m, n) <= clusters_at_once(tile, multiprocessors)
        else:
            fills = tile.tiles(m, n) >= _BUSY * multiprocessors
        if fills and tile.n * tile.cluster_n < 2 * n and (not tile.slots or _is_staged(epilogue)):
            yield replace(tile, panel_bytes=panel_bytes)


def lines_of(geometry: Geometry, panel_bytes: int) -> float:
    """The lines of the L2 cache that a panel of a pixel lies in, on average over dense pixels and their panels."""
    pixel = geometry.groups * geometry.channels * geometry.x_dtype.itemsize
    panels = range(0, geometry.channels * geometry.x_dtype.itemsize, panel_bytes)
    starts = [
        (i * pixel + first, min(panel_bytes, panels.stop - first))
        for i in range(_LINE_BYTES // gcd(pixel, _LINE_BYTES))
        for first in panels
    ]
    return sum((at + size - 1) // _LINE_BYTES - at // _LINE_BYTES + 1 for at, size in starts) / len(starts)


def has_registers(tile: WgmmaTile, geometry: Geometry) -> bool:
    """Whether the kernel keeps out of local memory: with 192 columns for one warpgroup, or 256 for two, it does not
    where it has to add partial sums, or to stage results, or to reach its neighbour with results of its own, and to
    find its place in a volume (the gate shows spills)."""
    if geometry.axes < len(AXES):
        return True
    if tile.cooperative:
        return tile.n < 256 or (tile.splits == 1 and (tile.cluster == 1 or tile.slots > 0))
    return tile.n < 192 or (tile.splits == 1 and not tile.slots)


def panel_channels(tile: WgmmaTile, step: Step) -> int:
    """The channels that one copy brings of each pixel."""
    return tile.panel_bytes // step.inputs[1].dtype.itemsize


def launch_conv(step: Step, geometry: Geometry, filters: Pointer, tile: WgmmaTile, context: Context) -> Launch:
    """The launch in the given tile. `filters`: packed for its panels."""
    dtype, (phase,), groups = step.inputs[1].dtype, geometry.phases, geometry.groups
    panel = panel_channels(tile, step)
    k = padded_k(geometry, panel)
    tiles = tile.tiles(geometry.rows, geometry.n)
    sizes = {
        "out": phase.out, "stride": [_Axis.of(geometry, axis).step for axis in range(3)], "pad": phase.pads,
        "kernel": phase.kernel, "dilation": geometry.dilations,
    }  # fmt: skip
    epilogue, maps, width = epilogue_for(step, geometry.n), dict[str, Argument](), dict[str, int | bool | str]()
    body = "conv_joined.cuh" if tile.cluster_k > 1 else "conv_wgmma.cuh"
    if tile.slots:
        body, width = "conv_staged.cuh", {"width": STAGED_WIDTH, "moments": False, "offsets": False}
        epilogue, maps = staged(epilogue, tile, geometry.rows, geometry.n)
    if tile.cluster > 1 and tile.cluster_k == 1:
        body = "conv_cluster_staged.cuh" if tile.slots else "conv_cluster.cuh"
    blocks = tile.blocks(tiles, context.multiprocessors // groups)
    return launch(
        "conv",
        body,
        {
            **tile.config, "operand": STORAGE[dtype], "grouped": groups > 1, "depth": geometry.axes == len(AXES),
            "band": tile.band(geometry.n * k * dtype.itemsize), **width,
        },
        [epilogue],
        {
            **maps,
            "map_a": _pixels(geometry, panel, tile.m // tile.cluster_n),
            "map_b": TensorMap(filters, groups * geometry.n, k, k, tile.n // tile.cluster_m, 128 // dtype.itemsize),
            "m": geometry.rows, "n": geometry.n, "k": k,
            "channels": geometry.channels,
            # A copy begins at channels that lie at a multiple of 16 bytes, where there are none, too.
            "all_channels": row_length(groups * geometry.channels, 16 // dtype.itemsize),
            "blocks": ceildiv(geometry.channels, panel),
            **{f"{name}_{axis}": values[i] for name, values in sizes.items() for i, axis in enumerate(AXES)},
            **split_arguments(tiles * groups, tile.m * tile.n, 8 if tile.cooperative else 4, tile.splits),
        },
        (tiles * tile.cluster_k if tile.cluster_k > 1 else blocks, tile.splits, groups),
        384,
        tile.shared_bytes,
        Instruction.WGMMA,
        helpers=f'#include "ptx/wgmma.cuh"\n{wgmma_function(tile.n, dtype)}',
        cluster=tile.cluster * tile.cluster_k,
    )  # fmt: skip


def _pixels(geometry: Geometry, panel: int, pixels: int) -> PixelMap:
    """The image as the copy engine walks it."""
    axes = range(3)[-_spatial(geometry) :][::-1]  # x first
    along = [_Axis.of(geometry, axis) for axis in axes]
    sizes = tuple(axis.size for axis in along)
    strides, image_stride = pixel_strides(geometry, sizes, tuple(axis.spacing for axis in along))
    return PixelMap(
        geometry.x,
        geometry.groups * geometry.channels,
        geometry.images,
        image_stride,
        sizes,
        strides,
        tuple(axis.lower for axis in along),
        tuple(axis.upper for axis in along),
        tuple(axis.step for axis in along),
        panel,
        pixels,
    )


def pixel_strides(geometry: Geometry, sizes: tuple[int, ...], spacings: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Elements between neighbours along the spatial axes, x first, of an image of `sizes` with only every so many-th
    pixel, and between images. The driver wants a stride along an axis of size 1, too: as if the image were dense."""
    dense = row_length(geometry.groups * geometry.channels, 16 // geometry.x_dtype.itemsize)
    lies = geometry.x_strides[::-1][: len(sizes)]
    strides = []
    for size, spacing, stride in zip(sizes, spacings, lies, strict=True):
        strides.append(stride * spacing or dense)
        dense = strides[-1] * size
    return tuple(strides), geometry.x_strides[0] or dense
