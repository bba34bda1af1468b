"""The covering set's convolutions of images with few channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Conv, ConvMax, Pool, PoolKind
from engine.plan.plan import Step
from engine.targets.cuda import conv_max, conv_stem
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.conv_stem import is_stem, launch_stem
from engine.targets.cuda.conv_stem_pooled import PooledStemTile
from engine.targets.cuda.covering.build import (
    ACC,
    F16,
    F32,
    Given,
    add,
    arg,
    channels_inner,
    conv_op,
    make_step,
    relu6,
    weight,
)
from engine.targets.cuda.families import family_of
from engine.targets.cuda.kernel import Context, Launch


def stems(context: Context) -> Iterator[tuple[str, Launch]]:
    """Images with few channels in every kind of tile: k in pairs of a table or regular, channels padded or not, images
    as they come; and patches."""
    photo, gray = (F32, (8, 3, 224, 224)), (F16, (8, 1, 96, 96))
    bf16, inner = DType.BF16, channels_inner(8, 3, 224, 224)
    chosen: list[tuple[Given, Sequence[int], DType, int, int]] = [  # image, filter, type, stride, dilation
        (photo, (64, 3, 7, 7), F16, 2, 1),
        (inner, (64, 3, 7, 7), F16, 2, 1),
        (photo, (32, 3, 3, 3), F16, 2, 1),
        (photo, (64, 3, 3, 3), bf16, 1, 1),
        (inner, (96, 3, 4, 4), F16, 4, 1),
        (photo, (64, 3, 11, 11), F16, 4, 1),
        (photo, (24, 3, 3, 3), bf16, 2, 2),
        (gray, (20, 1, 5, 5), F16, 1, 1),
        ((F16, (8, 4, 96, 96)), (32, 4, 3, 3), F16, 1, 1),
        ((F32, (8, 2, 96, 96)), (64, 2, 3, 3), F16, 1, 1),
    ]
    for image, filters, dtype, stride, dilation in chosen:
        store = ex.cast(relu6(add(ACC, arg(2, dtype))), dtype)
        op = conv_op(filters[-1], stride, 1, store, dilation)
        step = make_step(op, [image, weight(*filters, dtype=dtype), weight(filters[0], 1, 1, dtype=dtype)])
        geometry = Geometry(step)
        assert is_stem(step, geometry, context), filters
        tiles = conv_stem.candidates(geometry, context.architecture)
        kinds = [[tile for tile in tiles if tile.wgmma is wgmma] for wgmma in (False, True)]
        for tile in (kind[i] for kind in kinds if kind for i in (0, -1)):
            yield f"stem {filters} {tile}", launch_stem(step, geometry, context, tile)
    if context.architecture.wgmma:
        yield from _pooled(context)
    for image, dtype in ((photo, F16), (inner, F16), (photo, bf16), (photo, F32)):
        op = Conv((16, 16), ((0, 0), (0, 0)), (1, 1), stores=(ex.cast(add(ACC, arg(2, dtype)), dtype),))
        step = make_step(op, [image, weight(768, 3, 16, 16, dtype=dtype), weight(768, 1, 1, dtype=dtype)])
        for launch in family_of(op).lower(step, context):
            yield "patches", launch


def _pooled(context: Context) -> Iterator[tuple[str, Launch]]:
    """First layers with the pool behind them, k regular or not, in tiles of as many blocks and of fewer."""
    photo, inner = (F32, (8, 3, 224, 224)), channels_inner(8, 3, 224, 224)
    chosen: list[tuple[Given, tuple[int, ...], DType, int, int]] = [  # image, filter, type, stride, dilation
        (photo, (64, 3, 7, 7), F16, 2, 1),
        (replace(inner, dtype=DType.BF16), (64, 3, 7, 7), DType.BF16, 2, 1),
        (photo, (32, 3, 3, 3), F16, 2, 2),
        ((F16, (8, 4, 96, 96)), (96, 4, 5, 5), F16, 1, 1),
    ]
    for image, filters, dtype, stride, dilation in chosen:
        step = pooled_stem(image, filters, dtype, stride, dilation)
        bare = conv_max.unpooled(step)
        fitting = [choice.tile for choice in conv_max.estimates(step, Geometry(bare), context)]
        for blocks in (5, 3, 2):
            for tile in [tile for tile in fitting if isinstance(tile, PooledStemTile) and tile.blocks == blocks][:1]:
                for launch in conv_max.lower_in(step, tile, context):
                    yield f"pooled stem {filters} {tile}", launch


def pooled_stem(image: Given, filters: tuple[int, ...], dtype: DType = F16, stride: int = 2, dilation: int = 1) -> Step:
    """A first layer with a bias and a clamp, and the maxima over 3 × 3 of its results, two apart."""
    store = ex.cast(relu6(add(ACC, arg(2, dtype))), dtype)
    pool = Pool(PoolKind.MAX, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), stores=(ex.Acc(dtype),))
    op = ConvMax(conv_op(filters[-1], stride, 1, store, dilation), pool)
    inputs = [image, weight(*filters, dtype=dtype), weight(filters[0], 1, 1, dtype=dtype)]
    return make_step(op, inputs, f"conv stem {filters} maxima")
