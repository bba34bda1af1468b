"""MaxPool that also says where its maxima stood, MaxUnpool that puts them back there, and Col2Im, which adds up the
blocks of an image. No kernels of their own: the taps of a window are strided views of the image, compared by one
expression; unpooling is a scatter, adding up blocks a transposed convolution."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product as combinations
from math import prod

import numpy as np

from engine.frontend import foreign
from engine.frontend import formula as f
from engine.frontend.formula import Term
from engine.frontend.onnx_node import OnnxNode, store
from engine.frontend.operators.convolution import Window, window
from engine.frontend.operators.shape import positions
from engine.frontend.registry import Results, operator
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import Dim, product
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.graph import Value

_AT_ONCE = 9  # taps that are compared in one expression
_MOST_TAPS = 64  # beyond that a window has too many views


def max_pool_with_places(node: OnnxNode, x: Value) -> Results:
    """The maxima, and the position of each (the first of several) in the whole tensor. Of a dilated window on a padded
    image, and of a large one, the host finds them."""
    moves = window(node, x, node.integers("kernel_shape"))
    ceil_mode = bool(node.integer("ceil_mode", 0)) and node.text("auto_pad", "NOTSET") == "NOTSET"
    padded = ceil_mode or any(map(any, moves.pads))
    if (padded and any(d > 1 for d in moves.dilations)) or prod(moves.kernel) > _MOST_TAPS:
        return foreign.opaque(node, [x])
    if any(not 0 <= pad < k for pads, k in zip(moves.pads, moves.kernel, strict=True) for pad in pads):
        raise node.invalid(f"pads {moves.pads} for a kernel of {moves.kernel}")
    pool = ops.Pool(ops.PoolKind.MAX, moves.kernel, moves.strides, moves.pads, moves.dilations, ceil_mode)
    ((_, shape),) = pool.infer((x,))
    image = x
    if padded:
        # An edge that is repeated adds nothing to a window that holds it, and stands where it stands.
        extra = [stride - 1 if ceil_mode else 0 for stride in moves.strides]
        pads = tuple((begin, end + more) for (begin, end), more in zip(moves.pads, extra, strict=True))
        image = node.add(ops.Pad(((0, 0), (0, 0), *pads), ops.PadMode.EDGE), x)
    best: tuple[Value, ...] = ()
    taps = list(combinations(*map(range, moves.kernel)))
    for first in range(0, len(taps), _AT_ONCE):
        chunk = taps[first : first + _AT_ONCE]
        views = [_tap(node, image, tap, moves, shape) for tap in chunk]
        best = node.add_all(_larger(x.dtype, len(chunk), first), *views, *best)
    values, numbers = best
    return [values, _place(node, x, numbers, moves, padded)]


def _tap(node: OnnxNode, image: Value, tap: Sequence[int], moves: Window, shape: Sequence[Dim]) -> Value:
    """What one tap of every window reads."""
    starts = tuple(t * dilation for t, dilation in zip(tap, moves.dilations, strict=True))
    steps = tuple(1 if size == 1 else stride for size, stride in zip(shape[2:], moves.strides, strict=True))
    return node.add(ops.Slice((0, 0, *starts), tuple(shape), (1, 1, *steps)), image)


def _larger(dtype: DType, count: int, first: int) -> ops.Pointwise:
    """(Largest of `count` taps, its number counted from `first`), and of the taps before, which follow them as one
    value and its number. NaN is larger than everything, as in `Pool`."""
    taps = [Term(ex.Arg(i, dtype)) for i in range(count)]
    best, number = taps[0], Term(ex.const(first, DType.I32))
    if first:
        best, number = Term(ex.Arg(count, dtype)), Term(ex.Arg(count + 1, DType.I32))
    for i, tap in enumerate(taps if first else taps[1:], first or 1):
        larger = f.less(best, tap)
        if dtype.is_float:
            is_nan = f.logical_not(f.equal(tap, tap))
            larger = f.logical_and(f.equal(best, best), f.logical_or(larger, is_nan))
        number = f.where(larger, number.like(i), number)
        best = f.where(larger, tap, best)
    return ops.Pointwise((best.expr, number.expr))


def _place(node: OnnxNode, x: Value, numbers: Value, moves: Window, padded: bool) -> Value:
    """The position in `x`, flattened, of the tap that `numbers` gives for every window."""
    rank = x.rank
    by_column = node.integer("storage_order", 0)
    spatial = range(2, rank)
    order = [0, 1, *(reversed(spatial) if by_column else spatial)]
    strides = {axis: product(x.shape[other] for other in order[i + 1 :]) for i, axis in enumerate(order)}
    total: Value | None = None
    for axis in range(rank):
        place = positions(node, numbers.shape[axis], axis, rank)
        if axis >= 2:
            place = _coordinate(node, x.shape[axis], numbers, place, moves, axis - 2, padded)
        stride = node.builder.sizes([strides[axis]], ())
        place = node.pointwise(lambda i, s: i * s, place, stride)
        total = place if total is None else node.pointwise(lambda a, b: a + b, total, place)
    assert total is not None
    return total


def _coordinate(
    node: OnnxNode, size: Dim, numbers: Value, window_at: Value, moves: Window, i: int, padded: bool
) -> Value:
    """The coordinate of the taps along spatial axis `i`."""
    inner = prod(moves.kernel[i + 1 :])

    def formula(number: Term, at: Term, length: Term) -> Term:
        tap = f.apply(PointOp.MOD, f.apply(PointOp.DIV, number.cast(DType.I64), inner), moves.kernel[i])
        coordinate = at * moves.strides[i] + tap * moves.dilations[i] - moves.pads[i][0]
        return f.minimum(f.maximum(coordinate, 0), length - 1) if padded else coordinate

    return node.pointwise(formula, numbers, window_at, node.builder.sizes([size], ()))


@operator("MaxUnpool")
def MaxUnpool(node: OnnxNode, x: Value, places: Value, output_shape: Value | None = None) -> Value:
    """Zeros with the elements of `x` where `places` say.

    An output shape of its own is refused: ONNX's reference takes the places to be those of the shape that follows from
    the attributes, ONNX Runtime those of the shape that is given.
    """
    moves = window(node, x, node.integers("kernel_shape"))
    if places.shape != x.shape or places.dtype is not DType.I64:
        raise node.invalid(f"indices of type {places.dtype.value} and shape {list(places.shape)}")
    shape: list[Dim] = list(x.shape[:2])
    for size, kernel, stride, (begin, end) in zip(x.shape[2:], moves.kernel, moves.strides, moves.pads, strict=True):
        shape.append((size - 1) * stride + kernel - begin - end)
    if output_shape is not None and node.dims(output_shape, "output_shape") != shape:
        raise node.unsupported(f"an output_shape other than {[str(size) for size in shape]}")
    zeros = node.expand(node.constant(np.zeros(1, x.dtype.numpy)), (product(shape),))
    flat = (product(x.shape),)
    put = node.add(ops.Scatter(0), zeros, node.reshape(places, flat), node.reshape(x, flat))
    return node.reshape(put, shape)


@operator("Col2Im")
def Col2Im(node: OnnxNode, x: Value, image_shape: Value, block_shape: Value) -> Results:
    """[n, channels · block, blocks] → [n, channels, *image]: blocks added up where they overlap. As a transposed
    convolution of every channel by itself, whose filter number i is 1 at element i of the block."""
    image, block = node.dims(image_shape, "image_shape"), node.static_ints(block_shape, "block_shape")
    channels = x.shape[1] if x.rank == 3 else 0
    taps = prod(block)
    if not isinstance(channels, int) or taps < 1 or not channels or channels % taps or len(image) != len(block):
        raise node.invalid(f"an input of shape {[str(dim) for dim in x.shape]} with blocks of {block}")
    if not x.dtype.is_float or not all(isinstance(size, int) for size in image):
        return foreign.opaque(node, [x, image_shape, block_shape])
    channels //= taps
    sizes = [int(str(size)) for size in image]
    axes = len(block)
    strides, dilations = node.integers("strides", (1,) * axes), node.integers("dilations", (1,) * axes)
    pads = node.integers("pads", (0,) * 2 * axes)
    if not len(strides) == len(dilations) == axes == len(pads) / 2 or min(*strides, *dilations, *sizes) < 1:
        raise node.invalid(f"strides {list(strides)}, dilations {list(dilations)}, pads {list(pads)}")
    counts, extra = [], []
    for i, size in enumerate(sizes):
        free = size + pads[i] + pads[axes + i] - (block[i] - 1) * dilations[i] - 1
        counts.append(free // strides[i] + 1)
        extra.append(free % strides[i])  # behind the last block
    if min(counts) < 1 or x.shape[2] != prod(counts):
        raise node.invalid(f"{x.shape[2]} blocks where {list(counts)} fit the image")
    blocks = node.reshape(x, (x.shape[0], channels * taps, *counts))
    filters = np.tile(np.eye(taps, dtype=x.dtype.numpy), (channels, 1)).reshape(channels * taps, 1, *block)
    grown = tuple(extra) if any(extra) else ()
    pairs = tuple(zip(pads[:axes], pads[axes:], strict=True))
    op = ops.Conv(tuple(strides), pairs, tuple(dilations), channels, True, grown, store(x.dtype))
    return node.add(op, blocks, node.constant(filters))
