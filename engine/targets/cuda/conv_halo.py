"""Convolutions at stride 1 of few channels on the warpgroup matrix units of sm_90a (conv_halo.cuh): which they are, in
which tile, and their launch. Called by `conv.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import hypot, prod

from engine.plan.plan import Step
from engine.targets.cuda.conv_geometry import Geometry
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
    is_constant,
    launch,
)
from engine.targets.cuda.tiles import ROUND_TRIP, Choice, Operands, late_fetches

PANEL_BYTES = 128  # of channels, what there is of a pixel
_MOST_PIXELS = 1024  # of one copy
MOST_BYTES = (1 << 20) - 1  # that a barrier counts
_MOST_PLACES = (1 << 30) - _MOST_PIXELS  # that `divisor_arguments` divides


@dataclass(frozen=True)
class HaloTile:
    """`m` places of the grid × `n` columns; a ring of `stages` halos. `swapped`: filters are the first operand."""

    m: int
    n: int
    stages: int
    swapped: bool = False

    @property
    def wide(self) -> int:
        """Columns of the instruction."""
        return self.m if self.swapped else self.n


TILES = tuple(
    HaloTile(m, n, stages, swapped)
    for n, m, stages, swapped in product((32, 64, 128), (128, 192, 256), (2, 3, 4), (False, True))
    if m * n <= 128 * 128 and (n >= 64 or not swapped)  # an instruction's first operand has 64 rows
)


@dataclass(frozen=True)
class Grid:
    """The places that output pixels are counted in: `width` in a line, `height` lines in an image. Output (y, x) has
    the place (y, x), and reads the pixels of that many places from there on."""

    height: int
    width: int
    images: int
    reach: tuple[int, int]
    """Lines and pixels from the first to the last kernel position."""

    @classmethod
    def of(cls, geometry: Geometry) -> Grid:
        (phase,) = geometry.phases
        sizes, reach = [], []
        for axis in (1, 2):
            along, size = phase.axes[axis], geometry.input[axis]
            reach.append((len(along.taps) - 1) * geometry.dilations[axis])
            # What is read behind the end of a line is the next one's padding: there is to be enough of it.
            behind = along.out - 1 + reach[-1] - along.pad - (size - 1)
            sizes.append(max(size + along.pad, size + behind, along.out))
        return cls(sizes[0], sizes[1], geometry.images, (reach[0], reach[1]))

    @property
    def places(self) -> int:
        return self.images * self.height * self.width

    def halo(self, tile: HaloTile) -> int:
        """Pixels under a tile, in whole swizzle atoms."""
        return ceildiv(tile.m + self.reach[0] * self.width + self.reach[1], 8) * 8

    def shared_bytes(self, tile: HaloTile, taps: int) -> int:
        """Filters, ring, and the barriers `full` and `empty` of each stage, `turn` of each consumer and `ready`."""
        return (taps * tile.n + tile.stages * self.halo(tile)) * PANEL_BYTES + 8 * (2 * tile.stages + 3)


def panel_channels(step: Step) -> int:
    """The channels that a halo has room for."""
    return PANEL_BYTES // step.inputs[1].dtype.itemsize


def has_halo(step: Step, geometry: Geometry) -> bool:
    """Whether the kernel can run a step: the pixels of its image `lies_alike`, with all their channels in one panel."""
    return geometry.channels <= panel_channels(step) and lies_alike(step, geometry)


def lies_alike(step: Step, geometry: Geometry) -> bool:
    """Whether the pixels of a step's image lie alike around every output, in a grid that the copy engine walks over."""
    if not suits(step, geometry) or geometry.axes > 2 or geometry.groups > 1 or not is_constant(step.inputs[1]):
        return False
    (phase,), grid = geometry.phases, Grid.of(geometry)
    lowest, highest, _ = REACH[2]
    along = zip(phase.axes[1:], geometry.input[1:], (grid.height, grid.width), strict=True)
    return (
        grid.places < _MOST_PLACES
        and all(geometry.strides[axis] == 1 or phase.axes[axis].out == 1 for axis in (1, 2))
        and all(
            axis.pad >= 0 and lowest <= -axis.pad and places - axis.pad - size <= highest
            for axis, size, places in along
        )
    )


