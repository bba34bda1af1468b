"""Convolutions: 1×1 ones as matrix products, the rest as implicit ones (conv_mma.cuh), depthwise ones directly."""

from __future__ import annotations

from math import prod

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Conv, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Buffer, Tensor
from engine.targets.cuda.gemm import Product, epilogue_of, launch_product, pick_tile
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
from engine.targets.cuda.spaces import VECTOR, operand, space
from engine.targets.cuda.tiles import MmaTile, pick_mma

DEPTHWISE_THREADS = 128
_MAX_DEPTHWISE = 7  # kernel sizes up to here are unrolled


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Images in NHWC, but for those whose channels do not come in vectors. Weights are constants and are packed.

    An fp32 image is a model's input: it is read as it comes and rounded in the kernel, which saves a pass over it.
    """
    assert isinstance(op, Conv)
    x, w = inputs[0], inputs[1]
    if op.transposed or len(op.strides) > 2:
        raise UnsupportedOp(f"Conv with {len(op.strides)} spatial axes, transposed={op.transposed}: no CUDA kernel yet")
    if x.dtype not in (DType.F16, DType.F32) or w.dtype is not DType.F16:
        raise UnsupportedOp(f"Conv of {x.dtype.value} and {w.dtype.value}: the CUDA kernels take f16 (precision='fp16')")
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

    def arguments(self) -> dict[str, Argument]:
        """What both kernels of this module are told."""
        return {
            "x": self.x, "x_image": I64(self.x_strides[0]), "x_row": I64(self.x_strides[1]), "x_pixel": I64(self.x_strides[2]),
            "images": self.images, "in_h": self.input[0], "in_w": self.input[1], "out_h": self.output[0],
            "out_w": self.output[1], "stride_h": self.strides[0], "stride_w": self.strides[1], "pad_h": self.pads[0],
            "pad_w": self.pads[1], "dilation_h": self.dilations[0], "dilation_w": self.dilations[1],
        }  # fmt: skip


def lower(step: Step, context: Context) -> list[Launch]:
    assert isinstance(step.op, Conv)
    geometry = Geometry(step)
    w = step.inputs[1]
    # A depthwise kernel takes 8 channels at a time, whatever their groups.
    granularity = VECTOR if geometry.is_depthwise else geometry.n
    epilogue = epilogue_of(step, step.op.stores, channels_last(len(step.outputs[0].shape)), granularity)
    if geometry.is_depthwise:
        return [launch_depthwise(geometry, epilogue, context.weights.packed(w, "r,s,c", pack_depthwise))]
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
    return Product(geometry.rows, geometry.n, geometry.k, geometry.x, stride, packed, k_padded, True)


def pack_filter(w: np.ndarray) -> np.ndarray:
    """[n, c, *kernel] → [n, (*kernel, c)] with the rows padded to whole 16-byte chunks."""
    n = w.shape[0]
    rows = np.moveaxis(w, 1, -1).reshape(n, -1)
    packed = np.zeros((n, ceildiv(rows.shape[1], VECTOR) * VECTOR), np.float16)
    packed[:, : rows.shape[1]] = rows
    return packed


def pack_depthwise(w: np.ndarray) -> np.ndarray:
    """[c, 1, *kernel] → [*kernel, c]."""
    return np.ascontiguousarray(np.moveaxis(w[:, 0], 0, -1), np.float16)


def launch_conv(geometry: Geometry, epilogue: Functor, w: Pointer, tile: MmaTile) -> Launch:
    """The launch of an implicit product in the given tile."""
    tiles = ceildiv(geometry.rows, tile.m) * ceildiv(geometry.n, tile.n)
    return launch(
        "conv",
        "conv_mma.cuh",
        {**tile.config, "x_vector": geometry.x_vector, "x_t": geometry.x.ctype},
        [epilogue],
        {
            **geometry.arguments(), "x_channel": I64(geometry.x_channel), "w": w, "w_stride": I64(ceildiv(geometry.k, VECTOR) * VECTOR), "n": geometry.n,
            "k": geometry.k, "channels": geometry.channels, "kernel_w": geometry.kernel[1],
        },
        (tiles, geometry.groups, 1),
        tile.threads,
        tile.shared_bytes,
        Instruction.MMA,
    )  # fmt: skip


def launch_depthwise(geometry: Geometry, epilogue: Functor, w: Buffer) -> Launch:
    """The launch of a depthwise convolution: a thread for 8 channels of a strip of outputs."""
    strip = 4 if geometry.strides[1] == 1 else 2
    threads = geometry.images * geometry.output[0] * ceildiv(geometry.output[1], strip) * (geometry.groups // VECTOR)
    config: dict[str, int | bool | str] = {
        "kernel_h": geometry.kernel[0], "kernel_w": geometry.kernel[1], "stride_w": geometry.strides[1],
        "dilation_w": geometry.dilations[1], "strip": strip, "threads": DEPTHWISE_THREADS, "blocks": 4,
    }  # fmt: skip
    arguments = {**geometry.arguments(), "w": Pointer(w), "channels": geometry.groups}
    for name in ("stride_w", "dilation_w"):
        del arguments[name]
    grid = (ceildiv(threads, DEPTHWISE_THREADS), 1, 1)
    return launch("depthwise", "depthwise.cuh", config, [epilogue], arguments, grid, DEPTHWISE_THREADS)
