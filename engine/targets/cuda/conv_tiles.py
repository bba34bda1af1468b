"""The tiles of every kernel that a convolution can run in, from what should be the fastest on, and the one that it
takes: what was the fastest on the device where the tuner has timed them (conv_choices.py), else the first. Called by
`conv.py`, `conv_mean.py`, `conv_excitation.py` and `tunables.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from engine.plan.plan import Step
from engine.targets.cuda import conv_halo, conv_halo_deep, conv_stem, conv_wgmma, depthwise, depthwise_rows
from engine.targets.cuda.conv_choices import T, chosen_among, key_of
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_halo import HaloTile
from engine.targets.cuda.conv_halo_deep import DeepTile
from engine.targets.cuda.conv_stem import StemTile
from engine.targets.cuda.depthwise import DepthwiseTile
from engine.targets.cuda.depthwise_tiles import RowsTile
from engine.targets.cuda.kernel import Context, is_constant
from engine.targets.cuda.tiles import MOST_SPLITS, Choice, Operands, Tile, WgmmaTile, mma_cycles, mma_tiles

ImplicitTile: TypeAlias = Tile | HaloTile | DeepTile

_GATHERING = 1.85
"""The time of conv_mma.cuh beside what `mma_cycles` estimates of a product of the same sizes: typical of 24 layers of
ResNet-50 and VGG-16 on an H100 (1.4 to 3.6)."""


def implicit_tiles(step: Step, geometry: Geometry, operands: Operands, context: Context) -> list[Choice[ImplicitTile]]:
    """The tiles of an implicit product: those of blocks in pairs last, which are taken where the tuner has found them
    to be faster."""
    # The filters that a launch has just packed lie where the sums of a split product would.
    splits = MOST_SPLITS if is_constant(step.inputs[1]) else 1
    m, n, k, batch = geometry.rows, geometry.n, geometry.phases[0].k, geometry.groups * len(geometry.phases)
    every: list[Choice[ImplicitTile]] = [
        Choice(tile, _GATHERING * mma_cycles(m, n, k, batch, tile, context.multiprocessors, operands))
        for tile in mma_tiles(m, n, k, batch, context.architecture, operands, splits)
    ]
    every += conv_wgmma.estimates(step, geometry, operands, splits, context)
    every += conv_halo.estimates(step, geometry, operands, context)
    every += conv_halo_deep.estimates(step, geometry, operands, context)
    return sorted(every, key=lambda choice: (_is_pair(choice.tile), choice.cycles))


def _is_pair(tile: ImplicitTile) -> bool:
    """Those of two blocks, whose gain the estimates do not know."""
    return isinstance(tile, WgmmaTile) and tile.cluster > 1 and tile.cluster_k == 1


def depthwise_tiles(step: Step, geometry: Geometry, context: Context) -> list[Choice[DepthwiseTile | RowsTile]]:
    """The tiles of a convolution that `is_depthwise_product`."""
    window, shared_bytes = depthwise.window_of(geometry), context.architecture.shared_bytes
    every: list[Choice[DepthwiseTile | RowsTile]] = [
        Choice(tile, depthwise.cycles(window, tile, context.multiprocessors))
        for tile in depthwise.best_tiles(window, shared_bytes, context.multiprocessors)
    ]
    if depthwise_rows.has_rows(step, geometry, context):
        every += (Choice(tile, cycles) for cycles, tile in depthwise_rows.ranked(step, geometry, context))
    return sorted(every, key=lambda choice: choice.cycles)


def summed_tiles(bare: Step, geometry: Geometry, context: Context) -> list[Choice[RowsTile]]:
    """The tiles in which a depthwise convolution also adds up the pixels of images; none where another pass over its
    result should be faster, or no kernel can."""
    if not bare.outputs[0].elements or depthwise_rows.pick(bare, geometry, context, sums=True) is None:
        return []
    return [Choice(tile, cycles) for cycles, tile in depthwise_rows.ranked(bare, geometry, context, sums=True)]


def stem_tiles(geometry: Geometry, context: Context) -> list[Choice[StemTile]]:
    """The tiles of a convolution that `is_stem`."""
    return [Choice(tile, cycles) for cycles, tile in conv_stem.ranked(geometry, context)]


def taken(ranked: Sequence[Choice[T]], step: Step, bare: Step, context: Context) -> T:
    """The tile that a step takes of those that it can run in, one at least. `bare`: see `key_of`."""
    return chosen(ranked, key_of(step, bare, context), context)


def chosen(ranked: Sequence[Choice[T]], key: str, context: Context) -> T:
    """The same, by what names the step among the choices."""
    choice = context.choices.get(key)
    timed = None if choice is None else chosen_among([one.tile for one in ranked], choice)
    return ranked[0].tile if timed is None else timed
