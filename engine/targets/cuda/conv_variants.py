"""The ways in which a convolution could run beside the one that `conv.py` takes: what a sweep times, to measure a
kernel or to fit its cost model (``python -m benchmarks tiles``). Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from engine.ir.ops import Conv, ConvMax
from engine.plan.plan import Step
from engine.targets.cuda import conv_halo, conv_halo_deep, conv_max, conv_wgmma, depthwise, depthwise_rows
from engine.targets.cuda.conv import lower, lower_in, operands_of
from engine.targets.cuda.conv_choices import ConvTile
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.kernel import Context, Launch, is_constant
from engine.targets.cuda.tiles import MOST_SPLITS, Operands

Ranked = TypeVar("Ranked")


@dataclass(frozen=True)
class Variant:
    """One way. `cycles`: what its model estimates, if it has one."""

    name: str
    cycles: float | None
    launches: tuple[Launch, ...]


def variants(step: Step, context: Context, most: int) -> list[Variant]:
    """The present way first, then up to `most` tiles of each kernel: half of them what its model ranks first, the
    others from the whole ranking, so that a model can be fitted to their times."""
    if isinstance(step.op, ConvMax):
        return [Variant("present", None, tuple(conv_max.lower(step, context))), *_maxima(step, context, most)]
    assert isinstance(step.op, Conv)
    geometry = Geometry(step)
    present = Variant("present", None, tuple(lower(step, context)))
    if depthwise.is_depthwise_product(step, geometry, context):
        return [present, *_depthwise(step, geometry, context, most)]
    return [present, *_products(step, geometry, context, most)]


def _maxima(step: Step, context: Context, most: int) -> Iterator[Variant]:
    """Maxima of windows, and the convolution and the pool apart."""
    geometry = Geometry(conv_max.unpooled(step))
    ranked = sorted(conv_max.estimates(step, geometry, context), key=lambda choice: choice.cycles)
    for kind in dict.fromkeys(type(choice.tile) for choice in ranked):
        for choice in _spread([choice for choice in ranked if type(choice.tile) is kind], most):
            launches = conv_max.lower_in(step, choice.tile, context)
            yield Variant(f"maxima {choice.tile}", choice.cycles, tuple(launches))
    apart = conv_max.cycles_apart(step, context)
    yield Variant("apart", apart, tuple(conv_max.lower_apart(step, context)))


def _depthwise(step: Step, geometry: Geometry, context: Context, most: int) -> Iterator[Variant]:
    window = depthwise.window_of(geometry)
    tile = depthwise.pick_tile(window, context.architecture.shared_bytes, context.multiprocessors)
    if tile is not None:
        launch = depthwise.launch_depthwise_product(step, geometry, context, tile)
        yield Variant(str(tile), depthwise.cycles(window, tile, context.multiprocessors), (launch,))
    if depthwise_rows.has_rows(step, geometry, context):
        for cycles, rows in _spread(depthwise_rows.ranked(step, geometry, context), most):
            yield Variant(str(rows), cycles, (depthwise_rows.launch_rows(step, geometry, rows, context),))


def _products(step: Step, geometry: Geometry, context: Context, most: int) -> Iterator[Variant]:
    """Implicit products on warpgroups."""
    operands = operands_of(step, context)
    if operands is None or operands is Operands.EXACT or not is_constant(step.inputs[1]):
        return
    gathered = [
        (choice.cycles, choice.tile) for choice in conv_wgmma.estimates(step, geometry, operands, MOST_SPLITS, context)
    ]
    kernels: list[list[tuple[float, ConvTile]]] = [
        [(cycles, tile) for cycles, tile in gathered if not tile.slots and tile.cluster * tile.cluster_k == 1],
        [(cycles, tile) for cycles, tile in gathered if tile.slots and tile.cluster == 1],
        [(cycles, tile) for cycles, tile in gathered if tile.cluster > 1 and not tile.slots and tile.cluster_k == 1],
        [(cycles, tile) for cycles, tile in gathered if tile.cluster > 1 and tile.slots],
        [(cycles, tile) for cycles, tile in gathered if tile.cluster_k > 1 and tile.cluster == 1],
        [(cycles, tile) for cycles, tile in gathered if tile.cluster_k > 1 and tile.cluster > 1],
        [(choice.cycles, choice.tile) for choice in conv_halo.estimates(step, geometry, operands, context)],
        [(choice.cycles, choice.tile) for choice in conv_halo_deep.estimates(step, geometry, operands, context)],
    ]
    for choices in kernels:
        for cycles, tile in _spread(sorted(choices, key=lambda one: one[0]), most):
            yield Variant(str(tile), cycles, tuple(lower_in(step, geometry, tile, context)))


def _spread(ranked: Sequence[Ranked], most: int) -> list[Ranked]:
    """The first half of `most`, and as many evenly from the rest."""
    first = ranked[: most - most // 2]
    rest = ranked[len(first) :]
    count = min(most // 2, len(rest))
    return [*first, *(rest[i * len(rest) // count] for i in range(count))]
