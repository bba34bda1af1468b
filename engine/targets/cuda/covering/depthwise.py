"""The covering set's depthwise convolutions on the matrix units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.targets.cuda import depthwise_bands, depthwise_diagonal
from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.covering.build import (
    ACC,
    F16,
    add,
    arg,
    channels_inner,
    conv_op,
    make_step,
    relu6,
    weight,
)
from engine.targets.cuda.depthwise import is_depthwise_product, launch_depthwise_product, window_of
from engine.targets.cuda.depthwise_rows import ImageSums, has_rows, launch_rows
from engine.targets.cuda.kernel import Context, Launch


def depthwise_products(context: Context) -> Iterator[tuple[str, Launch]]:
    """Depthwise filters of every size, stride and dilation, in small tiles and large ones."""
    shapes = ((1, 144, 56), (64, 96, 112), (64, 672, 14), (64, 1152, 7))  # batch, channels, size
    usual = product(((3, 1, 1), (3, 2, 1), (5, 1, 1), (5, 2, 1)), shapes)  # kernel, stride, dilation
    rare = ((1, 1, 1), (2, 2, 1), (4, 3, 1), (6, 1, 1), (7, 1, 1), (7, 2, 1), (3, 1, 2), (5, 1, 4), (7, 2, 2))
    chosen = (*usual, *((each, shapes[0]) for each in rare))
    for turn, ((kernel, stride, dilation), (batch, channels, size)) in enumerate(chosen):
        dtype = DType.BF16 if turn % 3 == 0 else F16
        store = ex.cast(relu6(add(ACC, arg(2, dtype))), dtype)
        shape = (batch, channels, size, size)
        inner = replace(channels_inner(*shape), dtype=dtype)
        op = conv_op(kernel, stride, channels, store, dilation)
        filters = weight(channels, 1, kernel, kernel, dtype=dtype)
        step = make_step(op, [inner, filters, weight(channels, 1, 1, dtype=dtype)])
        geometry = Geometry(step)
        if is_depthwise_product(step, geometry, context):
            name = f"depthwise {kernel}/{stride} dilation {dilation} {channels}@{size}"
            yield name, launch_depthwise_product(step, geometry, context)
    if context.architecture.wgmma:
        yield from _rows(context)


def _rows(context: Context) -> Iterator[tuple[str, Launch]]:
    """Rows that stream, for every filter that networks have, in tiles that leave a thread the fewest registers: stages
    of one row of results and of a period, with a clamp and with a residual in turn; with sums over the pixels of images
    beside them."""
    for turn, (kernel, stride) in enumerate(((3, 1), (3, 2), (5, 1), (5, 2), (7, 1))):
        dtype = DType.BF16 if turn % 3 == 0 else F16
        biased = add(ACC, arg(2, dtype))
        residual = turn % 2 == 0
        store = add(biased, arg(3, dtype)) if residual else relu6(biased)
        image = replace(channels_inner(2, 144, 30, 30), dtype=dtype)
        results = replace(channels_inner(2, 144, 30 // stride, 30 // stride), dtype=dtype)
        filters, bias = weight(144, 1, kernel, kernel, dtype=dtype), weight(144, 1, 1, dtype=dtype)
        op = conv_op(kernel, stride, 144, ex.cast(store, dtype))
        step = make_step(op, [image, filters, bias, *([results] if residual else [])])
        geometry = Geometry(step)
        assert has_rows(step, geometry, context)
        for kind, summed in product((depthwise_diagonal, depthwise_bands), (False, True)):
            fitting = kind.candidates(window_of(geometry), context.architecture.shared_bytes, summed)
            longest = max(tile.rows for tile in fitting)
            wanted = [tile for tile in fitting if (tile.rows == longest) == residual]
            tile = max(wanted, key=lambda tile: tile.threads)
            sums = ImageSums.of(geometry, tile, context) if summed else None
            name = f"depthwise rows{' with sums' if summed else ''} {kernel}/{stride} {tile}"
            yield name, launch_rows(step, geometry, tile, context, sums)
