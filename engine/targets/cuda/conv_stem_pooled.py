"""The first convolution of a network with the max pool behind it, over windows of 3 × 3 pixels that are two apart
(conv_stem_pooled.cuh): which they are, in which tile, and their launch. Called by `conv_max.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.ir.ops import ConvMax
from engine.plan.plan import Step
from engine.targets.cuda.architecture import share_of
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_stem import (
    BYTES,
    LATENCY,
    column_blocks,
    copying_cycles,
    is_stem,
    warpgroup_cycles,
)
from engine.targets.cuda.kernel import Context, Launch, ceildiv
from engine.targets.cuda.stem_operands import WARPS, Pairs, Window, launch_windows, pairs_of
from engine.targets.cuda.tiles import Choice

_STRIP, _STRIP_WINDOWS = 16, 7  # pixels of a warp, and the windows that lie in them
_ACROSS = WARPS * _STRIP_WINDOWS
_BLOCKS = {8: (3, 2), 4: (5, 3)}
"""How many blocks share a multiprocessor, by the 8-column blocks of their tiles, as registers allow."""
_MOST_STEPS = 12  # whose operands a lane has registers for
_WINDOWS = (14, 8, 7, 4, 2, 1)


@dataclass(frozen=True)
class PooledStemTile:
    """A block's tile: 28 windows beside each other, `windows` of them one below the other, and 8 · `n_blocks` output
    channels. `blocks` blocks share a multiprocessor."""

    windows: int
    n_blocks: int
    blocks: int

    @property
    def rows(self) -> int:
        """Lines of sums."""
        return 2 * self.windows + 1

    def window(self, geometry: Geometry, pairs: Pairs) -> Window:
        """The input under it."""
        return Window.under(geometry, pairs, self.rows, 2 * _STRIP_WINDOWS * (WARPS - 1) + _STRIP)


def is_threes(op: ConvMax) -> bool:
    """Whether the pool is one of 3 × 3 pixels, two apart, with at most one of padding."""
    pool = op.pool
    return pool.kernel == (3, 3) and pool.strides == (2, 2) and all(begin in (0, 1) for begin, _ in pool.pads)


def estimates(step: Step, bare: Step, geometry: Geometry, context: Context) -> Iterator[Choice[PooledStemTile]]:
    """What every tile that fits should take; nothing where the kernel cannot run the step. `bare`: the convolution
    alone."""
    pairs = pairs_of(geometry, wgmma=True)
    if not context.architecture.wgmma or pairs is None or pairs.steps > _MOST_STEPS or geometry.axes != 2:
        return
    if not is_stem(bare, geometry, context):
        return
    n_blocks = column_blocks(geometry.n)
    for blocks in _BLOCKS[n_blocks]:
        room = share_of(context.architecture.shared_bytes, blocks)
        for windows in _WINDOWS:
            tile = PooledStemTile(windows, n_blocks, blocks)
            fits = tile.window(geometry, pairs).shared_bytes(pairs, n_blocks) <= room
            if fits and windows < 2 * step.outputs[0].shape[2]:
                yield Choice(tile, _cycles(step, geometry, pairs, tile, context.multiprocessors))


def _tiles(step: Step, tile: PooledStemTile) -> int:
    images, _, height, width = step.outputs[0].shape
    return images * ceildiv(height, tile.windows) * ceildiv(width, _ACROSS)


def _cycles(step: Step, geometry: Geometry, pairs: Pairs, tile: PooledStemTile, multiprocessors: int) -> float:
    """Estimated time in a tile: as that of conv_stem.py, with 32 shuffles a lane and line of windows."""
    tiles, slabs = _tiles(step, tile), ceildiv(geometry.n, 8 * tile.n_blocks)
    work = tile.rows * warpgroup_cycles(pairs.steps, tile.n_blocks) + tile.windows * 32 * tile.n_blocks
    copied = copying_cycles(geometry, tile.window(geometry, pairs))
    stored = tile.windows * _ACROSS * min(8 * tile.n_blocks, geometry.n) * 2 / BYTES
    share, alone = max(work, stored) + copied, work + copied + LATENCY
    rounds = ceildiv(tiles, max(1, multiprocessors * tile.blocks // slabs))
    resident = min(tile.blocks, ceildiv(tiles * slabs, multiprocessors))
    return rounds * max(resident * share, alone) + alone / 2


def launch_pooled(step: Step, geometry: Geometry, tile: PooledStemTile, context: Context) -> Launch:
    """The launch in one of the tiles that fit. `geometry`: of the convolution alone."""
    op, pairs = step.op, pairs_of(geometry, wgmma=True)
    assert isinstance(op, ConvMax)
    assert pairs is not None
    (above, _), (before, _) = op.pool.pads
    sizes = {"rows": tile.rows, "units": _ACROSS * 2 // 8, "windows": tile.windows, "n_blocks": tile.n_blocks}
    _, _, height, width = step.outputs[0].shape
    return launch_windows(
        step, geometry, context, "conv_stem_pooled.cuh", pairs, tile.window(geometry, pairs), sizes,
        _tiles(step, tile), tile.blocks,
        {"windows_h": height, "windows_w": width, "above": above, "before": before},
    )  # fmt: skip
