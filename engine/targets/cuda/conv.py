"""Convolutions: 1×1 ones as matrix products, the rest as implicit ones (conv_mma.cuh); depthwise ones (depthwise.cuh)
and those of images with few channels (conv_direct.cuh) on the fp32 units."""

from __future__ import annotations

from math import prod

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Conv, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Buffer, Tensor
from engine.targets.cuda.gemm import epilogue_of, launch_product, pick_tile
from engine.targets.cuda.kernel import (
    I64,
    Argument,
    Context,
    Functor,
    Instruction,
    Launch,
    Pointer,
    ceildiv,
    is_constant,
    launch,
    pointer_to,
)
from engine.targets.cuda.product import Matrix, Product
from engine.targets.cuda.spaces import VECTOR, operand, space
from engine.targets.cuda.tiles import MmaTile, Operands, pick_mma

_MAX_DEPTHWISE = 7  # kernel sizes up to here are unrolled
_MAX_DIRECT = 48  # filter elements per output up to which the fp32 units beat padded matrix tiles


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Images in NHWC, but for those whose channels do not come in vectors. Weights are constants and are packed.

    An fp32 image is a model's input: it is read as it comes and rounded in the kernel, which saves a pass over it.
    """
    assert isinstance(op, Conv)
    x, w = inputs[0], inputs[1]
    if op.transposed or len(op.strides) > 2:
        raise UnsupportedOp(f"Conv with {len(op.strides)} spatial axes, transposed={op.transposed}: no CUDA kernel yet")
    if x.dtype not in (DType.F16, DType.F32) or w.dtype is not DType.F16:
        raise UnsupportedOp(
            f"Conv of {x.dtype.value} and {w.dtype.value}: the CUDA kernels take f16 (precision='fp16')"
        )
    if not is_constant(w):
        raise UnsupportedOp("Conv with a computed weight: no CUDA kernel yet")
    image = Requirement(Access.INNER, channels_last(len(x.shape)))
    single = x.dtype is DType.F32 or (w.shape[1] % VECTOR and (op.groups == 1 or op.groups % VECTOR))
    return (
        (Requirement() if single else image, Requirement(), *(Requirement() for _ in inputs[2:])),
        tuple(image for _ in op.stores),
    )


def channels_last(rank: int) -> tuple[int, ...]:
    """The order of NHWC, for logical N, C, spatial axes."""
    return (0, *range(2, rank), 1)


class Geometry:
    """A convolution's sizes as two spatial axes (a 1-D one has height 1)."""

    def __init__(self, step: Step) -> None:
        op = step.op
        assert isinstance(op, Conv)
        x, w, y = step.inputs[0], step.inputs[1], step.outputs[0]
        flat = len(op.strides) == 1
        self.images = x.shape[0]
        self.groups = op.groups
        self.channels = w.shape[1]  # per group
        self.n = w.shape[0] // op.groups
        self.input = (1, *x.shape[2:])[-2:]
        self.output = (1, *y.shape[2:])[-2:]
        self.kernel = (1, *w.shape[2:])[-2:]
        self.strides = (1, *op.strides)[-2:]
        self.dilations = (1, *op.dilations)[-2:]
        self.pads = (0, *(begin for begin, _ in op.pads))[-2:]
        strides = operand(x, len(x.shape)).strides  # 0 for axes of size 1
        self.x_strides = (strides[0], 0 if flat else strides[2], strides[-1])  # image, row, pixel
        self.x_channel = strides[1] or 1
        self.x = pointer_to(x)
        self.rows = self.images * prod(self.output)
        self.k = prod(self.kernel) * self.channels

    @property
    def x_vector(self) -> bool:
        """Whether channels can be read in 16-byte chunks."""
        return self.channels % VECTOR == 0 and self._pixels_aligned

    @property
    def _pixels_aligned(self) -> bool:
        """Whether every pixel is a run of halves that starts on a 16-byte boundary."""
        whole = self.x.ctype == "half" and self.x_channel == 1
        return whole and all(count % VECTOR == 0 for count in (*self.x_strides, self.x.offset // 2))

    @property
    def is_depthwise(self) -> bool:
        return (
            self.channels == 1
            and self.n == 1
            and self.groups % VECTOR == 0
            and max(self.kernel) <= _MAX_DEPTHWISE
            and self._pixels_aligned
        )

    @property
    def is_direct(self) -> bool:
        """Whether the image has so few channels that its products do not fill matrix tiles."""
        return self.groups == 1 and self.channels % VECTOR != 0 and self.k <= _MAX_DIRECT and self.n % VECTOR == 0

    def arguments(self) -> dict[str, Argument]:
        """What the kernels of this module are told."""
        return {
            "x": self.x, "x_image": I64(self.x_strides[0]), "x_row": I64(self.x_strides[1]),
            "x_pixel": I64(self.x_strides[2]),
            "images": self.images, "in_h": self.input[0], "in_w": self.input[1], "out_h": self.output[0],
            "out_w": self.output[1], "stride_h": self.strides[0], "stride_w": self.strides[1], "pad_h": self.pads[0],
            "pad_w": self.pads[1], "dilation_h": self.dilations[0], "dilation_w": self.dilations[1],
        }  # fmt: skip


def lower(step: Step, context: Context) -> list[Launch]:
    assert isinstance(step.op, Conv)
    geometry = Geometry(step)
    w = step.inputs[1]
    # The depthwise kernel takes 8 channels at a time, whatever their groups.
    granularity = VECTOR if geometry.is_depthwise else geometry.n
    epilogue = epilogue_of(step, step.op.stores, channels_last(len(step.outputs[0].shape)), granularity)
    if geometry.is_depthwise:
        taps = context.weights.packed(w, "f32 r,s,c", pack_depthwise)
        return [launch_depthwise(geometry, epilogue, taps, context.multiprocessors)]
    if geometry.is_direct:
        return [launch_direct(geometry, epilogue, context.weights.packed(w, "f32 r,s,c,n", pack_direct))]
    packed = Pointer(context.weights.packed(w, "n,rsc8", pack_filter))
    product = _as_product(step, geometry, packed)
    if product is not None:
        return [launch_product(product, epilogue, pick_tile(product, context), context)]
    tile = pick_mma(
        geometry.rows, geometry.n, geometry.k, geometry.groups, context.architecture, context.multiprocessors
    )
    return [launch_conv(geometry, epilogue, packed, tile)]


def _as_product(step: Step, geometry: Geometry, packed: Pointer) -> Product | None:
    """A 1×1 convolution whose pixels lie evenly apart, as a product of [pixels, channels] and the filter."""
    op = step.op
    assert isinstance(op, Conv)
    pointwise = geometry.kernel == (1, 1) and geometry.groups == 1 and op.is_pointwise
    pointwise &= geometry.x.ctype == "half" and geometry.x_channel == 1
    x = step.inputs[0]
    order = channels_last(len(x.shape))
    pixels = space(x.shape, order[:-1], order[-1:], [operand(x, len(x.shape))])
    if not pointwise or len(pixels.levels) > 1:
        return None
    k_padded = ceildiv(geometry.k, VECTOR) * VECTOR
    stride = pixels.operands[0].strides[0] or k_padded
    a, b = Matrix(geometry.x, stride), Matrix(packed, k_padded, padded=True)
    return Product(geometry.rows, geometry.n, geometry.k, DType.F16, a, b)


def pack_filter(w: np.ndarray) -> np.ndarray:
    """[n, c, *kernel] → [n, (*kernel, c)] with the rows padded to whole 16-byte chunks."""
    n = w.shape[0]
    rows = np.moveaxis(w, 1, -1).reshape(n, -1)
    packed = np.zeros((n, ceildiv(rows.shape[1], VECTOR) * VECTOR), np.float16)
    packed[:, : rows.shape[1]] = rows
    return packed


def pack_depthwise(w: np.ndarray) -> np.ndarray:
    """[c, 1, *kernel] → [*kernel, c] in fp32."""
    return np.ascontiguousarray(np.moveaxis(w[:, 0], 0, -1), np.float32)


def pack_direct(w: np.ndarray) -> np.ndarray:
    """[n, c, *kernel] → [*kernel, c, n] in fp32."""
    return np.ascontiguousarray(np.moveaxis(w, (0, 1), (-1, -2)), np.float32)


def launch_conv(geometry: Geometry, epilogue: Functor, w: Pointer, tile: MmaTile) -> Launch:
    """The launch of an implicit product in the given tile."""
    tiles = ceildiv(geometry.rows, tile.m) * ceildiv(geometry.n, tile.n)
    return launch(
        "conv",
        "conv_mma.cuh",
        {**tile.config(Operands.HALF), "x_vector": geometry.x_vector, "x_t": geometry.x.ctype},
        [epilogue],
        {
            **geometry.arguments(), "x_channel": I64(geometry.x_channel), "w": w,
            "w_stride": I64(ceildiv(geometry.k, VECTOR) * VECTOR), "n": geometry.n,
            "k": geometry.k, "channels": geometry.channels, "kernel_w": geometry.kernel[1],
        },
        (tiles, geometry.groups, 1),
        tile.threads,
        tile.shared_bytes,
        Instruction.MMA,
    )  # fmt: skip


# Outputs a thread of the depthwise kernel computes, rows × columns: more reuse, or more threads.
_PATCHES = ((2, 4), (1, 4), (1, 2))
_SMALL_PATCHES = ((2, 2), (1, 2), (1, 1))
_SMALLEST_PATCHES = ((1, 2), (1, 1))


def launch_depthwise(geometry: Geometry, epilogue: Functor, w: Buffer, multiprocessors: int) -> Launch:
    """The launch of a depthwise convolution: the largest patch that still gives every multiprocessor some warps."""

    def threads_for(patch: tuple[int, int]) -> int:
        patches = ceildiv(geometry.output[0], patch[0]) * ceildiv(geometry.output[1], patch[1])
        return geometry.images * patches * 4 * ceildiv(geometry.groups // VECTOR, 4)

    # At stride 2, or with a large filter, a patch of the same size spans more inputs than there are registers for.
    wide = geometry.strides[1] > 1 or max(geometry.kernel) > 3
    patches = _SMALLEST_PATCHES if max(geometry.dilations) > 1 else _SMALL_PATCHES if wide else _PATCHES
    patch = next((p for p in patches if threads_for(p) >= multiprocessors * 512), patches[-1])
    total = threads_for(patch)
    threads = 128 if total >= multiprocessors * 256 else 64
    config: dict[str, int | bool | str] = {
        "kernel_h": geometry.kernel[0], "kernel_w": geometry.kernel[1], "stride_h": geometry.strides[0],
        "stride_w": geometry.strides[1], "dilation_h": geometry.dilations[0], "dilation_w": geometry.dilations[1],
        "rows": patch[0], "strip": patch[1], "threads": threads, "blocks": 256 // threads,
    }  # fmt: skip
    arguments = {**geometry.arguments(), "w": Pointer(w, ctype="float"), "channels": geometry.groups}
    for name in ("stride_h", "stride_w", "dilation_h", "dilation_w"):
        del arguments[name]
    return launch("depthwise", "depthwise.cuh", config, [epilogue], arguments, (ceildiv(total, threads), 1, 1), threads)


def launch_direct(geometry: Geometry, epilogue: Functor, w: Buffer) -> Launch:
    """The launch of a convolution on the fp32 units: a thread for two outputs of up to 32 channels."""
    pixels, threads = 2, 128
    outputs = next(count for count in (32, 16, 8) if geometry.n % count == 0)
    config: dict[str, int | bool | str] = {
        "channels": geometry.channels, "kernel_h": geometry.kernel[0], "kernel_w": geometry.kernel[1],
        "stride_w": geometry.strides[1], "dilation_w": geometry.dilations[1], "pixels": pixels, "outputs": outputs,
        "threads": threads, "blocks": 3, "x_t": geometry.x.ctype,
    }  # fmt: skip
    arguments = {
        **geometry.arguments(), "x_channel": I64(geometry.x_channel), "w": Pointer(w, ctype="float"), "n": geometry.n,
    }  # fmt: skip
    for name in ("stride_w", "dilation_w"):
        del arguments[name]
    total = geometry.images * geometry.output[0] * ceildiv(geometry.output[1], pixels)
    grid = (ceildiv(total, threads), geometry.n // outputs, 1)
    return launch("conv", "conv_direct.cuh", config, [epilogue], arguments, grid, threads)
