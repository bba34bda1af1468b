"""The ways in which a convolution could run beside the one that `conv.py` takes: what a sweep times, to measure a
kernel or to fit its cost model (``python -m benchmarks tiles``). Needs no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from engine.ir.ops import Conv
from engine.plan.plan import Step
from engine.targets.cuda import conv_halo, depthwise, depthwise_rows
from engine.targets.cuda.conv import lower, lower_in, operands_of
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.kernel import Context, Launch
from engine.targets.cuda.tiles import Operands

Ranked = TypeVar("Ranked")


@dataclass(frozen=True)
class Variant:
    """One way. `cycles`: what its model estimates, if it has one."""

    name: str
    cycles: float | None
    launches: tuple[Launch, ...]


def variants(step: Step, context: Context, most: int) -> list[Variant]:
    """The present way first, then up to `most` tiles of each kernel that is not tied to a cost model yet: half of them
    what its model ranks first, the others from the whole ranking, so that a model can be fitted to their times."""
    assert isinstance(step.op, Conv)
    geometry = Geometry(step)
    found = [Variant("present", None, tuple(lower(step, context)))]
    if depthwise.is_depthwise_product(step, geometry, context):
        window = depthwise.window_of(geometry)
        shared, multiprocessors = context.architecture.shared_bytes, context.multiprocessors
        tile = depthwise.pick_tile(window, shared, multiprocessors)
        if tile is not None:
            launch = depthwise.launch_depthwise_product(step, geometry, context, tile)
            found.append(Variant(str(tile), depthwise.cycles(window, tile, multiprocessors), (launch,)))
    if depthwise_rows.has_rows(step, geometry, context):
        for cycles, rows in _spread(depthwise_rows.ranked(step, geometry, context), most):
            launch = depthwise_rows.launch_rows(step, geometry, rows, context)
            found.append(Variant(str(rows), cycles, (launch,)))
    if operands_of(step, context) not in (None, Operands.EXACT) and conv_halo.has_halo(step, geometry):
        halos = [
            (conv_halo.cycles(step, geometry, halo, context.multiprocessors), halo)
            for halo in conv_halo.candidates(step, geometry, context)
        ]
        for cycles, halo in _spread(sorted(halos, key=lambda one: one[0]), most):
            found.append(Variant(str(halo), cycles, tuple(lower_in(step, geometry, halo, context))))
    return found


def _spread(ranked: Sequence[Ranked], most: int) -> list[Ranked]:
    """The first half of `most`, and as many evenly from the rest."""
    first = ranked[: most - most // 2]
    rest = ranked[len(first) :]
    count = min(most // 2, len(rest))
    return [*first, *(rest[i * len(rest) // count] for i in range(count))]
