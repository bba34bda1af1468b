"""Inverted residuals: `ConvBlock`. In one launch (conv_block.cuh) where that is faster, else their three convolutions,
with what lies between them in the step's workspace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Conv, ConvBlock, Op
from engine.passes.traits import ConvBlocks
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda import codegen, conv
from engine.targets.cuda.codegen import bounds_of
from engine.targets.cuda.conv_bias import without_bias
from engine.targets.cuda.conv_block_tiles import TILES, Apart, BlockTile, Sizes, Work
from engine.targets.cuda.conv_choices import block_key
from engine.targets.cuda.conv_geometry import Geometry, channels_last, image_at, sizes_of
from engine.targets.cuda.conv_tiles import chosen
from engine.targets.cuda.gemm import epilogue_of, estimated_best
from engine.targets.cuda.kernel import (
    ALIGNMENT,
    I64,
    STORAGE,
    Argument,
    Context,
    Instruction,
    Launch,
    Pointer,
    ceildiv,
    is_constant,
    launch,
    with_scratch_behind,
)
from engine.targets.cuda.spaces import VECTOR
from engine.targets.cuda.tiles import Choice

Way: TypeAlias = BlockTile | Apart

LIMITS = ConvBlocks(least=3, most=5, stride=2, multiple=VECTOR, channels=160, results=192)
"""Of the kernel. Filters of one or two pixels leave no room behind the last weights that an odd block of columns reads
past; more channels or results have no registers."""
_THREADS = 256
_BELIEVED = 0.87
"""The time of three convolutions beside the sum of their estimates: typical of 28 inverted residuals on an H100 (0.74
to 1.05)."""
_TYPES = (DType.F16, DType.BF16)


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Channels side by side; constant weights in any layout."""
    assert isinstance(op, ConvBlock)
    image = Requirement(Access.INNER, channels_last(len(inputs[0].shape)))
    return (image, *(Requirement() for _ in inputs[1:])), (image,)


def lower(step: Step, context: Context) -> list[Launch]:
    if not step.outputs[0].elements:
        return []
    ways, key = tiles_of(step, context), block_key(convolutions(step), context)
    return lower_in(step, chosen(ways, key, context), context)


def lower_in(step: Step, way: Way, context: Context) -> list[Launch]:
    """The launches of a step in one of its `tiles_of`."""
    return lower_apart(step, context) if isinstance(way, Apart) else [launch_block(step, way, context)]


def lower_apart(step: Step, context: Context) -> list[Launch]:
    """The three convolutions, with what lies between them in the workspace."""
    every = convolutions(step)
    launches = [launch for one in every for launch in conv.lower(one, context)]
    return with_scratch_behind(launches, every[0].outputs[0].buffer)


def convolutions(step: Step) -> list[Step]:
    """The three convolutions as steps of their own, with the results of the first two in a buffer of theirs."""
    op, x, end = step.op, step.inputs[0], 0
    assert isinstance(op, ConvBlock)
    places = list[tuple[DType, tuple[int, ...], int]]()
    for ((dtype, shape),) in op.results(step.inputs)[:2]:
        sizes = sizes_of(shape)
        places.append((dtype, sizes, end))
        end += ceildiv(prod(sizes) * dtype.itemsize, ALIGNMENT) * ALIGNMENT
    between = Buffer("between", BufferKind.ARENA, end)
    results = [*(image_at(between, *place) for place in places), step.outputs[0]]
    images, each = (x, *results), (op.expand, op.depthwise, op.project)
    found = list[Step]()
    for one, image, w, result in zip(each, images, step.inputs[1:4], results, strict=False):
        inputs, cost = (image, w, *step.inputs[2:]), one.cost((image, w), (result,))
        name = f"{step.name}, {len(found) + 1} of 3"
        found.append(replace(step, name=name, op=one, inputs=inputs, outputs=(result,), cost=cost))
    return found


