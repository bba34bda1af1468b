"""What the tuner (tuner.py) has to choose between: the tiles of products and of convolutions, with their estimates and
launches. Needs no GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from engine.ir.ops import Conv, ConvBlock, ConvExcitation, ConvMax, ConvMean, Gemm
from engine.plan.plan import Step
from engine.targets.cuda import choices, conv, conv_block, conv_choices, conv_excitation, conv_max, conv_mean, gemm
from engine.targets.cuda.conv_block_tiles import Apart, BlockTile
from engine.targets.cuda.conv_choices import ConvTile, kernel_of
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_lines import LinesTile
from engine.targets.cuda.conv_stem_pooled import PooledStemTile
from engine.targets.cuda.conv_tiles import chosen, summed_tiles
from engine.targets.cuda.depthwise_tiles import RowsTile
from engine.targets.cuda.gemm import (
    estimated_best,
    found_apart,
    launches_of,
    operands_of,
    other_tiles,
    pick_tile,
    ranked_tiles,
)
from engine.targets.cuda.gemm_rows import AnyTile
from engine.targets.cuda.gemm_stream import StreamTile
from engine.targets.cuda.kernel import Choice, Context, Functor, Launch
from engine.targets.cuda.product import Product
from engine.targets.cuda.product_cost import CLOCK_MHZ, Ranked
from engine.targets.cuda.tiles import Choice as Estimated
from engine.targets.cuda.tiles import WgmmaTile

CANDIDATES = 6
"""Tiles that are timed of each product or convolution."""
OTHER_CANDIDATES = 3
"""Those of each `Way` of a product, and of each kernel of a convolution, that are timed at least."""
RATE = 2 * 2048
"""Operations of fp16 that a multiprocessor finishes in a cycle (NVIDIA's architecture paper)."""
_MEMORY_RATE = 1700  # bytes in a cycle of all of them: 3 TB/s


@dataclass(frozen=True)
class Candidate:
    """A tile for people, its estimate in µs, and what that is mostly spent on."""

    text: str
    estimate_us: float
    bound: str


class Tunable(Protocol):
    """A step that can run in several tiles. The first candidate is what should be the fastest."""

    @property
    def step(self) -> Step: ...

    @property
    def key(self) -> str:
        """What names it in the file of choices."""
        ...

    @property
    def candidates(self) -> Sequence[Candidate]: ...

    def launches(self, i: int, context: Context) -> list[Launch]:
        """Those of candidate i."""
        ...

    def choice(self, i: int, us: float) -> Choice:
        """Candidate i as the file has it, with its time."""
        ...

    def chosen(self, context: Context) -> int | None:
        """The candidate that plans take from now on; None where it is none of them."""
        ...


def tunables(step: Step, context: Context, most: int = CANDIDATES) -> Iterator[Tunable]:
    """What there is to choose of a step: of an inverted residual first the tiles of its three convolutions, which are
    what its own candidates stand beside."""
    if isinstance(step.op, ConvBlock):
        for one in conv_block.convolutions(step):
            yield from tunables(one, context, most)
    found = tunable(step, context, most)
    if found is not None:
        yield found


def tunable(step: Step, context: Context, most: int = CANDIDATES) -> Tunable | None:
    """What can be chosen of a step, in the first `most` tiles and a few of every other kind; None for other steps."""
    found = product_of(step, context)
    if found is not None:
        product, epilogue = found
        return _Product(step, product, epilogue, context, most)
    return _Convolution(step, context, most) if _conv_tiles(step, context) else None


def product_of(step: Step, context: Context) -> tuple[Product, Functor] | None:
    """The product that a step runs as, of those whose tile is chosen here, and its epilogue; None for others."""
    match step.op:
        case Gemm():
            return gemm.parts_of(step, context)
        case Conv():
            return conv.parts_of(step, context)
    return None


def candidates(product: Product, epilogue: Functor, context: Context, most: int = CANDIDATES) -> list[Ranked]:
    """The tiles worth timing, that which should be the fastest first: the first ones by their estimates, those of every
    other kernel whose estimates compare less well (ways of slicing, the best of each), and the first ones of every
    other way."""
    ranked = ranked_tiles(product, context, epilogue.reads)
    slices = sum(isinstance(one.tile, StreamTile) for one in ranked)  # among the first
    chosen = ranked[: most + slices]
    for one in ranked[most + slices :]:
        if all(type(one.tile) is not type(other.tile) for other in chosen):
            chosen.append(one)
    others = other_tiles(product, epilogue, context)
    chosen += (ranked for tiles in others.values() for ranked in tiles[:OTHER_CANDIDATES])
    best = estimated_best(product, epilogue, context)
    return [best, *(one for one in chosen if one.tile != best.tile)]


@dataclass(frozen=True)
class _Product:
    """A matrix product, or a convolution that runs as one."""

    step: Step
    product: Product
    epilogue: Functor
    context: Context
    most: int

    @cached_property
    def key(self) -> str:
        return choices.key_of(self.product, operands_of(self.product, self.context), self.epilogue)

    @cached_property
    def ranked(self) -> list[Ranked]:
        return candidates(self.product, self.epilogue, self.context, self.most)

    @property
    def candidates(self) -> list[Candidate]:
        return [Candidate(self._text(one.tile), one.estimate.us, one.estimate.bound) for one in self.ranked]

    def _text(self, tile: AnyTile) -> str:
        """The estimate and the time are those of all launches."""
        after = ", then factors of rows" if found_apart(self.product, tile) is not None else ""
        return choices.tile_text(tile) + after

    def launches(self, i: int, context: Context) -> list[Launch]:
        return launches_of(self.product, self.epilogue, self.ranked[i].tile, context)

    def choice(self, i: int, us: float) -> Choice:
        return choices.choice_of(self.ranked[i].tile, us)

    def chosen(self, context: Context) -> int | None:
        tile: AnyTile = pick_tile(self.product, self.epilogue, context)
        return next((i for i, one in enumerate(self.ranked) if one.tile == tile), None)


@dataclass(frozen=True)
class _Convolution:
    """A convolution, with what its step does beside it."""

    step: Step
    context: Context
    most: int

    @cached_property
    def key(self) -> str:
        if isinstance(self.step.op, ConvBlock):
            return conv_choices.block_key(conv_block.convolutions(self.step), self.context)
        return conv_choices.key_of(self.step, _bare(self.step), self.context)

    @cached_property
    def ranked(self) -> list[Estimated[ConvTile]]:
        return _first_of_each(_conv_tiles(self.step, self.context), self.most)

    @property
    def candidates(self) -> list[Candidate]:
        return [
            Candidate(conv_choices.tile_text(one.tile), one.cycles / CLOCK_MHZ, self._bound(one.cycles))
            for one in self.ranked
        ]

    def _bound(self, cycles: float) -> str:
        """The models of convolutions give one figure: the longest of the two that no tile changes, and of what comes on
        top."""
        products = self.step.cost.flops / (RATE * self.context.multiprocessors)
        memory = self.step.cost.bytes / _MEMORY_RATE
        parts = {"products": products, "memory": memory, "copies and launch": cycles - max(products, memory)}
        return max(parts, key=lambda name: parts[name])

    def launches(self, i: int, context: Context) -> list[Launch]:
        return _conv_launches(self.step, self.ranked[i].tile, context)

    def choice(self, i: int, us: float) -> Choice:
        return conv_choices.choice_of(self.ranked[i].tile, us)

    def chosen(self, context: Context) -> int | None:
        tile = chosen(_conv_tiles(self.step, context), self.key, context)
        return next((i for i, one in enumerate(self.ranked) if one.tile == tile), None)


def _bare(step: Step) -> Step:
    """A step's convolution alone."""
    match step.op:
        case ConvExcitation():
            return conv_mean.without_mean(conv_excitation.with_mean(step))
        case ConvMean():
            return conv_mean.without_mean(step)
        case ConvMax():
            return conv_max.unpooled(step)
    return step


def _conv_tiles(step: Step, context: Context) -> Sequence[Estimated[ConvTile]]:
    """The tiles that a convolution which is no product can run in; none of other steps."""
    match step.op:
        case Conv():
            return conv.tiles_of(step, context)
        case ConvMax():
            return conv_max.tiles_of(step, context)
        case ConvBlock():
            ways = conv_block.tiles_of(step, context)
            return ways if len(ways) > 1 else ()
        case ConvMean() | ConvExcitation():
            bare = _bare(step)
            return summed_tiles(bare, Geometry(bare), context)
    return ()


def _conv_launches(step: Step, tile: ConvTile, context: Context) -> list[Launch]:
    if isinstance(step.op, Conv):
        return conv.lower_in(step, Geometry(step), tile, context)
    if isinstance(step.op, ConvMax):
        assert isinstance(tile, WgmmaTile | LinesTile | PooledStemTile)
        return conv_max.lower_in(step, tile, context)
    if isinstance(step.op, ConvBlock):
        assert isinstance(tile, BlockTile | Apart)
        return conv_block.lower_in(step, tile, context)
    assert isinstance(tile, RowsTile)
    if isinstance(step.op, ConvMean):
        return conv_mean.lower_rows(step, tile, context)
    return conv_excitation.lower_rows(step, tile, context)


def _first_of_each(ranked: Sequence[Estimated[ConvTile]], most: int) -> list[Estimated[ConvTile]]:
    """The first `most`, and of every kernel a few at least, whose estimates compare less well with those of others."""
    chosen = list(ranked[:most])
    counts = Counter(kernel_of(one.tile) for one in chosen)
    for one in ranked[most:]:
        kernel = kernel_of(one.tile)
        if counts[kernel] < OTHER_CANDIDATES:
            counts[kernel] += 1
            chosen.append(one)
    return chosen
