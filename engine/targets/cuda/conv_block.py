"""Inverted residuals in one launch (conv_block.cuh): which can be, in which tile; elsewhere their three convolutions,
with what lies between them in the step's workspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Conv, ConvBlock, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda import codegen, conv
from engine.targets.cuda.codegen import bounds_of
from engine.targets.cuda.conv_bias import without_bias
from engine.targets.cuda.conv_geometry import Geometry, channels_last, image_at, sizes_of
from engine.targets.cuda.gemm import epilogue_of
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
    workspace_bytes,
)
from engine.targets.cuda.spaces import VECTOR

_WARPS = 8
_FRAGMENT, _OCTET = 16, 8  # rows of a product; neighbouring results
_MOST_COLUMNS = 192  # of results, whose sums a lane has registers for
_KEPT = 40  # registers of a lane for the weights that it keeps as it expands
_RESERVED = 1024  # bytes of shared memory that the system takes for each block
_TYPES = (DType.F16, DType.BF16)


@dataclass(frozen=True)
class Sizes:
    """Kernel and stride of the filter, and the channels before and the columns behind, filled up."""

    kernel: int
    stride: int
    channels: int
    columns: int

    @classmethod
    def of(cls, step: Step) -> Sizes:
        assert isinstance(step.op, ConvBlock)
        channels, outputs = step.inputs[1].shape[1], step.inputs[3].shape[0]
        padded = ceildiv(channels, _FRAGMENT) * _FRAGMENT, ceildiv(outputs, VECTOR) * VECTOR
        return cls(step.inputs[2].shape[2], step.op.depthwise.strides[0], *padded)

    @property
    def tap_pairs(self) -> int:
        """Words of two taps of a channel."""
        return ceildiv(self.kernel**2, 2)


@dataclass(frozen=True)
class BlockTile:
    """Results of a tile: `images` × `rows` × `columns`, of which a warp has two times eight neighbours of `each` rows.
    `panel`: expanded channels at a time."""

    images: int
    rows: int
    columns: int
    each: int
    panel: int

    @property
    def pairs(self) -> int:
        """Of octets: as many warps have results of their own; several share them where that is less than all."""
        return self.images * ceildiv(self.rows, self.each) * ceildiv(self.columns, _OCTET) // 2

    def is_shared(self) -> bool:
        """Whether its warps come out even."""
        octets, splits = (
            self.images * ceildiv(self.rows, self.each) * ceildiv(self.columns, _OCTET),
            _WARPS // self.pairs,
        )
        return octets % 2 == 0 and self.pairs * splits == _WARPS and self.panel // _FRAGMENT % splits == 0

    def _line(self, sizes: Sizes) -> tuple[int, int]:
        """Lines of pixels of an image, and the places that each takes."""
        across = (self.columns - 1) * sizes.stride + sizes.kernel
        below = sizes.kernel % 2 if self.images > 1 else 0
        return (self.rows - 1) * sizes.stride + sizes.kernel + below, ceildiv(across, sizes.stride) * sizes.stride

    def _fragments(self, sizes: Sizes) -> int:
        return ceildiv(self.images * prod(self._line(sizes)), _FRAGMENT)

    def unit(self, sizes: Sizes) -> int | None:
        """Channels that a warp expands at a time: those that leave the warps the fewest turns, of what has registers
        for its weights."""
        steps, best = sizes.channels // _FRAGMENT, dict[int, int]()
        for unit in range(_FRAGMENT, self.panel + 1, _FRAGMENT):
            units = self.panel // unit
            if self.panel % unit == _WARPS % units == 0 and steps * unit // 4 <= _KEPT:
                best[unit] = unit * ceildiv(self._fragments(sizes), _WARPS // units)
        return min(best, key=lambda unit: (best[unit], -unit), default=None)

    def shared_bytes(self, sizes: Sizes) -> int:
        """What it takes of shared memory (conv_block.cuh)."""
        height, line = self._line(sizes)
        phase, pixels = line // sizes.stride, self._fragments(sizes) * _FRAGMENT
        rows = ceildiv(self.rows, self.each) * self.each
        lines = (self.images - 1) * height + (rows - 1) * sizes.stride + sizes.kernel + sizes.kernel % 2
        first = max(0, self.columns - _OCTET)
        end = (lines - 1) * line + (sizes.stride - 1) * phase + (sizes.kernel - 1) // sizes.stride + first + _OCTET
        wide, narrow = 2 * sizes.channels + 16, 2 * self.panel + 16
        weights = self.panel * (wide + 4 * sizes.tap_pairs + 8) + sizes.columns * narrow
        left = (_WARPS - self.pairs) * self.each * sizes.columns * 64  # of warps that share octets
        return max(left, pixels * wide + max(end, pixels) * narrow + 2 * weights)

    def _held(self, sizes: Sizes, unit: int) -> int:
        """Registers of a thread that the kernel cannot do without beside some that every tile takes, by the numbers
        that it has in them: sums, and what it expands or filters with, whichever is more."""
        kernel, steps = sizes.kernel, sizes.channels // _FRAGMENT
        expanding = steps * unit // 4 + unit // 2 + (unit // 4 if unit <= 32 else 0)
        filtering = (kernel // 2 + 1) * 5 + sizes.tap_pairs * 3 // 2 + 6 * self.each
        return self.each * sizes.columns // 2 + max(expanding, filtering)

    def blocks(self, sizes: Sizes, shared_bytes: int) -> int:
        """A multiprocessor's, of so much shared memory: as many as there are registers for without spilling."""
        unit = self.unit(sizes)
        assert unit is not None
        room = shared_bytes // (self.shared_bytes(sizes) + _RESERVED)
        fitting = sum(self._held(sizes, unit) <= most for most in _HELD)
        return max(1, min(room, fitting))