def suits(step: Step) -> bool:
    """Whether the kernel can run a step, in some tile."""
    op, (x, *weights) = step.op, step.inputs[:4]
    assert isinstance(op, ConvBlock)
    if len(x.shape) != 4 or x.dtype not in _TYPES or any(w.dtype is not x.dtype for w in weights):
        return False
    (expanded, channels), outputs = weights[0].shape[:2], weights[2].shape[0]
    pointwise = all(each.is_pointwise and each.groups == 1 for each in (op.expand, op.project))
    small = all(prod(w.shape[2:]) == 1 for w in (weights[0], weights[2]))
    kernel, depthwise = weights[1].shape[2:], op.depthwise
    filters = depthwise.groups == expanded and weights[1].shape[:2] == (expanded, 1) and kernel[0] == kernel[1]
    steady = depthwise.strides[0] == depthwise.strides[1] and depthwise.dilations == (1, 1)
    return (
        pointwise and small and filters and steady
        and not any(each.transposed for each in (op.expand, depthwise, op.project))
        and LIMITS.least <= kernel[0] <= LIMITS.most and depthwise.strides[0] <= LIMITS.stride
        and channels % LIMITS.multiple == expanded % LIMITS.multiple == 0
        and channels <= LIMITS.channels and outputs <= LIMITS.results
        and all(map(is_constant, weights))
        and Geometry(convolutions(step)[0]).reads_chunks(VECTOR, x.dtype) and _between(step) is not None
    )  # fmt: skip


@dataclass(frozen=True)
class _Between:
    """What a convolution that is not the last one makes of its sums, which begin with `bias`: `value`, then rounded,
    and bounded as kernels/epilogue/bounded.cuh does that (`most`: None where it is not)."""

    bias: Tensor | None
    value: ex.Expr
    most: int | None

    @classmethod
    def of(cls, step: Step) -> _Between | None:
        """None where it is not a function of the sums alone, or not of the type of the images."""
        rest, bias = without_bias(step)
        assert isinstance(rest.op, Conv)
        (store,) = rest.op.stores
        bounds = bounds_of(store)
        rounded = store if bounds is None else bounds.bounded
        if ex.arguments(store) or not isinstance(rounded, ex.Apply) or rounded.op is not PointOp.CAST:
            return None
        if rounded.dtype is not step.inputs[0].dtype or rounded.args[0].dtype is not DType.F32:
            return None
        return cls(bias, rounded.args[0], None if bounds is None else bounds.most)


def _between(step: Step) -> tuple[_Between, _Between] | None:
    """Those of the first two convolutions, if both are."""
    first, second = map(_Between.of, convolutions(step)[:2])
    return None if first is None or second is None else (first, second)


def tiles_of(step: Step, context: Context) -> list[Choice[Way]]:
    """The ways that a step can run in, from what should be the fastest on: tiles of the kernel, and the three
    convolutions."""
    tiles = list[Choice[Way]](estimates(step, context))
    apart = Choice[Way](Apart(), cycles_apart(step, context) if tiles else 0.0)
    return sorted([apart, *tiles], key=lambda way: way.cycles)


def cycles_apart(step: Step, context: Context) -> float:
    """What the three convolutions should take."""

    def cycles(one: Step) -> float:
        found = conv.parts_of(one, context)
        if found is not None:
            return estimated_best(*found, context).estimate.cycles
        return min(choice.cycles for choice in conv.tiles_of(one, context))

    return _BELIEVED * sum(map(cycles, convolutions(step)))


def estimates(step: Step, context: Context) -> Iterator[Choice[BlockTile]]:
    """The tiles of the kernel that a step can run in, with what they should take."""
    if not step.outputs[0].elements or not suits(step):
        return
    sizes, expanded = Sizes.of(step), step.inputs[1].shape[0]
    for tile in TILES:
        work = Work(tile, sizes)
        blocks = work.blocks(context.architecture.shared_bytes)
        if blocks > 0:
            cycles = work.cycles(prod(_tiles(step, tile)), expanded, context.multiprocessors, blocks)
            yield Choice(tile, cycles)


def _tiles(step: Step, tile: BlockTile) -> tuple[int, int, int]:
    """Groups of images, and tiles down and across."""
    images, _, height, width = step.outputs[0].shape
    return ceildiv(images, tile.images), ceildiv(height, tile.rows), ceildiv(width, tile.columns)


def _order_of(kernel: int) -> list[int]:
    """The taps in the order of their words: pairs of neighbours of every row, then those left over, a column."""
    paired = kernel // 2 * 2
    return [row * kernel + i for row in range(kernel) for i in range(paired)] + [
        row * kernel + paired for row in range(kernel) if paired < kernel
    ]