def candidates(step: Step, geometry: Geometry, context: Context) -> Iterator[HaloTile]:
    """The tiles that fit shared memory."""
    grid, taps = Grid.of(geometry), prod(geometry.phases[0].kernel)
    for tile in TILES:
        fits = grid.shared_bytes(tile, taps) <= context.architecture.shared_bytes
        useful = (tile.n == 32 or tile.n // 2 < geometry.n) and taps * tile.n * PANEL_BYTES <= MOST_BYTES
        if fits and useful and grid.halo(tile) <= _MOST_PIXELS:
            yield tile


def pick(step: Step, geometry: Geometry, operands: Operands, context: Context) -> Choice[HaloTile] | None:
    """The tile that should be fastest, if the kernel can run the step."""
    choices = estimates(step, geometry, operands, context)
    return min(choices, key=lambda choice: choice.cycles, default=None)


def estimates(step: Step, geometry: Geometry, operands: Operands, context: Context) -> Iterator[Choice[HaloTile]]:
    """What every tile should take; nothing where the kernel cannot run the step."""
    if context.architecture.wgmma and operands is not Operands.EXACT and has_halo(step, geometry):
        for tile in candidates(step, geometry, context):
            yield Choice(tile, cycles(step, geometry, tile, context.multiprocessors))


def cycles(step: Step, geometry: Geometry, tile: HaloTile, multiprocessors: int) -> float:
    """Estimated cycles: as `tiles.wgmma_cycles`, fitted to 6 to 12 tiles of 9 layers of 32 to 64 channels at batch 1 to
    128 on an H100 (6 % off; the tile picked took 1 % longer than the best one on average, 4 % at worst)."""
    grid, taps = Grid.of(geometry), prod(geometry.phases[0].kernel)
    slowdown, l2_rate, memory_rate = 0.94 + 20 / tile.wide, 41, 1940
    # Transposed results go through another round of shuffles.
    epilogue, launch_cycles = 531 + (0.0212 if tile.swapped else 0.0095) * tile.m * tile.n, 1440
    columns, tiles = ceildiv(geometry.n, tile.n), ceildiv(grid.places, tile.m)
    rounds = ceildiv(tiles, max(1, multiprocessors // columns)) * ceildiv(columns, multiprocessors)
    multiply = taps * slowdown * tile.m * tile.n * 64 / 2048
    halo = grid.halo(tile) * PANEL_BYTES / l2_rate
    # One consumer's epilogue runs beside the other's product; with two stages a halo has one product to arrive in.
    step_cycles = max(multiply, halo if tile.stages > 2 else halo + 440)
    time = max(rounds * step_cycles + epilogue, ceildiv(rounds, 2) * (multiply + epilogue))
    filters = taps * tile.n * PANEL_BYTES / l2_rate + halo
    waiting = _late_fetches(step, geometry, tile) * ROUND_TRIP * ceildiv(rounds, 2)
    return launch_cycles + filters + hypot(time, step.cost.bytes / memory_rate) + waiting


def _late_fetches(step: Step, geometry: Geometry, tile: HaloTile) -> int:
    """How often a consumer waits for what the epilogue reads of a tile."""
    accumulators = tile.m * tile.n // 128  # of a lane
    room = (144 if tile.swapped else 156) - accumulators  # as in conv_halo.cuh
    groups, chunk = (tile.n // 64, 2) if tile.swapped else (tile.n // 32, 1)
    return late_fetches(epilogue_for(step, geometry.n).reads, accumulators // 8, groups, room, chunk)


def pixels_of(geometry: Geometry, grid: Grid, panel: int, halo: int) -> PixelMap:
    """The image as a copy walks through it: `panel` channels of `halo` pixels, in the order of the grid's places."""
    size_y, size_x = geometry.input[1:]
    pad_y, pad_x = geometry.phases[0].pads[1:]
    strides, image_stride = pixel_strides(geometry, (size_x, size_y), (1, 1))
    return PixelMap(
        geometry.x, geometry.channels, geometry.images, image_stride, (size_x, size_y), strides,
        (-pad_x, -pad_y), (grid.width - pad_x - size_x, grid.height - pad_y - size_y), (1, 1), panel, halo,
    )  # fmt: skip


def grid_arguments(geometry: Geometry, grid: Grid) -> dict[str, int]:
    """What a kernel has to know of the grid, of the output pixels in it, and of the way from one kernel position to the
    next (epilogue/grid_places.cuh, conv_halo.cuh)."""
    (phase,) = geometry.phases
    pad_y, pad_x = phase.pads[1:]
    return {
        "grid_h": grid.height, "grid_w": grid.width,
        **divisor_arguments("grid_h", grid.height), **divisor_arguments("grid_w", grid.width),
        "out_h": phase.out[1], "out_w": phase.out[2], "pad_h": pad_y, "pad_w": pad_x, "kernel_w": phase.kernel[2],
        "tap_line": geometry.dilations[1] * grid.width, "tap_pixel": geometry.dilations[2],
    }  # fmt: skip


def divisor_arguments(name: str, divisor: int) -> dict[str, int]:
    """n // divisor = n · factor >> shift for n below 2³⁰: the factor is less than 1 too large, n ≤ 2^shift / divisor.
    It fits an i32."""
    shift = 30 + (divisor - 1).bit_length()
    return {f"{name}_factor": ceildiv(1 << shift, divisor), f"{name}_shift": shift}


def launch_halo(step: Step, geometry: Geometry, filters: Pointer, tile: HaloTile, context: Context) -> Launch:
    """The launch in the given tile. `filters`: packed for panels of `panel_channels`."""
    dtype, grid = step.inputs[1].dtype, Grid.of(geometry)
    panel, halo, taps = panel_channels(step), grid.halo(tile), prod(geometry.phases[0].kernel)
    columns, tiles = ceildiv(geometry.n, tile.n), ceildiv(grid.places, tile.m)
    return launch(
        "conv",
        "conv_halo.cuh",
        {"tile_m": tile.m, "tile_n": tile.n, "stages": tile.stages, "swapped": tile.swapped, "operand": STORAGE[dtype]},
        [epilogue_for(step, geometry.n)],
        {
            "map_a": pixels_of(geometry, grid, panel, halo),
            "map_b": TensorMap(filters, geometry.n, taps * panel, taps * panel, tile.n, panel),
            "tiles": tiles, "n": geometry.n, "images": geometry.images, "taps": taps,
            "halo_bytes": halo * PANEL_BYTES, **grid_arguments(geometry, grid),
        },
        (min(tiles, max(1, context.multiprocessors // columns)), columns, 1),
        384,
        grid.shared_bytes(tile, taps),
        Instruction.WGMMA,
        helpers=f'#include "ptx/wgmma.cuh"\n{wgmma_function(tile.wide, dtype)}',
    )  # fmt: skip
