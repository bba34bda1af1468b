"""Convolutions outside the matrix units: small depthwise filters (depthwise.cuh), images with few channels
(conv_direct.cuh), and everything that no other kernel takes (conv_simt.cuh). Called by `conv.py`."""

from __future__ import annotations

from math import prod

from engine.ir.dtype import DType
from engine.ir.ops import Conv, ConvMax
from engine.plan.plan import Step
from engine.targets.cuda.conv_geometry import (
    AXES,
    Geometry,
    TapStrides,
    channels_last,
    pack_taps,
    tap_strides,
)
from engine.targets.cuda.gemm import epilogue_of
from engine.targets.cuda.kernel import (
    STORAGE,
    Argument,
    Context,
    Functor,
    Launch,
    Pointer,
    ceildiv,
    is_constant,
    launch,
    pointer_to,
)
from engine.targets.cuda.spaces import VECTOR

_MAX_DEPTHWISE = 7  # kernel sizes that the depthwise kernel has registers for
_MAX_DIRECT = 48  # filter elements per output up to which the fp32 units beat padded matrix tiles
_MAX_DIRECT_INPUTS = 48  # inputs of a row of taps that the same kernel has registers for
_DIRECT_PIXELS = 2  # neighbouring outputs that a thread of it computes


def epilogue_for(step: Step, granularity: int, acc: DType = DType.F32) -> Functor:
    """The epilogue of a convolution: columns are channels. `granularity` divides every one at which the kernel starts
    or ends; `acc` is the type of the sums."""
    assert isinstance(step.op, Conv | ConvMax)
    return epilogue_of(step, step.op.stores, channels_last(len(step.outputs[0].shape)), granularity, acc)


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
        return size <= 3 and (rows == 1 or stride == 1)
    return size <= 3 or (size <= 5 and max(geometry.dilations) == 1 and (rows == 1 or stride == 1))


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
    epilogue = epilogue_for(step, VECTOR)
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
    taps = geometry.kernel[-1]
    span = (_DIRECT_PIXELS - 1) * geometry.strides[-1] + (taps - 1) * geometry.dilations[-1] + 1
    inputs = min(span, _DIRECT_PIXELS * taps) * geometry.channels
    return (
        geometry.groups == 1
        and geometry.channels % VECTOR != 0
        and geometry.k <= _MAX_DIRECT
        and inputs <= _MAX_DIRECT_INPUTS
        and geometry.n % VECTOR == 0
        and not geometry.transposed
        and _is_narrow(step)
    )


def launch_direct(step: Step, geometry: Geometry, context: Context) -> Launch:
    """The launch of a convolution on the fp32 units: a thread for two outputs of up to 32 channels."""
    threads = 128
    outputs = next(count for count in (32, 16, 8) if geometry.n % count == 0)
    config: dict[str, int | bool | str] = {
        "channels": geometry.channels, "kernel_d": geometry.kernel[0], "kernel_h": geometry.kernel[1],
        "kernel_w": geometry.kernel[2], "stride_w": geometry.strides[2], "dilation_w": geometry.dilations[2],
        "pixels": _DIRECT_PIXELS, "outputs": outputs, "threads": threads, "blocks": 3, "x_t": geometry.x.ctype,
    }  # fmt: skip
    arguments = {**geometry.arguments(), "w": _taps(step, geometry, context, DType.F32)}
    for name in ("stride_w", "dilation_w"):
        del arguments[name]
    total = geometry.images * prod(geometry.output[:-1]) * ceildiv(geometry.output[-1], _DIRECT_PIXELS)
    grid = (ceildiv(total, threads), geometry.n // outputs, 1)
    return launch("conv", "conv_direct.cuh", config, [epilogue_for(step, geometry.n)], arguments, grid, threads)


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
    epilogue = epilogue_for(step, width, acc)
    return launch("conv", "conv_simt.cuh", config, [epilogue], arguments, (ceildiv(total, threads), 1, 1), threads)
