"""Convolutions: which kernel runs which, and those of the matrix units.

1×1 ones are matrix products (gemm.py), the rest implicit ones (conv_halo.py and conv_wgmma.py on sm_90a where the copy
engine can gather the image, else conv_mma.cuh), but for images with few channels (conv_stem.py), patches that do not
overlap (conv_patch.py), depthwise filters (depthwise.py, depthwise_rows.py), and those that the ordinary units do
better, or that only they can do (conv_simt.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from math import prod

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Conv, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import conv_halo, conv_halo_deep, conv_wgmma, depthwise_rows
from engine.targets.cuda.conv_choices import ConvTile, T
from engine.targets.cuda.conv_geometry import (
    AXES,
    Geometry,
    channels_last,
    pack_filter,
    phase_table,
    row_length,
    tap_strides,
)
from engine.targets.cuda.conv_halo import HaloTile
from engine.targets.cuda.conv_halo_deep import DeepTile
from engine.targets.cuda.conv_patch import is_patches, launch_patches
from engine.targets.cuda.conv_simt import (
    epilogue_for,
    is_depthwise,
    is_direct,
    launch_depthwise,
    launch_direct,
    launch_simt,
)
from engine.targets.cuda.conv_stem import StemTile, is_stem, launch_stem
from engine.targets.cuda.conv_tiles import depthwise_tiles, implicit_tiles, stem_tiles, taken
from engine.targets.cuda.depthwise import DepthwiseTile, is_depthwise_product, launch_depthwise_product
from engine.targets.cuda.depthwise_tiles import RowsTile
from engine.targets.cuda.gemm import launches_of, pick_tile
from engine.targets.cuda.gemm_wgmma import split_arguments
from engine.targets.cuda.kernel import (
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
    workspace,
)
from engine.targets.cuda.product import Matrix, Product, line_elements
from engine.targets.cuda.spaces import operand, space
from engine.targets.cuda.tiles import MOST_SPLITS, Choice, MmaTile, Operands, WgmmaTile

_MOST_BLOCKS = 65535  # along the second and third axis of a grid
_DIRECT_OUTPUTS = 64 * 128
"""The results that fill a multiprocessor with threads of conv_direct.cuh. A 1×1 convolution of fewer (that of a
squeeze-and-excite layer, of 1×1 images) is a product: lanes share the channels that one thread would walk through."""
_SIMT_COST = 12  # the time of a multiply-add outside the matrix units beside one of fp16 inside, with what it loads


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Images in NHWC, but for those whose channels do not come in vectors. Weights have any layout.

    An fp32 image beside narrow weights is a model's input: it is read as it comes and rounded in the kernel, which
    saves a pass over it.
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


class _Way(Enum):
    """The kernels that a convolution can run in."""

    DEPTHWISE_PRODUCT = auto()
    DEPTHWISE = auto()
    STEM = auto()
    DIRECT = auto()
    SIMT = auto()
    PATCHES = auto()
    PRODUCT = auto()
    IMPLICIT = auto()


def _way(step: Step, geometry: Geometry, context: Context) -> _Way:
    if step.inputs[0].dtype is step.inputs[1].dtype is DType.F8E4M3:  # of which only products reach the matrix units
        return _Way.PRODUCT if _is_product(step, geometry) else _Way.SIMT
    if is_depthwise_product(step, geometry, context):
        return _Way.DEPTHWISE_PRODUCT
    if is_depthwise(step, geometry):
        return _Way.DEPTHWISE
    operands = operands_of(step, context)
    few = geometry.rows * geometry.n <= _DIRECT_OUTPUTS * context.multiprocessors
    if not (few and operands and geometry.k and _is_product(step, geometry)):
        if is_stem(step, geometry, context):
            return _Way.STEM
        if is_direct(step, geometry):
            return _Way.DIRECT
    if operands is None or _prefers_simt(geometry, operands):
        return _Way.SIMT
    if is_patches(step, geometry):
        return _Way.PATCHES
    return _Way.PRODUCT if _is_product(step, geometry) else _Way.IMPLICIT


def lower(step: Step, context: Context) -> list[Launch]:
    assert isinstance(step.op, Conv)
    geometry, operands = Geometry(step), operands_of(step, context)
    if not step.outputs[0].elements:
        return []
    match _way(step, geometry, context):
        case _Way.DEPTHWISE_PRODUCT:
            return _lower_taken(step, geometry, depthwise_tiles(step, geometry, context), context)
        case _Way.DEPTHWISE:
            return [launch_depthwise(step, geometry, context)]
        case _Way.STEM:
            return _lower_taken(step, geometry, stem_tiles(geometry, context), context)
        case _Way.DIRECT:
            return [launch_direct(step, geometry, context)]
        case _Way.SIMT:
            return [launch_simt(step, geometry, context)]
        case _Way.PATCHES:
            assert operands is not None
            return launch_patches(step, geometry, operands, context)
        case _Way.PRODUCT:
            product, epilogue = _product(step, geometry, context)
            return launches_of(product, epilogue, pick_tile(product, epilogue, context), context)
        case _Way.IMPLICIT:
            assert operands is not None
            return _lower_taken(step, geometry, implicit_tiles(step, geometry, operands, context), context)


def parts_of(step: Step, context: Context) -> tuple[Product, Functor] | None:
    """The product and the epilogue of a convolution that runs as a product; None for others."""
    geometry = Geometry(step)
    if not step.outputs[0].elements or _way(step, geometry, context) is not _Way.PRODUCT:
        return None
    return _product(step, geometry, context)


def tiles_of(step: Step, context: Context) -> Sequence[Choice[ConvTile]]:
    """The tiles that a convolution can run in, from what should be the fastest on, where there is a choice; none where
    there is none, or it runs as a product."""
    geometry, operands = Geometry(step), operands_of(step, context)
    if not step.outputs[0].elements:
        return ()
    match _way(step, geometry, context):
        case _Way.DEPTHWISE_PRODUCT:
            return depthwise_tiles(step, geometry, context)
        case _Way.STEM:
            return stem_tiles(geometry, context)
        case _Way.IMPLICIT:
            assert operands is not None
            return implicit_tiles(step, geometry, operands, context)
    return ()


def _lower_taken(step: Step, geometry: Geometry, tiles: Sequence[Choice[T]], context: Context) -> list[Launch]:
    return lower_in(step, geometry, taken(tiles, step, step, context), context)


def lower_in(step: Step, geometry: Geometry, tile: ConvTile, context: Context) -> list[Launch]:
    """The launches of a convolution in one of its `tiles_of`."""
    if isinstance(tile, StemTile):
        return [launch_stem(step, geometry, context, tile)]
    if isinstance(tile, DepthwiseTile):
        return [launch_depthwise_product(step, geometry, context, tile)]
    if isinstance(tile, RowsTile):
        return [depthwise_rows.launch_rows(step, geometry, tile, context)]
    if isinstance(tile, DeepTile):
        filters, _ = filters_of(step, geometry, context, conv_halo_deep.panel_channels(tile, step))
        return [conv_halo_deep.launch_deep(step, geometry, filters, tile, context)]
    if isinstance(tile, HaloTile):
        filters, _ = filters_of(step, geometry, context, conv_halo.panel_channels(step))
        return [conv_halo.launch_halo(step, geometry, filters, tile, context)]
    if isinstance(tile, WgmmaTile):
        filters, packing = filters_of(step, geometry, context, conv_wgmma.panel_channels(tile, step))
        return [*packing, conv_wgmma.launch_conv(step, geometry, filters, tile, context)]
    assert isinstance(tile, MmaTile), "lines store maxima"
    filters, packing = filters_of(step, geometry, context)
    return [*packing, launch_conv(step, geometry, filters, tile, context)]


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
    if max(geometry.groups, len(phases) * MOST_SPLITS) > _MOST_BLOCKS or not any(phase.k for phase in phases):
        return True
    padded = ceildiv(geometry.n, 32) * 32 * ceildiv(geometry.k, 64) * 64 * operands.slowness
    return geometry.groups > 1 and _SIMT_COST * geometry.n * geometry.k < padded


# Products


def _is_product(step: Step, geometry: Geometry) -> bool:
    """Whether it is a product of [pixels, channels] and the filter: 1×1, pixels that lie evenly apart, and weights that
    are constants or can be read as they lie."""
    x, w = step.inputs[0], step.inputs[1]
    lies = tap_strides(w, geometry)
    order = channels_last(len(x.shape))
    pixels = space(x.shape, order[:-1], order[-1:], [operand(x, len(x.shape))])
    return (
        prod(geometry.kernel) == geometry.groups == prod(geometry.op_strides) == 1
        and not any(geometry.pads)
        and geometry.input == geometry.output
        and x.dtype is w.dtype
        and geometry.x_channel == 1
        and len(pixels.levels) <= 1
        and (is_constant(w) or 1 in (lies.channel, lies.column))
    )


def _product(step: Step, geometry: Geometry, context: Context) -> tuple[Product, Functor]:
    x, w = step.inputs[0], step.inputs[1]
    line = line_elements(geometry.k, w.dtype)
    order = channels_last(len(x.shape))
    (pixels,) = space(x.shape, order[:-1], order[-1:], [operand(x, len(x.shape))]).operands
    a = Matrix(geometry.x, pixels.strides[0] or line)
    if is_constant(w):
        filters, _ = filters_of(step, geometry, context, line)
        b = Matrix(filters, line, padded=True)
    else:
        lies = tap_strides(w, geometry)
        k_inner = lies.channel == 1
        b = Matrix(pointer_to(w), lies.column if k_inner else lies.channel, k_inner)
    return Product(geometry.rows, geometry.n, geometry.k, w.dtype, a, b), epilogue_for(step, geometry.n)


# Implicit products


def filters_of(step: Step, geometry: Geometry, context: Context, panel: int = 1) -> tuple[Pointer, list[Launch]]:
    """The weights as conv_mma.cuh reads them, and the launch that makes them where they are computed. conv_wgmma.cuh
    reads the same, in whole panels of channels; computed ones have whole panels to begin with."""
    w = step.inputs[1]
    per_chunk = 16 // w.dtype.itemsize
    if is_constant(w):
        taps = [axis.taps for phase in geometry.phases for axis in phase.axes]
        padded = f" c{panel}" if geometry.channels % panel else ""
        layout = f"phase,g,n,taps,c{per_chunk} g{geometry.groups} {geometry.transposed} {taps}{padded}"
        packed = context.weights.packed(w, layout, lambda data: pack_filter(data, geometry, per_chunk, panel))
        return Pointer(packed, ctype=STORAGE[w.dtype]), []
    lengths = [row_length(phase.k, per_chunk) for phase in geometry.phases]
    rows = geometry.groups * geometry.n
    filters = Pointer(workspace(rows * sum(lengths) * w.dtype.itemsize), ctype=STORAGE[w.dtype])
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
    vector = geometry.reads_chunks(per_chunk, element) and geometry.channels % per_chunk == 0
    depth, config = geometry.axes == len(AXES), tile.config(operands)
    if depth and not vector:  # to find elements one by one along three axes takes more registers
        config["blocks"] = max(1, tile.blocks - 1)
    return launch(
        "conv",
        "conv_mma.cuh",
        {
            **config, "operand": STORAGE[element], "x_t": geometry.x.ctype, "x_vector": vector, "depth": depth,
            "phased": phases > 1,
        },
        [epilogue_for(step, geometry.n)],
        {
            **geometry.arguments(), **_phase_arguments(geometry, per_chunk), "w": filters,
            **split_arguments(tiles * geometry.groups * phases, tile.m * tile.n, tile.threads // 32, tile.splits),
        },
        (tiles, geometry.groups, phases * tile.splits),
        tile.threads,
        tile.shared_bytes,
        Instruction.MMA,
    )  # fmt: skip
