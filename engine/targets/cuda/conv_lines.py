"""Convolutions at stride 1 of few channels on the warpgroup matrix units of sm_90a that store the maxima of windows of
2 × 2 sums (conv_lines.cuh): which they are, in which tile, and their launch. Called by `conv_max.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import hypot, prod

from engine.plan.plan import Step
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_halo import MOST_BYTES, PANEL_BYTES, panel_channels
from engine.targets.cuda.conv_simt import epilogue_for
from engine.targets.cuda.conv_wgmma import REACH, pixel_strides, suits
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
)
from engine.targets.cuda.tiles import Choice

COLUMNS = 64  # of a tile
_MOST_PIXELS = 256  # of a line in shared memory
_WIDTHS = (128, 112, 96, 80, 64, 48, 32)
_STAGES = (2, 3, 4)


@dataclass(frozen=True)
class LinesTile:
    """`wide` pixels of two lines × 64 columns; a ring of `stages` tiles' pixels."""

    wide: int
    stages: int


@dataclass(frozen=True)
class _Lines:
    """The pixels under a tile: so many of `count` lines, each of which takes `step` bytes of shared memory."""

    count: int
    pixels: int

    @classmethod
    def of(cls, geometry: Geometry, tile: LinesTile) -> _Lines:
        (phase,) = geometry.phases
        _, down, across = ((size - 1) * d for size, d in zip(phase.kernel, geometry.dilations, strict=True))
        return cls(2 + down, tile.wide + across)

    @property
    def step(self) -> int:
        """Whole swizzle atoms."""
        return ceildiv(self.pixels, 8) * 8 * PANEL_BYTES

    def shared_bytes(self, tile: LinesTile, taps: int) -> int:
        """Filters, ring, and the barriers `full` and `empty` of each stage, `turn` of each consumer and `ready`."""
        filters = taps * COLUMNS * PANEL_BYTES
        return filters + tile.stages * self.count * self.step + 8 * (2 * tile.stages + 3)


