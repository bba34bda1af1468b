"""Depthwise convolutions whose rows stream through shared memory by the copy engine of sm_90a (depthwise_rows.cuh):
which they are, in which tile, and their launch. Called by `conv.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import numpy as np

from engine.ir.dtype import DType
from engine.ir.ops import Conv
from engine.plan.plan import Step
from engine.plan.tensor import Tensor, row_major
from engine.targets.cuda import codegen, depthwise
from engine.targets.cuda.architecture import share_of
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_simt import epilogue_for
from engine.targets.cuda.conv_wgmma import pixel_strides
from engine.targets.cuda.depthwise import Window, is_depthwise_product, pack_tap_pairs, window_of
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
_MOST_WARPS = 16
_LARGEST_BOX = 256  # pixels of one copy
_SUMS_BYTES = 2048  # that a warp passes its sums through
_REGISTERS = 65536  # of a multiprocessor
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
class RowsTile:
    """A block's tile: `panel` channels, `units` · 8 pixels of the width, `streams` parts of the column; a ring of
    `stages` of `rows` rows. `blocks` share a multiprocessor."""

    panel: int
    units: int
    streams: int
    rows: int
    stages: int
    blocks: int

    @property
    def warps(self) -> int:
        return ceildiv(self.units * self.streams, 2) * (self.panel // 16)

    def row_bytes(self, window: Window) -> int:
        """A row of all streams, in whole atoms of the swizzle."""
        return self.streams * ceildiv(window.span(8 * self.units, 1), 8) * 8 * 2 * self.panel

    def shared_bytes(self, window: Window) -> int:
        """The ring, what warps pass their sums through, and the barriers `full` and `empty` of each stage."""
        return self.stages * self.rows * self.row_bytes(window) + self.warps * _SUMS_BYTES + 2 * 8 * self.stages


def _live(window: Window) -> int:
    """Rows of results that a row of inputs belongs to, at most."""
    return (window.kernel[0] - 1) * window.dilation[0] // window.stride[0] + 1


def _registers(window: Window, sums: bool) -> int:
    """What a thread is known to need: sums, weights, addresses."""
    return 8 * _live(window) + 4 * window.kernel[0] * window.tap_pairs + 64 + (_SUM_REGISTERS if sums else 0)


@lru_cache(maxsize=1024)
def candidates(window: Window, shared_bytes: int, sums: bool = False) -> tuple[RowsTile, ...]:
    """The tiles that registers and shared memory have room for. `sums`: while they add up the pixels of images."""
    live, stride, every = _live(window), window.stride[0], ceildiv(window.output[1], 8)
    across = sorted({ceildiv(every, part) for part in range(1, every + 1)})
    found = []
    for panel, units, streams, rows, stages, blocks in product(
        (64, 32), across, (1, 2), sorted({stride, stride * live}), (2, 3, 4, 6), (1, 2, 3, 4)
    ):
        tile = RowsTile(panel, units, streams, rows, stages, blocks)
        if (panel > 32 and window.channels <= panel // 2) or window.span(8 * units, 1) > _LARGEST_BOX:
            continue
        # Several streams only where a unit would have no partner.
        if tile.warps > _MOST_WARPS or (streams > 1 and units % 2 == 0):
            continue
        # Registers are given to a block in four equal parts, one for each scheduler.
        if blocks * ceildiv(tile.warps, 4) * 128 * _registers(window, sums) > _REGISTERS:
            continue
        if tile.shared_bytes(window) <= share_of(shared_bytes, blocks):
            found.append(tile)
    return tuple(found)


def has_rows(step: Step, geometry: Geometry, context: Context) -> bool:
    """Whether the kernel can run a step."""
    if not context.architecture.wgmma or not is_depthwise_product(step, geometry, context):
        return False
    window, column = window_of(geometry), Column.of(geometry)
    lies = zip((geometry.images, *geometry.input), geometry.x_strides, strict=True)
    return (
        _live(window) * window.stride[0] <= _LONGEST_PERIOD
        and geometry.images > 0
        and all(stride > 0 for size, stride in lies if size > 1)
        and (geometry.images + _LONGEST_PERIOD) * column.pitch <= MAX_COUNT
        and bool(candidates(window, context.architecture.shared_bytes))
    )


def _parts(window: Window, tile: RowsTile, lines: int, multiprocessors: int) -> tuple[int, int, int]:
    """Panels and pieces of the width, blocks that share the column of each, and the rows of results of a stream."""
    wide = ceildiv(window.channels, tile.panel) * ceildiv(window.output[1], 8 * tile.units)
    sharing = max(1, max(1, multiprocessors) * tile.blocks // wide)
    outputs = ceildiv(lines, sharing * tile.streams)
    return wide, ceildiv(lines, outputs * tile.streams), outputs


# Instructions of a warp for a pair of taps and for a stage, and how many a multiprocessor issues a cycle.
_READ, _STAGE, _ISSUED = 3.1, 25.0, 0.72
_SUMMED = 4.0  # for a row whose pixels are added up, too: eight additions, and whether an image ends
# Cycles of a multiprocessor: the bytes of memory in one; a row of a box in the copy engine; the way of a row from
# memory; what one warp that waits for nobody takes for a row of inputs, a product, and a row of results; a launch with
# its first row. Fitted to 3,400 timings of 245 random convolutions on an H100: 14 % off in the root mean square, and
# the tile picked takes 4 % longer than the best one timed, on average.
_MEMORY_BYTES, _COPY = 14.1, 5.7
_LATENCY, _ALONE_READ, _ALONE_PRODUCT, _ALONE_ROW, _START = 1410.0, 87.0, 8.2, 457.0, 2620.0
_SHARPNESS = 2.56
# Panels of half a line of the L2 cache, where pixels do not begin at multiples of them: blocks of neighbouring panels
# meet in lines, which come from memory twice once a ring lets the blocks drift apart by more than some rows.
_TWICE, _DRIFT = 1.27, 11.2


def cycles(window: Window, tile: RowsTile, column: Column, multiprocessors: int, sums: bool = False) -> float:
    """Estimated time of the convolution in a tile. `sums`: with those over the pixels of images."""
    wide, sharing, outputs = _parts(window, tile, column.lines, multiprocessors)
    stride, across = window.stride[0], 8 * tile.units
    inputs = window.span(outputs, 0)  # rows that a stream goes through
    blocks, most = wide * sharing, max(1, multiprocessors) * tile.blocks
    resident = min(tile.blocks, ceildiv(blocks, max(1, multiprocessors)))
    reads = inputs * 2 * window.tap_pairs
    products = reads * window.kernel[0] / stride
    each = products + reads * _READ + (outputs * _SUMMED if sums else 0.0) + inputs / tile.rows * _STAGE
    streams, width = resident * tile.streams, window.span(across, 1)
    # Of pixels that a block goes through, those that there are.
    read = inputs * column.size[0] / column.pitch * min(width, column.size[1])
    written = outputs * stride * window.output[0] / column.pitch * window.output[1] / ceildiv(window.output[1], across)
    if _lines_are_shared(window, tile):
        read *= 1 + _TWICE * max(0.0, 1 - _DRIFT / (tile.rows * tile.stages))
    share = window.channels / (ceildiv(window.channels, tile.panel) * tile.panel)
    alone = inputs * _ALONE_READ + products * _ALONE_PRODUCT + outputs * _ALONE_ROW
    limits = (
        resident * tile.warps * each / _ISSUED,
        streams * inputs * width * _COPY,
        streams * 2 * tile.panel * share * (read + written) / _MEMORY_BYTES,
        inputs / (tile.rows * (tile.stages - 1)) * _LATENCY,
        alone,
    )
    # What is far from being the limit costs nothing, what is close to it something.
    return _START + ceildiv(blocks, most) * float(np.linalg.norm(limits, _SHARPNESS))


def _lines_are_shared(window: Window, tile: RowsTile) -> bool:
    return tile.panel == 32 < window.channels and window.channels % 32 > 0


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
    estimates = ((cycles(window, tile, column, multiprocessors, sums), tile) for tile in fitting)
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
        rival += step.outputs[0].nbytes / (_MEMORY_BYTES * max(1, context.multiprocessors))
    return tile if estimate < rival else None


@dataclass(frozen=True)
class ImageSums:
    """Where a launch leaves what it has added up: [images, parts · units, channels] in the step's workspace. A unit is
    eight pixels of the width; the parts of an image are the streams that have rows of it, as many as any image has."""

    parts: int
    units: int
    tensor: Tensor

    @classmethod
    def of(cls, geometry: Geometry, tile: RowsTile, context: Context) -> ImageSums:
        window, column = window_of(geometry), Column.of(geometry)
        _, _, outputs = _parts(window, tile, column.lines, context.multiprocessors)
        first = np.arange(window.images) * (column.pitch // window.stride[0])
        parts = int(np.max((first + window.output[0] - 1) // outputs - first // outputs)) + 1
        units = ceildiv(window.output[1], 8)
        shape = (window.images, parts * units, window.channels)
        return cls(parts, units, Tensor(workspace(4 * prod(shape)), DType.F32, shape, row_major(shape)))


def launch_rows(
    step: Step, geometry: Geometry, tile: RowsTile, context: Context, sums: ImageSums | None = None
) -> Launch:
    """The launch of a step that `has_rows` in the given tile. `sums`: it adds up the pixels of each image, too."""
    window, element = window_of(geometry), step.inputs[1].dtype
    column = Column.of(geometry)
    panels = ceildiv(window.channels, tile.panel)
    wide, sharing, outputs = _parts(window, tile, column.lines, context.multiprocessors)
    padded = panels * tile.panel
    packed = context.weights.packed(
        step.inputs[1], f"tap pairs c{padded}", lambda w: pack_tap_pairs(w.reshape(w.shape[0], *window.kernel), padded)
    )
    _, height, width = geometry.input
    (pixel_stride, row_stride), image_stride = pixel_strides(geometry, (width, height), (1, 1))
    pixels = TensorMap(
        geometry.x, width, window.channels, pixel_stride, window.span(8 * tile.units, 1), tile.panel,
        ((height, row_stride), (geometry.images, image_stride)),
    )  # fmt: skip
    added: dict[str, Argument] = {}
    if sums is not None:
        added = {"sums": pointer_to(sums.tensor), "sum_parts": sums.parts, "sum_units": sums.units}
    assert isinstance(step.op, Conv)
    return launch(
        "depthwise",
        "depthwise_rows.cuh",
        {
            "operand": STORAGE[element], "kernel_h": window.kernel[0], "kernel_w": window.kernel[1],
            "stride_h": window.stride[0], "stride_w": window.stride[1], "dilation_h": window.dilation[0],
            "dilation_w": window.dilation[1], "panel": tile.panel, "units": tile.units, "streams": tile.streams,
            "rows": tile.rows, "stages": tile.stages, "blocks": tile.blocks, "sums": sums is not None,
            "shared_bytes": tile.shared_bytes(window),
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