def _packed_weights(
    step: Step, tile: BlockTile, sizes: Sizes, biases: Sequence[Tensor | None], context: Context
) -> Buffer:
    """The weights and biases of all panels (conv_block.cuh): [panels, bytes of a panel]."""
    weights, panel = step.inputs[1:4], tile.panel
    expanded = weights[0].shape[0]
    panels = ceildiv(expanded, panel)
    every, padding = panels * panel, VECTOR  # of a row: 16 bytes

    def pack(w1: np.ndarray, w2: np.ndarray, w3: np.ndarray, *given: np.ndarray) -> np.ndarray:
        (_, channels), outputs, order = w1.shape[:2], w3.shape[0], _order_of(sizes.kernel)
        wide = np.zeros((every, sizes.channels + padding), w1.dtype)
        wide[:expanded, :channels] = w1.reshape(expanded, channels)
        narrow = np.zeros((panels, sizes.columns, panel + padding), w3.dtype)
        filled = np.zeros((sizes.columns, every), w3.dtype)
        filled[:outputs, :expanded] = w3.reshape(outputs, expanded)
        narrow[:, :, :panel] = filled.reshape(sizes.columns, panels, panel).swapaxes(0, 1)
        pairs = np.zeros((every, 2 * sizes.tap_pairs), w2.dtype)
        pairs[:expanded, : len(order)] = w2.reshape(expanded, -1)[:, order]
        pieces, tail = np.split(pairs.reshape(panels, panel, -1, 2), [sizes.tap_pairs // 4 * 4], axis=2)
        pieces = pieces.reshape(panels, panel, sizes.tap_pairs // 4, VECTOR)
        sums, left = np.zeros((2, every), np.float32), iter(given)
        for row, bias in zip(sums, biases, strict=True):
            if bias is not None:
                row[:expanded] = next(left).reshape(-1)
        parts = (wide, narrow, pieces.swapaxes(1, 2), tail.swapaxes(1, 2), *sums)
        flat = [np.ascontiguousarray(part).reshape(panels, -1).view(np.uint8) for part in parts]
        return np.concatenate(flat, axis=1)

    there = [bias for bias in biases if bias is not None]
    layout = f"block of {panel}, biases {[bias is not None for bias in biases]}"
    return context.weights.packed_together([*weights, *there], layout, pack)


def launch_block(step: Step, tile: BlockTile, context: Context) -> Launch:
    """The launch of a step in a tile of the kernel."""
    op, x, result, sizes = step.op, step.inputs[0], step.outputs[0], Sizes.of(step)
    assert isinstance(op, ConvBlock)
    (expanded, channels), outputs = step.inputs[1].shape[:2], step.inputs[3].shape[0]
    image, between = Geometry(convolutions(step)[0]), _between(step)
    assert between is not None, "the caller has looked"
    first, second = between

    (images, _, height, width), (_, _, out_h, out_w) = x.shape, result.shape
    work, shared = Work(tile, sizes), context.architecture.shared_bytes
    groups, down, across = _tiles(step, tile)
    (pad_h, _), (pad_w, _) = op.depthwise.pads
    x_image, _, x_row, x_pixel = map(I64, image.x_strides)
    arguments: dict[str, Argument] = {
        "x": image.x, "x_image": x_image, "x_row": x_row, "x_pixel": x_pixel,
        "weights": Pointer(_packed_weights(step, tile, sizes, [one.bias for one in between], context), ctype="u8"),
        "channels": channels, "expanded": expanded, "outputs": outputs, "images": images,
        "panels": ceildiv(expanded, tile.panel),
        "in_h": height, "in_w": width, "out_h": out_h, "out_w": out_w, "pad_h": pad_h, "pad_w": pad_w,
        "tiles_x": across, "tiles_y": down,
    }  # fmt: skip
    return launch(
        "conv",
        "conv_block.cuh",
        {
            "operand": STORAGE[x.dtype], "kernel": sizes.kernel, "stride": sizes.stride, "images": tile.images,
            "tile_h": tile.rows, "tile_w": tile.columns, "each": tile.each, "panel": tile.panel,
            "unit": work.unit or 0, "c_in": sizes.channels, "columns": sizes.columns,
            "expanded_bounded": first.most is not None, "expanded_most": first.most or 0,
            "filtered_bounded": second.most is not None, "filtered_most": second.most or 0,
            "blocks": work.blocks(shared), "shared_bytes": work.shared_bytes,
        },
        [
            codegen.of_sums("Expanded", first.value),
            codegen.of_sums("Filtered", second.value),
            epilogue_of(step, op.stores, channels_last(4), outputs),
        ],
        arguments,
        (groups * down * across, 1, 1),
        _THREADS,
        work.shared_bytes,
        Instruction.MMA,
    )  # fmt: skip
