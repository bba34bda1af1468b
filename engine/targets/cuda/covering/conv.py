"""The covering set's convolutions as implicit products, in every tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Conv, ConvMax, Pool, PoolKind
from engine.plan.plan import Step
from engine.plan.tensor import row_major
from engine.targets.cuda import conv_halo, conv_max, conv_wgmma
from engine.targets.cuda.conv import filters_of, launch_conv, lower_in
from engine.targets.cuda.conv_geometry import Geometry, channels_last
from engine.targets.cuda.conv_halo_deep import DeepTile
from engine.targets.cuda.conv_lines import LinesTile
from engine.targets.cuda.covering.build import (
    ACC,
    F16,
    F32,
    Given,
    add,
    arg,
    make_step,
    relu6,
    stored,
    weight,
)
from engine.targets.cuda.families import family_of
from engine.targets.cuda.joined_tiles import JOINED_PAIRS, JOINED_TILES
from engine.targets.cuda.kernel import Context, Launch
from engine.targets.cuda.tiles import MMA_TILES, MmaTile, Tile, WgmmaTile


def convolutions(context: Context) -> Iterator[tuple[str, Launch]]:
    """Implicit products in every tile, whole and split, with every kind of operands, geometry and access to the image;
    computed filters; and what the matrix units do not take."""
    portable = [tile for tile in MMA_TILES if tile.shared_bytes <= context.architecture.shared_bytes]
    split, bf16 = [replace(tile, splits=3) for tile in portable], DType.BF16
    rounding = replace(context, tf32=True)
    chosen: list[tuple[Step, Context, Sequence[MmaTile]]] = [
        (_conv(F16), context, portable),
        (_conv(F16, channels=6, axes=3, residual=True), context, (split[0], split[-1])),
        (_conv(bf16, transposed=True, residual=True), context, (split[1], portable[0])),
        (_conv(F32), context, portable),
        (_conv(F32, channels=6, axes=3, transposed=True, residual=True), context, (split[0], portable[-1])),
        (_conv(F32, axes=3), rounding, (portable[0],)),
        (_conv(F16, channels=12, image=F32), context, (portable[0],)),
    ]
    for step, how, tiles in chosen:
        geometry = Geometry(step)
        filters, _ = filters_of(step, geometry, how)
        for tile in tiles:
            yield f"conv {tile}", launch_conv(step, geometry, filters, tile, how)
    yield from _gathered_convolutions(context, rounding)
    for step in (
        _conv(F16, known=False),
        _conv(F32, transposed=True, known=False),
        _conv(DType.F64),
        _conv(F32, channels=1, axes=3),
        *(_conv(F16, groups=groups, transposed=transposed) for groups in (128, 129) for transposed in (False, True)),
        _conv(bf16, groups=128, kernel=9),
        _conv(bf16, groups=128, kernel=7),
        _conv(F32, groups=128, kernel=5),
        _conv(F32, groups=32, channels=64, known=False),
    ):
        for launch in family_of(step.op).lower(step, context):
            yield "conv", launch


def _gathered_convolutions(context: Context, rounding: Context) -> Iterator[tuple[str, Launch]]:
    """Implicit products whose patches the copy engine gathers, in every tile: widths of panels take turns. Also
    clusters that share k, staged results, and blocks in pairs."""
    wgmma = [
        replace(tile, panel_bytes=128 >> i % 3)
        for i, tile in enumerate(conv_wgmma.TILES if context.architecture.wgmma else ())
    ]
    split = [replace(tile, splits=3) for tile in wgmma if tile.most_splits > 1]
    every = [replace(tile, panel_bytes=128) for tile in wgmma]
    joined = JOINED_TILES if context.architecture.wgmma else ()
    joined_pairs = JOINED_PAIRS if context.architecture.wgmma else ()
    staged = conv_wgmma.STAGED if context.architecture.wgmma else ()
    pairs = [
        replace(tile, panel_bytes=128 >> i % 3)
        for i, tile in enumerate(conv_wgmma.PAIRS if context.architecture.wgmma else ())
    ]
    few = (*wgmma[:2], *wgmma[7:9])
    chosen: list[tuple[Step, Context, Sequence[Tile]]] = [
        (_conv(F16), context, wgmma),
        (_residual(F16), context, every),
        (_residual(F16), context, split),
        (_residual(F16, axes=3), context, few),
        (_residual(F16, channels=128, groups=2), context, few),
        (_residual(DType.BF16), context, wgmma[:1]),
        (_residual(F32), rounding, (*wgmma[:3], *wgmma[7:8])),
        (_residual(F32, channels=128, groups=2, axes=3), rounding, split),
        (_conv(F16), context, joined[::2]),
        (_residual(F16), context, joined[1::2]),
        (_residual(DType.BF16, axes=3), context, joined[::5]),
        (_residual(F32, channels=128, groups=2), rounding, joined[2::5]),
        (_residual(F16), context, joined_pairs),
        (_residual(DType.BF16, axes=3), context, joined_pairs),
        (_residual(F16), context, staged),
        (_residual(DType.BF16, axes=3), context, staged[:4]),
        (_conv(F16), context, staged[::3]),
        (_residual(F16), context, pairs[::2]),
        (_residual(DType.BF16, axes=3), context, pairs[1::2]),
    ]
    for step, how, tiles in chosen:
        for tile in tiles:
            if isinstance(tile, WgmmaTile) and not conv_wgmma.has_registers(tile, Geometry(step)):
                continue
            for launch in lower_in(step, Geometry(step), tile, how):
                yield f"conv {tile}", launch
    if context.architecture.wgmma:
        yield from _halos(context, rounding)
        yield from _deep_halos(context, rounding)
        yield from _maxima(context)


def _halos(context: Context, rounding: Context) -> Iterator[tuple[str, Launch]]:
    """Implicit products that read a tile's pixels once, in every tile: the length of a ring is only a number."""
    for step, how in ((_conv(F16), context), (_residual(DType.BF16), context), (_residual(F32, channels=32), rounding)):
        for tile in conv_halo.candidates(step, Geometry(step), how):
            if tile.stages > 2:
                continue
            for launch in lower_in(step, Geometry(step), tile, how):
                yield f"conv {tile}", launch


