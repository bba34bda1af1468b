"""Convolutions: which kernel runs which, and their launches.

1×1 ones are matrix products (gemm.py); the rest is an implicit product on the matrix units (conv_mma.cuh), but for
small depthwise filters (depthwise.cuh), images with few channels (conv_direct.cuh), and what fits none of these
(conv_simt.cuh).
"""

from __future__ import annotations

from math import prod

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Conv, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda.conv_geometry import (
    AXES,
    Geometry,
    TapStrides,
    pack_filter,
    pack_taps,
    phase_table,
    row_length,
    tap_strides,
)
from engine.targets.cuda.gemm import epilogue_of, launch_product, pick_tile, split_arguments
from engine.targets.cuda.kernel import (
    I64,
    STORAGE,
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

_MAX_DEPTHWISE = 7  # kernel rows up to here are unrolled
_MAX_DIRECT = 48  # filter elements per output up to which the fp32 units beat padded matrix tiles
_MAX_DIRECT_WIDTH = 16  # taps of a row that the same kernel has registers for
_MOST_SPLITS = 24
_MOST_BLOCKS = 65535  # along the second and third axis of a grid
_SIMT_COST = 12  # the time of a multiply-add outside the matrix units beside one of fp16 inside, with what it loads


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Images in NHWC, but for those whose channels do not come in vectors. Weights have any layout.

    An fp32 image beside narrow weights is a model's input: it is read as it comes and rounded in the kernel, which saves
    a pass over it.
    """
    assert isinstance(op, Conv)
    x, w = inputs[0], inputs[1]
    if len(op.strides) > len(AXES):
        raise UnsupportedOp(f"Conv with {len(op.strides)} spatial axes: the CUDA target has at most {len(AXES)}")
    if not x.dtype.is_float or not w.dtype.is_float:
        raise UnsupportedOp(f"Conv of {x.dtype.value} and {w.dtype.value}: the CUDA target convolves floats")
    image = Requirement(Access.INNER, channels_last(len(x.shape)))
    scattered = op.groups == 1 and x.shape[1] * x.dtype.itemsize % 16 != 0
    as_it_comes = x.dtype.itemsize > w.dtype.itemsize or scattered
    return (
        (Requirement() if as_it_comes else image, Requirement(), *(Requirement() for _ in inputs[2:])),
        tuple(image for _ in op.stores),
    )


def channels_last(rank: int) -> tuple[int, ...]:
    """The order of NHWC, for logical N, C, spatial axes."""
    return (0, *range(2, rank), 1)


def lower(step: Step, context: Context) -> list[Launch]:
    assert isinstance(step.op, Conv)
    geometry = Geometry(step)
    if not step.outputs[0].elements:
        return []
    if is_depthwise(step, geometry):
        return [launch_depthwise(step, geometry, context)]
    if is_direct(step, geometry):
        return [launch_direct(step, geometry, context)]
    operands = operands_of(step, context)
    if operands is None or _prefers_simt(geometry, operands):
        return [launch_simt(step, geometry, context)]
    if _is_product(step, geometry):
        return _lower_product(step, geometry, context)
    filters, packing = filters_of(step, geometry, context)
    batch = geometry.groups * len(geometry.phases)
    k = geometry.phases[0].k
    # The filters that a launch has just packed lie where the sums of a split product would.
    splits = 1 if packing else _MOST_SPLITS
    tile = pick_mma(
        geometry.rows, geometry.n, k, batch, context.architecture, context.multiprocessors, operands, splits
    )
    return [*packing, launch_conv(step, geometry, filters, tile, context)]


def _epilogue(step: Step, granularity: int, acc: DType = DType.F32) -> Functor:
    assert isinstance(step.op, Conv)
    return epilogue_of(step, step.op.stores, channels_last(len(step.outputs[0].shape)), granularity, acc)


def operands_of(step: Step, context: Context) -> Operands | None:
    """What the matrix units would multiply, if they take such operands. Images may be wider than weights."""
    x, w = step.inputs[0].dtype, step.inputs[1].dtype
    if w in (DType.F16, DType.BF16) and x in (w, DType.F32):
        return Operands.HALF
    if x is w is DType.F32:
        return Operands.TF32 if context.tf32 else Operands.EXACT
    return None


def _prefers_simt(geometry: Geometry, operands: Operands) -> bool:
    """Whether matrix tiles would be too empty, or the kernel that fills them cannot run it."""
    phases = geometry.phases
    if max(geometry.groups, len(phases) * _MOST_SPLITS) > _MOST_BLOCKS or not any(phase.k for phase in phases):
        return True
    padded = ceildiv(geometry.n, 32) * 32 * ceildiv(geometry.k, 64) * 64 * operands.slowness
    return geometry.groups > 1 and _SIMT_COST * geometry.n * geometry.k < padded


# Products


def _is_product(step: Step, geometry: Geometry) -> bool:
    """Whether it is a product of [pixels, channels] and the filter: 1×1, and pixels that lie evenly apart."""
    x = step.inputs[0]
    order = channels_last(len(x.shape))
    pixels = space(x.shape, order[:-1], order[-1:], [operand(x, len(x.shape))])
    return (
        prod(geometry.kernel) == geometry.groups == prod(geometry.op_strides) == 1
        and not any(geometry.pads)
        and geometry.input == geometry.output
        and x.dtype is step.inputs[1].dtype
        and geometry.x_channel == 1
        and len(pixels.levels) <= 1
    )


def _lower_product(step: Step, geometry: Geometry, context: Context) -> list[Launch]:
    x, w = step.inputs[0], step.inputs[1]
    per_chunk = 16 // w.dtype.itemsize
    order = channels_last(len(x.shape))
    (pixels,) = space(x.shape, order[:-1], order[-1:], [operand(x, len(x.shape))]).operands
    a = Matrix(geometry.x, pixels.strides[0] or row_length(geometry.k, per_chunk))
    packing: list[Launch] = []
    lies = tap_strides(w, geometry)
    if not is_constant(w) and 1 in (lies.channel, lies.column):
        k_inner = lies.channel == 1
        b = Matrix(pointer_to(w), lies.column if k_inner else lies.channel, k_inner)
    else:
        filters, packing = filters_of(step, geometry, context)
        b = Matrix(filters, row_length(geometry.k, per_chunk), padded=True)
    product = Product(geometry.rows, geometry.n, geometry.k, w.dtype, a, b)
    epilogue = _epilogue(step, geometry.n)
    return [*packing, launch_product(product, epilogue, pick_tile(product, context), context)]


# Implicit products


def filters_of(step: Step, geometry: Geometry, context: Context) -> tuple[Pointer, list[Launch]]:
    """The weights as conv_mma.cuh reads them, and the launch that makes them where they are computed."""
    w = step.inputs[1]
    per_chunk = 16 // w.dtype.itemsize
    if is_constant(w):
        taps = [axis.taps for phase in geometry.phases for axis in phase.axes]
        layout = f"phase,g,n,taps,c{per_chunk} g{geometry.groups} {geometry.transposed} {taps}"
        packed = context.weights.packed(w, layout, lambda data: pack_filter(data, geometry, per_chunk))
        return Pointer(packed, ctype=STORAGE[w.dtype]), []
    lengths = [row_length(phase.k, per_chunk) for phase in geometry.phases]
    rows = geometry.groups * geometry.n
    packing = Buffer("filters", BufferKind.WORKSPACE, rows * sum(lengths) * w.dtype.itemsize)
    filters = Pointer(packing, ctype=STORAGE[w.dtype])
    lies = tap_strides(w, geometry)
    arguments: dict[str, Argument] = {
        "w": pointer_to(w), "packed": filters, **lies.arguments(), **_phase_arguments(geometry, per_chunk),
        "groups": geometry.groups, "n": geometry.n, "channels": geometry.channels,
    }  # fmt: skip
    config: dict[str, int | bool | str] = {
        "threads": 128, "phased": len(lengths) > 1, "transposed": geometry.transposed, "w_t": STORAGE[w.dtype],
    }  # fmt: skip
    grid = (ceildiv(max(lengths), 128), min(rows, _MOST_BLOCKS), len(lengths))
    return filters, [launch("conv", "conv_pack.cuh", config, [], arguments, grid, 128)]


def _phase_arguments(geometry: Geometry, per_chunk: int) -> dict[str, Argument]:
    """The phases of a transposed convolution as a table, or the one there is as arguments."""
    steps: dict[str, Argument] = {f"tap_step_{axis}": step for axis, step in zip(AXES, geometry.tap_steps, strict=True)}
    phases = geometry.phases
    if len(phases) > 1:
        starts = {f"step_{axis}": step for axis, step in zip(AXES, geometry.op_strides, strict=True)}
        return {"phases": phase_table(geometry, per_chunk), **starts, **steps}
    (phase,) = phases
    first = {f"first_{axis}": (along.taps or (0,))[0] for axis, along in zip(AXES, phase.axes, strict=True)}
    kernel = {f"kernel_{axis}": size for axis, size in zip(AXES, phase.kernel, strict=True)}
    return {**steps, **first, **kernel, "k": phase.k, "w_stride": row_length(phase.k, per_chunk)}


def launch_conv(step: Step, geometry: Geometry, filters: Pointer, tile: MmaTile, context: Context) -> Launch:
    """The launch of an implicit product in the given tile."""
    element, operands = step.inputs[1].dtype, operands_of(step, context)
    assert operands is not None
    per_chunk = 16 // element.itemsize
    tiles, phases = ceildiv(geometry.rows, tile.m) * ceildiv(geometry.n, tile.n), len(geometry.phases)
    return launch(
        "conv",
        "conv_mma.cuh",
        {
            **tile.config(operands), "operand": STORAGE[element], "x_t": geometry.x.ctype,
            "x_vector": geometry.reads_chunks(per_chunk, element) and geometry.channels % per_chunk == 0,
            "depth": geometry.axes == len(AXES), "phased": phases > 1,
        },
        [_epilogue(step, geometry.n)],
        {
            **geometry.arguments(), **_phase_arguments(geometry, per_chunk), "w": filters,
            **split_arguments(tiles * geometry.groups * phases, tile.m * tile.n, tile.threads // 32, tile.splits),
        },
        (tiles, geometry.groups, phases * tile.splits),
        tile.threads,
        tile.shared_bytes,
        Instruction.MMA,
    )  # fmt: skip


# Depthwise filters

# Outputs a thread of the depthwise kernel computes, rows × columns: more reuse, or more threads.
_PATCHES = ((2, 4), (1, 4), (1, 2))
_SMALL_PATCHES = ((2, 2), (1, 2), (1, 1))
_SMALLEST_PATCHES = ((1, 2), (1, 1))
_DEPTHWISE_VALUES = 20  # vectors of inputs and outputs that a thread has registers for


def _patches(geometry: Geometry) -> list[tuple[int, int]]:
    """The patches that suit a depthwise convolution, large ones first."""
    # At stride 2, or with a large filter, a patch of the same size spans more inputs than there are registers for.
    wide = geometry.strides[-1] > 1 or max(geometry.kernel) > 3
    patches = _SMALLEST_PATCHES if max(geometry.dilations) > 1 else _SMALL_PATCHES if wide else _PATCHES
    span = (geometry.kernel[-1] - 1) * geometry.dilations[-1] + 1

    def fits(rows: int, columns: int) -> bool:
        values = (columns - 1) * geometry.strides[-1] + span + rows * columns
        return values <= _DEPTHWISE_VALUES and rows <= geometry.output[-2]

    return [patch for patch in patches if fits(*patch)]


def _unrolls(geometry: Geometry, rows: int) -> bool:
    """Whether registers hold the inputs of all rows of a filter: beyond, the compiler would spill them."""
    size, stride = max(geometry.kernel), geometry.strides[-1]
    if geometry.x_dtype is not DType.F16:
        return size <= 3 and (rows == 1 or stride <= 2)
    return size <= 3 or (size <= 5 and (rows == 1 or stride == 1))


def is_depthwise(step: Step, geometry: Geometry) -> bool:
    """Whether the kernel for depthwise filters runs it."""
    return (
        geometry.channels == geometry.n == 1
        and geometry.groups % VECTOR == 0
        and not geometry.transposed
        and geometry.axes < len(AXES)
        and max(geometry.kernel) <= _MAX_DEPTHWISE
        and _is_narrow(step)
        and geometry.reads_chunks(VECTOR, geometry.x_dtype)
        and bool(_patches(geometry))
    )


def _is_narrow(step: Step) -> bool:
    """Whether weights are known, and neither they nor the image need fp64."""
    return is_constant(step.inputs[1]) and DType.F64 not in (step.inputs[0].dtype, step.inputs[1].dtype)


def launch_depthwise(step: Step, geometry: Geometry, context: Context) -> Launch:
    """The launch of a depthwise convolution: the largest patch that still gives every multiprocessor some warps."""

    def threads_for(patch: tuple[int, int]) -> int:
        patches = ceildiv(geometry.output[-2], patch[0]) * ceildiv(geometry.output[-1], patch[1])
        return geometry.images * patches * 4 * ceildiv(geometry.groups // VECTOR, 4)

    patches = _patches(geometry)
    patch = next((p for p in patches if threads_for(p) >= context.multiprocessors * 512), patches[-1])
    total = threads_for(patch)
    threads = 128 if total >= context.multiprocessors * 256 else 64
    config: dict[str, int | bool | str] = {
        "kernel_h": geometry.kernel[1], "kernel_w": geometry.kernel[2], "stride_h": geometry.strides[1],
        "stride_w": geometry.strides[2], "dilation_h": geometry.dilations[1], "dilation_w": geometry.dilations[2],
        "rows": patch[0], "strip": patch[1], "unrolled": _unrolls(geometry, patch[0]), "threads": threads,
        "blocks": 256 // threads, "x_t": geometry.x.ctype,
    }  # fmt: skip
    arguments = {**geometry.arguments(), "w": _taps(step, geometry, context, DType.F32), "channels": geometry.groups}
    for name in ("stride_h", "stride_w", "dilation_h", "dilation_w"):
        del arguments[name]
    # The kernel takes 8 channels at a time, whatever their groups.
    epilogue = _epilogue(step, VECTOR)
    return launch("depthwise", "depthwise.cuh", config, [epilogue], arguments, (ceildiv(total, threads), 1, 1), threads)


def _taps(step: Step, geometry: Geometry, context: Context, dtype: DType) -> Pointer:
    """Constant weights as [*kernel, c, (group, n)] of `dtype`."""
    groups, transposed = geometry.groups, geometry.transposed
    layout = f"taps,c,gn {dtype.value} g{groups} {transposed}"
    packed = context.weights.packed(step.inputs[1], layout, lambda w: pack_taps(w, groups, transposed, dtype))
    return Pointer(packed, ctype=STORAGE[dtype])


# Images with few channels


def is_direct(step: Step, geometry: Geometry) -> bool:
    """Whether the image has so few channels that its products do not fill matrix tiles."""
    return (
        geometry.groups == 1
        and geometry.channels % VECTOR != 0
        and geometry.k <= _MAX_DIRECT
        and geometry.kernel[-1] <= _MAX_DIRECT_WIDTH
        and geometry.n % VECTOR == 0
        and not geometry.transposed
        and _is_narrow(step)
    )


def launch_direct(step: Step, geometry: Geometry, context: Context) -> Launch:
    """The launch of a convolution on the fp32 units: a thread for two outputs of up to 32 channels."""
    pixels, threads = 2, 128
    outputs = next(count for count in (32, 16, 8) if geometry.n % count == 0)
    config: dict[str, int | bool | str] = {
        "channels": geometry.channels, "kernel_d": geometry.kernel[0], "kernel_h": geometry.kernel[1],
        "kernel_w": geometry.kernel[2], "stride_w": geometry.strides[2], "dilation_w": geometry.dilations[2],
        "pixels": pixels, "outputs": outputs, "threads": threads, "blocks": 3, "x_t": geometry.x.ctype,
    }  # fmt: skip
    arguments = {**geometry.arguments(), "w": _taps(step, geometry, context, DType.F32)}
    for name in ("stride_w", "dilation_w"):
        del arguments[name]
    total = geometry.images * prod(geometry.output[:-1]) * ceildiv(geometry.output[-1], pixels)
    grid = (ceildiv(total, threads), geometry.n // outputs, 1)
    return launch("conv", "conv_direct.cuh", config, [_epilogue(step, geometry.n)], arguments, grid, threads)


# Everything else


def launch_simt(step: Step, geometry: Geometry, context: Context) -> Launch:
    """The launch of any convolution outside the matrix units."""
    x, w = step.inputs[0], step.inputs[1]
    acc = DType.F64 if DType.F64 in (x.dtype, w.dtype) else DType.F32
    depthwise = geometry.channels == geometry.n == 1
    width = VECTOR if (geometry.groups if depthwise else geometry.n) % VECTOR == 0 else 1
    threads = 128
    if is_constant(w):
        taps = _taps(step, geometry, context, acc)
        columns = geometry.groups * geometry.n
        plane, row, tap = (prod(geometry.kernel[i:]) * geometry.channels * columns for i in (1, 2, 3))
        lies = TapStrides(geometry.n, 1, columns, (plane, row, tap))
    else:
        taps, lies = pointer_to(w), tap_strides(w, geometry)
    config: dict[str, int | bool | str] = {
        "width": width, "threads": threads, "depthwise": depthwise, "transposed": geometry.transposed,
        "x_vector": width > 1 and depthwise and geometry.reads_chunks(VECTOR, x.dtype),
        "w_vector": width > 1 and is_constant(w), "x_t": geometry.x.ctype, "w_t": taps.ctype, "sum_t": STORAGE[acc],
    }  # fmt: skip
    arguments: dict[str, Argument] = {
        **geometry.arguments(), "w": taps, **lies.arguments(), "groups": geometry.groups,
        **{f"kernel_{axis}": size for axis, size in zip(AXES, geometry.kernel, strict=True)},
        **{f"tap_step_{axis}": step for axis, step in zip(AXES, geometry.tap_steps, strict=True)},
        **{f"move_{axis}": move for axis, move in zip(AXES, geometry.dilations, strict=True)},
        # The kernel finds the phase of an output itself.
        **{f"stride_{axis}": stride for axis, stride in zip(AXES, geometry.op_strides, strict=True)},
        **{f"pad_{axis}": pad for axis, pad in zip(AXES, geometry.pads, strict=True)},
        **{f"dilation_{axis}": dilation for axis, dilation in zip(AXES, geometry.op_dilations, strict=True)},
    }  # fmt: skip
    total = geometry.pixels * geometry.groups * geometry.n // width
    epilogue = _epilogue(step, width, acc)
    return launch("conv", "conv_simt.cuh", config, [epilogue], arguments, (ceildiv(total, threads), 1, 1), threads)