def _across(geometry: Geometry, tile: LinesTile) -> int:
    """The tiles along a line, of whole windows."""
    return ceildiv(geometry.output[2] // 2 * 2, tile.wide)


def _corners(geometry: Geometry, tile: LinesTile) -> tuple[int, int]:
    """The upper corners of the walk along x and y: all lines' pixels lie within."""
    (phase,), lines = geometry.phases, _Lines.of(geometry, tile)
    last_x = (_across(geometry, tile) - 1) * tile.wide - phase.pads[2] + lines.pixels - 1
    last_y = geometry.output[1] // 2 * 2 - 2 - phase.pads[1] + lines.count - 1
    return last_x - (geometry.input[2] - 1), last_y - (geometry.input[1] - 1)


def _takes(step: Step, geometry: Geometry) -> bool:
    """Whether the copy engine can bring the lines of an image, with all their channels in one panel."""
    (phase,) = geometry.phases
    lowest, _, _ = REACH[2]
    return (
        suits(step, geometry)
        and geometry.axes == 2
        and geometry.channels <= panel_channels(step)
        and geometry.strides == (1, 1, 1)
        and all(0 <= pad <= -lowest for pad in phase.pads)
    )


def estimates(step: Step, geometry: Geometry, context: Context) -> Iterator[Choice[LinesTile]]:
    """What every tile that fits should take; nothing where the kernel cannot run the step."""
    if not _takes(step, geometry):
        return
    taps, (lowest, highest, _) = prod(geometry.phases[0].kernel), REACH[2]
    for wide in _WIDTHS:
        for stages in _STAGES:
            tile = LinesTile(wide, stages)
            lines = _Lines.of(geometry, tile)
            fits = lines.shared_bytes(tile, taps) <= context.architecture.shared_bytes
            counts = max(taps * COLUMNS * PANEL_BYTES, lines.count * lines.pixels * PANEL_BYTES) <= MOST_BYTES
            walks = all(lowest <= corner <= highest for corner in _corners(geometry, tile))
            if fits and counts and walks and lines.pixels <= _MOST_PIXELS:
                yield Choice(tile, _cycles(step, geometry, tile, context.multiprocessors))


def _tiles(geometry: Geometry, tile: LinesTile) -> int:
    return geometry.images * (geometry.output[1] // 2) * _across(geometry, tile)


def _cycles(step: Step, geometry: Geometry, tile: LinesTile, multiprocessors: int) -> float:
    """Estimated cycles: the rates of `conv_halo.cycles`, which are not fitted to these tiles: of 64 channels at 224
    pixels and batch 128 they say 640 µs, and an H100 took 595 to 712 in the tiles that there are."""
    taps, lines = prod(geometry.phases[0].kernel), _Lines.of(geometry, tile)
    slowdown, l2_rate, memory_rate, launch_cycles = 0.94 + 20 / tile.wide, 41, 1940, 1440
    columns, tiles = ceildiv(geometry.n, COLUMNS), _tiles(geometry, tile)
    rounds = ceildiv(tiles, max(1, multiprocessors // columns)) * ceildiv(columns, multiprocessors)
    multiply = taps * slowdown * 2 * tile.wide * COLUMNS * 64 / 2048
    epilogue = 531 + 0.0212 * tile.wide * COLUMNS
    copied = lines.count * lines.pixels * PANEL_BYTES / l2_rate
    step_cycles = max(multiply, copied if tile.stages > 2 else copied + 440)
    time = max(rounds * step_cycles + epilogue, ceildiv(rounds, 2) * (multiply + epilogue))
    filters = taps * COLUMNS * PANEL_BYTES / l2_rate + copied
    return launch_cycles + filters + hypot(time, step.cost.bytes / memory_rate)


def launch_lines(step: Step, geometry: Geometry, filters: Pointer, tile: LinesTile, context: Context) -> Launch:
    """The launch in the given tile. `filters`: packed for panels of `panel_channels`."""
    dtype, (phase,), panel = step.inputs[1].dtype, geometry.phases, panel_channels(step)
    lines, taps, tiles = _Lines.of(geometry, tile), prod(phase.kernel), _tiles(geometry, tile)
    columns, (_, size_y, size_x), (_, pad_y, pad_x) = ceildiv(geometry.n, COLUMNS), geometry.input, phase.pads
    strides, image_stride = pixel_strides(geometry, (size_x, size_y), (1, 1))
    pixels = PixelMap(
        geometry.x, geometry.channels, geometry.images, image_stride, (size_x, size_y), strides,
        (-pad_x, -pad_y), _corners(geometry, tile), (1, 1), panel, lines.pixels,
    )  # fmt: skip
    return launch(
        "conv",
        "conv_lines.cuh",
        {"wide": tile.wide, "stages": tile.stages, "operand": STORAGE[dtype]},
        [epilogue_for(step, geometry.n)],
        {
            "map_a": pixels,
            "map_b": TensorMap(filters, geometry.n, taps * panel, taps * panel, COLUMNS, panel),
            "tiles": tiles, "n": geometry.n, "taps": taps, "kernel_w": phase.kernel[2],
            "dilation_h": geometry.dilations[1], "dilation_w": geometry.dilations[2],
            "across": _across(geometry, tile), "out_h": geometry.output[1] // 2, "out_w": geometry.output[2] // 2,
            "pad_h": pad_y, "pad_w": pad_x, "lines": lines.count, "line_bytes": lines.pixels * PANEL_BYTES,
            "line_step": lines.step, "stage_bytes": lines.count * lines.step,
        },
        (min(tiles, max(1, context.multiprocessors // columns)), columns, 1),
        384,
        lines.shared_bytes(tile, taps),
        Instruction.WGMMA,
        helpers=f'#include "ptx/wgmma.cuh"\n{wgmma_function(tile.wide, dtype)}',
    )  # fmt: skip