def _deep_halos(context: Context, rounding: Context) -> Iterator[tuple[str, Launch]]:
    """Halos of several panels: the tiles with the most accumulators and operands of the epilogue, either way round."""
    for step, tile, how in (
        (_residual(F16, channels=160), DeepTile(224, 128, 2, 9, swapped=True), context),
        (_conv(DType.BF16, channels=160), DeepTile(256, 128, 2, 12, swapped=True, panel_bytes=64), context),
        (_residual(F16, channels=160), DeepTile(128, 256, 2, 5), context),
        (_residual(DType.BF16, channels=160), DeepTile(128, 192, 2, 7), context),
        (_residual(F32, channels=48), DeepTile(256, 128, 2, 8), rounding),
    ):
        for launch in lower_in(step, Geometry(step), tile, how):
            yield f"conv {tile}", launch


def _maxima(context: Context) -> Iterator[tuple[str, Launch]]:
    """Maxima of windows in every tile of gathered patches, panels of each width in turn, of wide and narrow lines."""
    gathered = [replace(tile, panel_bytes=128 >> i % 3) for i, tile in enumerate(conv_max.TILES)]
    lines = [LinesTile(128, 2), LinesTile(112, 2), LinesTile(64, 3), LinesTile(32, 4)]
    tiles: list[conv_max.PooledTile] = [*gathered, *lines]
    for turn, tile in enumerate(tiles):
        step = max_step(DType.BF16 if turn % 3 == 0 else F16)
        for launch in conv_max.lower_in(step, tile, context):
            yield f"conv maxima {tile}", launch


def max_step(dtype: DType, channels: int = 64) -> Step:
    """A convolution with a bias and a clamp, of which only the maxima of windows are stored."""
    convolution = _conv(dtype, channels)
    halving = Pool(PoolKind.MAX, (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1), stores=(ex.Acc(dtype),))
    assert isinstance(convolution.op, Conv)
    return make_step(ConvMax(convolution.op, halving), list(convolution.inputs), f"conv maxima of {channels}")


def _residual(dtype: DType, channels: int = 0, groups: int = 1, axes: int = 2) -> Step:
    """A convolution with a residual that lies as the result does."""
    step = _conv(dtype, channels, groups, axes=axes, residual=True)
    *others, residual = step.inputs
    strides = row_major(residual.shape, channels_last(len(residual.shape)))
    return replace(step, inputs=(*others, replace(residual, strides=strides)))


def _conv(
    dtype: DType,
    channels: int = 0,
    groups: int = 1,
    kernel: int = 3,
    axes: int = 2,
    transposed: bool = False,
    known: bool = True,
    residual: bool = False,
    image: DType | None = None,
) -> Step:
    """A convolution to as many channels as there are groups, or 128, with stride 2 where it is transposed."""
    wide = ex.Acc(dtype) if dtype is DType.F64 else ACC
    n = groups if groups > 100 else 128
    c = channels or (n if groups > 1 else 64)
    store = ex.cast(relu6(ex.cast(add(wide, arg(2, dtype)) if dtype is not DType.F64 else wide, F32)), dtype)
    store = stored(add(add(ACC, arg(2, dtype)), arg(3, dtype)), dtype) if residual else store
    strides, pad = (2 if transposed else 1,) * axes, kernel // 2
    op = Conv(strides, ((pad, pad),) * axes, (1,) * axes, groups, transposed, stores=(store,))
    filters = (c, n // groups, *(kernel,) * axes) if transposed else (n, c // groups, *(kernel,) * axes)
    inputs: list[Given] = [(image or dtype, (2, c, *(12,) * axes))]
    inputs += [weight(*filters, dtype=dtype) if known else (dtype, filters), weight(n, *(1,) * axes, dtype=dtype)]
    inputs += [(dtype, (2, n, *(23 if transposed else 12,) * axes))] if residual else []
    return make_step(op, inputs)
