"""Convolutions whose windows neither overlap nor leave gaps, of images whose channels do not come in vectors (the patch
embedding of a vision transformer): the image is rearranged into rows of patches, and the rest is a matrix product.
Called by `conv.py`."""

from __future__ import annotations

from math import prod

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.targets.cuda import pointwise
from engine.targets.cuda.conv_geometry import Geometry, pack_filter
from engine.targets.cuda.conv_simt import epilogue_for
from engine.targets.cuda.gemm import launches_of
from engine.targets.cuda.kernel import Context, Launch, Pointer, is_constant, pointer_to
from engine.targets.cuda.product import Matrix, Product, line_elements
from engine.targets.cuda.spaces import operand
from engine.targets.cuda.tiles import Operands, Tile, pick_mma, pick_wgmma

_LEAST_K = 64  # elements of a patch from which the product, not the rearranging, takes the time


def is_patches(step: Step, geometry: Geometry) -> bool:
    """Whether every input belongs to one window at most, and rows of patches are worth making."""
    element = step.inputs[1].dtype
    return (
        geometry.op_strides == geometry.kernel != (1, 1, 1)
        and geometry.op_dilations == (1, 1, 1)
        and not any(geometry.pads)
        and all(k * out <= size for k, out, size in zip(geometry.kernel, geometry.output, geometry.input, strict=True))
        and geometry.groups == 1
        and not geometry.transposed
        and is_constant(step.inputs[1])
        and geometry.k >= _LEAST_K
        and not (
            geometry.reads_chunks(16 // element.itemsize, element) and geometry.channels * element.itemsize % 16 == 0
        )
    )


def launch_patches(step: Step, geometry: Geometry, operands: Operands, context: Context) -> list[Launch]:
    """The launches of a convolution that `is_patches`."""
    x, element = step.inputs[0], step.inputs[1].dtype
    image, plane, row, pixel = geometry.x_strides
    kernel, output = geometry.kernel, geometry.output
    blocks = (geometry.images, *output)
    apart = (image, *(stride * size for stride, size in zip((plane, row, pixel), kernel, strict=True)))
    taps, channels = (kernel, (plane, row, pixel)), ((geometry.channels,), (geometry.x_channel,))
    # Elements of a patch in the order in which they lie in the image.
    inner = abs(geometry.x_channel) < abs(pixel)
    first, second = (taps, channels) if inner else (channels, taps)
    shape = (*blocks, *first[0], *second[0])
    source = Tensor(x.buffer, x.dtype, shape, (*apart, *first[1], *second[1]), x.offset)
    line = line_elements(geometry.k, element)
    within, patch = row_major((*first[0], *second[0])), row_major(blocks)
    nbytes = prod(blocks) * line * element.itemsize
    strides = (*(stride * line for stride in patch), *within)
    patches = Tensor(Buffer("patches", BufferKind.WORKSPACE, nbytes), element, shape, strides)
    copied = ex.cast(ex.cast(ex.Arg(0, x.dtype), DType.F32), element) if x.dtype is not element else ex.Arg(0, element)
    rearranged = pointwise.launches((copied,), {0: operand(source, len(shape))}, (patches,), context, "conv")

    def pack(w: np.ndarray) -> np.ndarray:
        if inner:
            return pack_filter(w, geometry, line)
        return np.pad(w.reshape(w.shape[0], -1), ((0, 0), (0, line - geometry.k))).reshape(-1)

    packed = context.weights.packed(step.inputs[1], f"patches,{'c' if inner else 'taps'} inner, lines", pack)
    filters = Matrix(Pointer(packed, ctype=pointer_to(step.inputs[1]).ctype), line, padded=True)
    product = Product(geometry.rows, geometry.n, geometry.k, element, Matrix(pointer_to(patches), line), filters)
    tile = _tile(product, operands, context)
    return [*rearranged, *launches_of(product, epilogue_for(step, geometry.n), tile, context, taken=nbytes)]


def _tile(product: Product, operands: Operands, context: Context) -> Tile:
    """The tile that should be fastest. The patches lie where the partial sums of a split product would."""
    if context.architecture.wgmma and product.suits_tma and operands is not Operands.EXACT:
        return pick_wgmma(product.m, product.n, product.k, context.multiprocessors, operands)
    return pick_mma(product.m, product.n, product.k, 1, context.architecture, context.multiprocessors, operands)
