"""The first convolution of a network: an image with few channels, read as it comes, on the matrix units
(conv_stem.cuh, conv_stem_wgmma.cuh). Called by `conv.py`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.targets.cuda.architecture import Architecture, share_of
from engine.targets.cuda.conv_geometry import AXES, Geometry
from engine.targets.cuda.kernel import Context, Launch, ceildiv, is_constant
from engine.targets.cuda.stem_operands import WARPS, Pairs, Window, launch_windows, pairs_of

_MOST_CHANNELS = 4
_MOST_SLABS = 6  # of output channels: each of them reads the whole image
_FRAGMENTS = 2  # of 16 pixels, that a warp takes at a time
_BLOCKS = {8: 4, 4: 5}
"""How many blocks share a multiprocessor at most, by the 8-column blocks of their tiles, as registers allow: some bring
their windows while others multiply. On an H100 five images take 3 to 5 % less than with three blocks and 64 columns, 7
to 16 less than with three blocks, 32 columns and four fragments."""
_MOST_UNITS = 28  # of eight pixels side by side in a tile


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

    def window(self, geometry: Geometry, pairs: Pairs) -> Window:
        return Window.under(geometry, pairs, self.rows, 8 * self.units)


def column_blocks(n: int) -> int:
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
    n_blocks = column_blocks(geometry.n)
    across = ceildiv(every, _MOST_UNITS)
    shapes = [
        (rows, ceildiv(every, parts))
        for parts, rows in product((across, 2 * across, 4 * across), (8, 4, 2, 1))
        if rows < 2 * height and parts <= every
    ]
    for blocks in range(_BLOCKS[n_blocks], 0, -1):
        room = share_of(architecture.shared_bytes, blocks)
        tiles = [StemTile(rows, units, n_blocks, blocks, wgmma) for rows, units in shapes]
        fitting = [tile for tile in tiles if tile.window(geometry, pairs).shared_bytes(pairs, n_blocks) <= room]
        if fitting:
            return fitting
    return []


# Of an H100, in cycles of a multiprocessor: a step of mma.sync for a 16×8 block, with the reads of its operands; its
# share of the memory's 3 TB/s in bytes a cycle; loading and converting an input; the way of a first input from memory.
# Fitted to 45 timings of five images (8 % off; the best estimate's tile took 4 % longer than the best one).
_MMA, BYTES, _INPUT, LATENCY = 2.4, 13, 0.15, 3400
_WGMMA, _WAIT = 1.1, 120
"""The same of a step of wgmma for 16 pixels, and until its operands are read and its sums there: typical of 18 timings
of six images on an H100."""


def warpgroup_cycles(steps: int, n_blocks: int) -> float:
    """Estimated time of a product of 64 pixels on wgmma."""
    return 4 * steps * n_blocks * _WGMMA + _WAIT


def copying_cycles(geometry: Geometry, window: Window) -> float:
    """Estimated time in which a block brings its window."""
    inputs = window.elements * geometry.channels
    return inputs * (_INPUT + geometry.x_dtype.itemsize / (3 * BYTES))


def _cycles(geometry: Geometry, tile: StemTile, multiprocessors: int) -> float:
    """Estimated time of the convolution in a tile."""
    pairs = pairs_of(geometry, tile.wgmma)
    assert pairs is not None
    height, width = geometry.output[1:]
    tiles = geometry.images * ceildiv(height, tile.rows) * ceildiv(ceildiv(width, 8), tile.units)
    count = tiles * ceildiv(geometry.n, tile.columns)
    pixels = 8 * tile.rows * tile.units
    if tile.wgmma:
        items, item = ceildiv(pixels, 64), warpgroup_cycles(pairs.steps, tile.n_blocks) + 16 * tile.n_blocks
        alone = items * item
    else:
        items, item = tile.items, _FRAGMENTS * (pairs.steps * tile.n_blocks * _MMA + 4 * tile.n_blocks)
        alone = ceildiv(items, WARPS) * WARPS * item
    copied = copying_cycles(geometry, tile.window(geometry, pairs))
    stored = pixels * min(tile.columns, geometry.n) * 2 / BYTES
    share = max(items * item, stored) + copied  # of the multiprocessor's time
    alone += copied + LATENCY
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
        and ceildiv(geometry.n, 8 * column_blocks(geometry.n)) <= _MOST_SLABS
        and pick_tile(geometry, context) is not None
    )


def launch_stem(step: Step, geometry: Geometry, context: Context, tile: StemTile | None = None) -> Launch:
    """The launch of a convolution that `is_stem`, in a given tile or the one that should be fastest."""
    tile = tile or pick_tile(geometry, context)
    assert tile is not None
    pairs = pairs_of(geometry, tile.wgmma)
    assert pairs is not None
    body = "conv_stem_wgmma.cuh" if tile.wgmma else "conv_stem.cuh"
    sizes = {"rows": tile.rows, "units": tile.units, "n_blocks": tile.n_blocks}
    fragments = {} if tile.wgmma else {"fragments": _FRAGMENTS}
    tiles = geometry.images * ceildiv(geometry.output[1], tile.rows) * ceildiv(geometry.output[2], 8 * tile.units)
    window = tile.window(geometry, pairs)
    return launch_windows(step, geometry, context, body, pairs, window, {**sizes, **fragments}, tiles, tile.blocks, {})
