"""Convolutions at stride 1 of many channels on the warpgroup matrix units of sm_90a, whose pixels come once for all
kernel positions (conv_halo_deep.cuh): which they are, in which tile, and their launch. Called by `conv.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import hypot, prod

from engine.plan.plan import Step
from engine.targets.cuda.conv_geometry import Geometry, row_length
from engine.targets.cuda.conv_halo import Grid, grid_arguments, lies_alike, pixels_of
from engine.targets.cuda.conv_simt import epilogue_for
from engine.targets.cuda.gemm_wgmma import wgmma_function
from engine.targets.cuda.kernel import (
    STORAGE,
    Context,
    Instruction,
    Launch,
    Pointer,
    TensorMap,
    ceildiv,
    launch,
)
from engine.targets.cuda.tiles import ROUND_TRIP, Choice, Operands, late_fetches

_MOST_PIXELS = 1024  # of one copy
_CONSUMERS = 2
_TWO_HALOS, _FEW_FILTERS = 1.02, 0.05
"""What rings cost that are short: of two halos, and for each box of filters below four. 17 layers of ResNet-50 and
VGG-16 at batch 1 to 128 on an H100 (two halos 0 to 6 %, three boxes 0 to 4 %, two of them 3 to 17 %)."""


@dataclass(frozen=True)
class DeepTile:
    """`m` places of the grid × `n` columns; rings of `halos` and of `stages` boxes of filters, whose rows have
    `panel_bytes` of channels. `swapped`: filters are the first operand."""

    m: int
    n: int
    halos: int
    stages: int
    swapped: bool = False
    panel_bytes: int = 128

    @property
    def wide(self) -> int:
        """Columns of the instruction."""
        return self.m if self.swapped else self.n

    @property
    def parts(self) -> int:
        """Instructions of 64 rows of a consumer."""
        return (self.n if self.swapped else self.m) // (64 * _CONSUMERS)

    def halo(self, grid: Grid) -> int:
        """Pixels under the tile, in whole atoms of the swizzle."""
        return ceildiv(self.m + grid.reach[0] * grid.width + grid.reach[1], 8) * 8

    def shared_bytes(self, grid: Grid) -> int:
        """Both rings, and the barriers `full` and `empty` of each of their stages."""
        rows = self.stages * self.n + self.halos * self.halo(grid)
        return rows * self.panel_bytes + 2 * 8 * (self.stages + self.halos)


SHAPES = (
    *((m, 128, True) for m in (96, 128, 160, 192, 224, 256)),
    (128, 64, False), (128, 96, False), (128, 160, False), (128, 192, False), (128, 256, False),
    (256, 64, False), (256, 96, False), (256, 128, False),
)  # fmt: skip


def has_deep_halo(step: Step, geometry: Geometry) -> bool:
    """Whether the kernel can run a step: more than one kernel position, since it brings pixels for several."""
    return lies_alike(step, geometry) and prod(geometry.phases[0].kernel) > 1


def candidates(step: Step, geometry: Geometry, context: Context) -> Iterator[DeepTile]:
    """The tiles that fit shared memory, with as many boxes of filters as that has room for."""
    grid, itemsize = Grid.of(geometry), step.inputs[1].dtype.itemsize
    panels = [128]
    if row_length(geometry.channels, 64 // itemsize) % (128 // itemsize):
        panels.append(64)  # the last panel of 128 bytes would be half empty
    for (m, n, swapped), halos, panel_bytes in product(SHAPES, (2, 3), panels):
        tile = DeepTile(m, n, halos, 2, swapped, panel_bytes)
        left = context.architecture.shared_bytes - tile.shared_bytes(grid)
        if left < 0 or tile.halo(grid) > _MOST_PIXELS or (n > 64 and n // 2 >= geometry.n):
            continue
        more = left // (n * panel_bytes + 16)
        yield DeepTile(m, n, halos, min(12, 2 + more), swapped, panel_bytes)


def pick(step: Step, geometry: Geometry, operands: Operands, context: Context) -> Choice[DeepTile] | None:
    """The tile that should be fastest, if the kernel can run the step."""
    return min(estimates(step, geometry, operands, context), key=lambda choice: choice.cycles, default=None)


def estimates(step: Step, geometry: Geometry, operands: Operands, context: Context) -> Iterator[Choice[DeepTile]]:
    """What every tile should take; nothing where the kernel cannot run the step."""
    if context.architecture.wgmma and operands is not Operands.EXACT and has_deep_halo(step, geometry):
        for tile in candidates(step, geometry, context):
            yield Choice(tile, cycles(step, geometry, tile, context.multiprocessors))


def cycles(step: Step, geometry: Geometry, tile: DeepTile, multiprocessors: int) -> float:
    """Estimated cycles. The constants are fitted to 3,300 timings of 117 random layers on an H100 (the best tiles of a
    layer within 8 %), on the scale of `tiles.GATHERED`, with which these compete."""
    grid, taps = Grid.of(geometry), prod(geometry.phases[0].kernel)
    channels = row_length(geometry.channels, tile.panel_bytes // step.inputs[1].dtype.itemsize)
    panels = channels * step.inputs[1].dtype.itemsize // tile.panel_bytes
    columns, tiles = ceildiv(geometry.n, tile.n), ceildiv(grid.places, tile.m)
    sharing = max(1, multiprocessors // columns)
    rounds = ceildiv(tiles, sharing) * ceildiv(columns, multiprocessors)
    multiply = (0.951 + 7.36 / tile.wide) * tile.m * tile.n * tile.panel_bytes / 2 / 2048
    # A halo and the filters of its panel arrive while the panel before is multiplied.
    copies = (tile.halo(grid) * 7.2 + taps * tile.n * 0.51) * tile.panel_bytes / 128
    panel = max(taps * max(multiply, 333), copies)
    epilogue = 1148 + (0.043 if tile.swapped else 0.021) * tile.m * tile.n
    accumulators = tile.parts * tile.wide // 2  # of a lane
    room, chunk = (140, 2) if tile.swapped else (132, 1)  # as in conv_halo_deep.cuh
    groups = tile.parts if tile.swapped else tile.n // 32
    reads = epilogue_for(step, geometry.n).reads
    late = late_fetches(reads, accumulators // 8, groups, room - accumulators, chunk) * ROUND_TRIP * rounds
    rings = _TWO_HALOS if tile.halos == 2 else 1 + _FEW_FILTERS * max(0, 4 - tile.stages)
    time = rings * rounds * (panels * panel + 0.8 * epilogue)
    return 2290 + hypot(time, step.cost.bytes / 1196) + late


def panel_channels(tile: DeepTile, step: Step) -> int:
    """The channels that a copy brings of each pixel."""
    return tile.panel_bytes // step.inputs[1].dtype.itemsize


def launch_deep(step: Step, geometry: Geometry, filters: Pointer, tile: DeepTile, context: Context) -> Launch:
    """The launch in the given tile. `filters`: packed for panels of `panel_channels`."""
    dtype, grid = step.inputs[1].dtype, Grid.of(geometry)
    panel, halo, taps = panel_channels(tile, step), tile.halo(grid), prod(geometry.phases[0].kernel)
    padded = row_length(geometry.channels, panel)
    columns, tiles = ceildiv(geometry.n, tile.n), ceildiv(grid.places, tile.m)
    return launch(
        "conv",
        "conv_halo_deep.cuh",
        {
            "tile_m": tile.m, "tile_n": tile.n, "halos": tile.halos, "stages": tile.stages, "swapped": tile.swapped,
            "panel_bytes": tile.panel_bytes, "operand": STORAGE[dtype],
        },
        [epilogue_for(step, geometry.n)],
        {
            "map_a": pixels_of(geometry, grid, panel, halo),
            "map_b": TensorMap(filters, geometry.n, taps * padded, taps * padded, tile.n, panel),
            "tiles": tiles, "n": geometry.n, "images": geometry.images, "taps": taps, "padded": padded,
            "steps": taps * padded // panel, "halo_bytes": halo * tile.panel_bytes,
            **grid_arguments(geometry, grid),
        },
        (min(tiles, max(1, context.multiprocessors // columns)), columns, 1),
        384,
        tile.shared_bytes(grid),
        Instruction.WGMMA,
        helpers=f'#include "ptx/wgmma.cuh"\n{wgmma_function(tile.wide, dtype)}',
    )  # fmt: skip