_HELD = (256, 106, 60)
"""Most of `_held` where so many blocks, from one on, share the registers of a multiprocessor."""
_SHAPES = (
    (1, 16, 28, 4), (1, 16, 32, 4), (2, 14, 14, 4), (1, 8, 28, 4), (1, 8, 32, 4), (1, 16, 16, 4), (1, 14, 14, 4),
    (4, 7, 7, 4), (1, 8, 16, 4), (1, 4, 28, 4), (1, 7, 14, 4), (2, 7, 7, 4),
    (1, 8, 28, 2), (1, 8, 32, 2), (1, 16, 16, 2), (4, 7, 7, 2), (1, 8, 16, 2), (1, 4, 28, 2), (1, 7, 14, 2),
    (2, 7, 7, 2), (1, 7, 7, 2), (1, 8, 8, 2), (1, 4, 16, 2),
    (1, 8, 16, 1), (1, 4, 28, 1), (1, 4, 16, 1), (1, 8, 8, 1), (1, 4, 8, 1), (1, 2, 28, 1),
)  # fmt: skip
TILES = tuple(tile for shape in _SHAPES for panel in (32, 48, 64) if (tile := BlockTile(*shape, panel)).is_shared())


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Channels side by side; constant weights in any layout."""
    assert isinstance(op, ConvBlock)
    image = Requirement(Access.INNER, channels_last(len(inputs[0].shape)))
    return (image, *(Requirement() for _ in inputs[1:])), (image,)


def lower(step: Step, context: Context) -> list[Launch]:
    return lower_apart(step, context) if step.outputs[0].elements else []


def lower_apart(step: Step, context: Context) -> list[Launch]:
    """The three convolutions. What lies between them in the workspace is behind what they leave there themselves."""
    own = max(workspace_bytes(conv.lower(one, context)) for one in _convolutions(step, 0))
    return [launch for one in _convolutions(step, own) for launch in conv.lower(one, context)]


def _convolutions(step: Step, own: int) -> list[Step]:
    """The convolutions as steps, with their results `own` bytes into the workspace, one behind the other."""
    op, x, end = step.op, step.inputs[0], ceildiv(own, ALIGNMENT) * ALIGNMENT
    assert isinstance(op, ConvBlock)
    places = list[tuple[DType, tuple[int, ...], int]]()
    for ((dtype, shape),) in op.results(step.inputs)[:2]:
        sizes = sizes_of(shape)
        places.append((dtype, sizes, end))
        end += ceildiv(prod(sizes) * dtype.itemsize, ALIGNMENT) * ALIGNMENT
    scratch = Buffer("between", BufferKind.WORKSPACE, end)
    results = [image_at(scratch, *place) for place in places]
    images, each = (x, *results), (op.expand, op.depthwise, op.project)
    return [
        replace(step, op=one, inputs=(image, w, *step.inputs[2:]), outputs=(result,))
        for one, image, w, result in zip(each, images, step.inputs[1:4], (*results, step.outputs[0]), strict=True)
    ]


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
        and kernel[0] <= 5 and depthwise.strides[0] <= 2
        and channels % VECTOR == expanded % VECTOR == 0 and outputs <= _MOST_COLUMNS
        and all(map(is_constant, weights))
        and Geometry(_convolutions(step, 0)[0]).reads_chunks(VECTOR, x.dtype) and _between(step) is not None
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
    first, second = map(_Between.of, _convolutions(step, 0)[:2])
    return None if first is None or second is None else (first, second)


def tiles_of(step: Step, context: Context) -> list[BlockTile]:
    """The tiles that a step can run in."""
    if not suits(step):
        return []
    sizes, most = Sizes.of(step), context.architecture.shared_bytes
    return [tile for tile in TILES if tile.unit(sizes) is not None and tile.shared_bytes(sizes) <= most]


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


def lower_in(step: Step, tile: BlockTile, context: Context) -> list[Launch]:
    """The launch of a step in one of its `tiles_of`."""
    op, x, result, sizes = step.op, step.inputs[0], step.outputs[0], Sizes.of(step)
    assert isinstance(op, ConvBlock)
    (expanded, channels), outputs = step.inputs[1].shape[:2], step.inputs[3].shape[0]
    image, between = Geometry(_convolutions(step, 0)[0]), _between(step)
    assert between is not None, "the caller has looked"
    first, second = between

    (images, _, height, width), (_, _, out_h, out_w) = x.shape, result.shape
    across, down = ceildiv(out_w, tile.columns), ceildiv(out_h, tile.rows)
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
    return [
        launch(
            "conv",
            "conv_block.cuh",
            {
                "operand": STORAGE[x.dtype], "kernel": sizes.kernel, "stride": sizes.stride, "images": tile.images,
                "tile_h": tile.rows, "tile_w": tile.columns, "each": tile.each, "panel": tile.panel,
                "unit": tile.unit(sizes) or 0, "c_in": sizes.channels, "columns": sizes.columns,
                "expanded_bounded": first.most is not None, "expanded_most": first.most or 0,
                "filtered_bounded": second.most is not None, "filtered_most": second.most or 0,
                "blocks": tile.blocks(sizes, context.architecture.shared_bytes),
                "shared_bytes": tile.shared_bytes(sizes),
            },
            [
                codegen.of_sums("Expanded", first.value),
                codegen.of_sums("Filtered", second.value),
                epilogue_of(step, op.stores, channels_last(4), outputs),
            ],
            arguments,
            (ceildiv(images, tile.images) * down * across, 1, 1),
            32 * _WARPS,
            tile.shared_bytes(sizes),
            Instruction.MMA,
        )
    ]  # fmt: skip
