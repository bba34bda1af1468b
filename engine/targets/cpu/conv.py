"""Convolutions (`Conv`) on activations whose channels are innermost, as a matrix product that reads the input in place.

The rows of the product are output positions, its columns output channels. The reduction runs over *segments*: one tap
of the kernel each, of all channels of the group, or, where there are few channels, a whole row of taps, which lie
together in memory. There is no im2col buffer and no padded copy: see `codegen/taps.py`, the device side. A transposed
convolution is one such product for each phase of its stride. Depthwise convolutions have `depthwise.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product as cartesian
from math import prod
from typing import cast

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Conv, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cpu import depthwise, gemm
from engine.targets.cpu.codegen.taps import AXES, TAP_WORDS, ConvSpec
from engine.targets.cpu.codegen.tile import Epilogue
from engine.targets.cpu.kernel import Context, Launch, Pointer, Slot, is_constant, pointer_to, table
from engine.targets.cpu.tiling import (
    Operand,
    Panels,
    Product,
    epilogue_of,
    launches,
    merge_axes,
    packed,
    panels_of,
    zeros,
)

_LONGEST_SPAN = 32  # elements of a row of taps up to which the taps are joined: beyond, a tap is long enough by itself
_LONGEST_UNROLLED = 16  # elements of a segment up to which its loop is written out
_FEW_CHANNELS = 4  # inputs with at most so many channels may come channels first


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Channels innermost everywhere; an input with few channels may also come channels first."""
    conv = cast(Conv, op)
    x, w = inputs[:2]
    if x.dtype is not w.dtype or x.dtype not in (DType.F32, DType.F64):
        raise UnsupportedOp(f"Conv of {x.dtype.value} and {w.dtype.value}: the CPU target convolves f32 and f64")
    spatial = len(conv.strides)
    if spatial > len(AXES):
        raise UnsupportedOp(f"Conv with {spatial} spatial axes: the CPU target has at most {len(AXES)}")
    rank = spatial + 2
    nhwc = Requirement(Access.INNER, _channels_last(rank))
    first = Requirement(Access.INNER) if _reads_channels_first(conv, x, w) else nhwc
    return (first, Requirement(), *(_argument(t, spatial) for t in inputs[2:])), tuple(nhwc for _ in conv.stores)


def _channels_last(rank: int) -> tuple[int, ...]:
    return (0, *range(2, rank), 1)


def _argument(tensor: Tensor, spatial: int) -> Requirement:
    """An epilogue input: its channel axis, where it has one, innermost."""
    rank = len(tensor.shape)
    channel = rank - 1 - spatial
    if channel < 0:
        return Requirement()
    return Requirement(Access.INNER, (*(axis for axis in range(rank) if axis != channel), channel))


def _reads_channels_first(conv: Conv, x: Tensor, w: Tensor) -> bool:
    return (
        1 < x.shape[1] <= _FEW_CHANNELS
        and conv.groups == 1
        and not conv.transposed
        and conv.dilations[-1] == 1
        and 1 < w.shape[-1] <= _LONGEST_SPAN
        and x.strides[-1] == 1
        and x.strides[1] != 1
        and is_constant(w)
    )


def lower(step: Step, context: Context) -> list[Launch]:
    conv = cast(Conv, step.op)
    x, w = step.inputs[:2]
    out = step.outputs[0].shape
    axes = _channels_last(len(out))
    epilogue, args = epilogue_of(conv, conv.stores, step.inputs, out, axes)
    results = [Operand(f"out{i}", pointer_to(t), _byte_strides(t, axes)) for i, t in enumerate(step.outputs)]
    results += [Operand(f"arg{i}", pointer_to(t), strides) for i, (t, strides) in enumerate(args)]
    unit_kernel = all(size == 1 for size in w.shape[2:])
    if unit_kernel and conv.is_pointwise and conv.groups == 1 and not conv.transposed and x.strides[1] in (1, 0):
        matrix = _transposed_view(w)
        operands = [
            Operand("a", pointer_to(x), tuple(x.strides[axis] * x.dtype.itemsize for axis in axes[:-1])),
            Operand("b", pointer_to(matrix), (0,) * (len(out) - 1)),
            *(Operand(o.name, o.pointer, o.strides[:-1]) for o in results),
        ]
        sizes, operands = merge_axes([out[axis] for axis in axes[:-1]], operands)
        return gemm.multiply(context, x, matrix, out[1], sizes, operands, epilogue)
    if depthwise.fits(conv, x, w):
        return depthwise.lower(step, conv, context)
    plain = _Convolution(context, conv, x, w, epilogue)
    if not conv.transposed:
        return plain.launches(plain.taps(), conv.strides, [begin for begin, _ in conv.pads], out[2:], results)
    found: list[Launch] = []
    for phase in plain.phases(out[2:]):
        moved = [_phase_of(o, phase, conv.strides) for o in results]
        ones = (1,) * len(conv.strides)
        found += plain.launches(phase.taps, ones, [0] * len(ones), phase.size, moved, concurrent=bool(found))
    return found


@dataclass(frozen=True)
class Tap:
    """A tap of the kernel: its index, and how far it reads from the row's first input coordinate, per spatial axis."""

    index: tuple[int, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Phase:
    """The outputs start, start + stride, … of a transposed convolution, and the taps that reach them."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    taps: list[Tap]


@dataclass(frozen=True)
class _Convolution:
    """A convolution on its way to launches."""

    context: Context
    conv: Conv
    x: Tensor
    w: Tensor
    epilogue: Epilogue

    def taps(self) -> list[Tap]:
        """All taps, in the order of the weights."""
        indices = cartesian(*(range(size) for size in self.w.shape[2:]))
        return [Tap(i, tuple(d * k for d, k in zip(self.conv.dilations, i, strict=True))) for i in indices]

    def phases(self, out: tuple[int, ...]) -> Iterator[Phase]:
        """The phases of a transposed convolution: output o gets input i by tap k if o + pad = i·stride + k·dilation."""
        for start in cartesian(*(range(min(s, size)) for s, size in zip(self.conv.strides, out, strict=True))):
            taps = []
            for index in cartesian(*(range(size) for size in self.w.shape[2:])):
                ahead = [
                    first + begin - k * dilation
                    for first, (begin, _), k, dilation in zip(
                        start, self.conv.pads, index, self.conv.dilations, strict=True
                    )
                ]
                if all(a % s == 0 for a, s in zip(ahead, self.conv.strides, strict=True)):
                    taps.append(Tap(index, tuple(a // s for a, s in zip(ahead, self.conv.strides, strict=True))))
            size = tuple(-(-(o - first) // s) for o, first, s in zip(out, start, self.conv.strides, strict=True))
            yield Phase(start, size, taps)

    def launches(
        self,
        taps: list[Tap],
        strides: Sequence[int],
        pads: Sequence[int],
        out: tuple[int, ...],
        results: list[Operand],
        concurrent: bool = False,
    ) -> list[Launch]:
        """The product over `taps` for `out` positions, to `results` (strides over n, spatial axes, channels)."""
        x, w, conv, context = self.x, self.w, self.conv, self.context
        itemsize = x.dtype.itemsize
        groups = conv.groups
        channels = x.shape[1] // groups
        columns = w.shape[1] if conv.transposed else w.shape[0] // groups
        steps = [stride * itemsize for stride in x.strides]
        segments = self._segments(taps, channels)
        known = is_constant(w)
        parts = panels_of(context.isa, x.dtype, columns, True)
        second, weight_slots = self._second(taps, segments, parts, columns)
        # Output positions that lie at one distance in all results are rows; the axes outside of them are batches.
        outer = len(out)
        rows, row_strides = 1, [0] * len(results)
        while outer:
            size, along = out[outer - 1], [r.strides[outer] for r in results]
            if size != 1 and rows != 1 and any(a != s * rows for a, s in zip(along, row_strides, strict=True)):
                break
            if size != 1 and rows == 1:
                row_strides = along
            rows *= size
            outer -= 1
        leading = out[:outer]
        sizes = (x.shape[0], groups, *leading, rows)
        operands = [
            Operand("a", pointer_to(x), (steps[0], channels * steps[1], *(0,) * (outer + 1))),
            Operand("b", second.pointer, (0, *second.strides, *(0,) * (outer + 1))),
            *(
                Operand(r.name, r.pointer, (r.strides[0], columns * r.strides[-1], *r.strides[1 : outer + 1], along))
                for r, along in zip(results, row_strides, strict=True)
            ),
        ]
        slots: dict[str, Slot] = {"zero": zeros(segments.inner * itemsize), "taps": segments.table, **weight_slots}
        slots |= {"taps.x": w.shape[-1], "pixel": segments.pixel, "patch": _patch_bytes(segments.inner * itemsize)}
        positions = np.arange(prod(leading)) * rows
        slots["origin"] = table(np.tile(positions, x.shape[0] * groups))
        names = AXES[-len(out) :]
        for axis, name in enumerate(names):
            slots |= {f"in.{name}": x.shape[axis + 2], f"out.{name}": out[axis], f"stride.{name}": strides[axis]}
            slots |= {f"pad.{name}": pads[axis], f"a.{name}": steps[axis + 2]}
        inner = segments.inner if segments.inner <= _LONGEST_UNROLLED else None

        def make(part: Panels, split: bool, batched: bool, finished: Epilogue) -> ConvSpec:
            return ConvSpec(
                context.isa, x.dtype, part.widths, part.masked, inner, split, batched, finished, len(out),
                segments.span, not known,
            )  # fmt: skip

        def move_second(part: Panels, before: int) -> int:
            column = weight_slots.get("b.column")
            return before if known else part.start * cast(int, column)

        count = len(segments.entries)
        spanned = count * _patch_bytes(segments.inner * itemsize) if segments.span else 0
        problem = Product(
            x.dtype, sizes, columns, count * segments.inner, count, segments.inner, operands, self.epilogue, slots,
            packs=not known,
            split_segments=count if known else 0,
            row_bytes=channels * itemsize * prod(strides) + 8 * count + spanned,
            scratch_per_row=spanned,
        )  # fmt: skip
        return launches(problem, parts, make, move_second, context, concurrent)

    def _segments(self, taps: list[Tap], channels: int) -> _Segments:
        """How the reduction is cut."""
        x, w, conv = self.x, self.w, self.conv
        itemsize = x.dtype.itemsize
        channels_first = channels > 1 and x.strides[1] != 1
        width = w.shape[-1]
        pixel = 1 if channels_first else channels
        joined = x.strides[-1] == pixel or x.shape[-1] == 1
        span = (
            is_constant(w)
            and not conv.transposed
            and conv.groups == 1
            and conv.dilations[-1] == 1
            and width > 1
            and width * pixel <= _LONGEST_SPAN
            and joined
        )
        assert span or not channels_first
        inner = width * pixel if span else channels
        used = taps[::width] if span else taps
        entries = []
        for c in range(channels if channels_first else 1):
            for tap in used:
                offset = c * x.strides[1] + sum(s * d for s, d in zip(x.strides[2:], tap.steps, strict=True))
                weight = sum(s * i for s, i in zip(w.strides[2:], tap.index, strict=True))
                steps = (0,) * (3 - len(tap.steps)) + tap.steps
                entries.append((*steps, offset * itemsize, weight * itemsize))
        return _Segments(tuple(entries), inner, span, pixel, channels_first)

    def _second(
        self, taps: list[Tap], segments: _Segments, parts: Sequence[Panels], columns: int
    ) -> tuple[Operand, dict[str, Slot]]:
        """The weights as second operand, with their stride from group to group, and the slots that say how they lie."""
        w, conv = self.w, self.conv
        itemsize = w.dtype.itemsize
        channel, column = (0, 1) if conv.transposed else (1, 0)
        if not is_constant(w):
            group = w.strides[0] * (w.shape[0] // conv.groups)
            along: dict[str, Slot] = {"b.depth": w.strides[channel] * itemsize}
            return Operand("b", pointer_to(w), (group * itemsize,)), along | {"b.column": w.strides[column] * itemsize}
        indices = [tap.index for tap in taps]

        def pack(weights: np.ndarray) -> np.ndarray:
            grouped = weights.reshape(conv.groups, weights.shape[0] // conv.groups, *weights.shape[1:])
            if not conv.transposed:
                grouped = grouped.swapaxes(1, 2)
            # [group, channel in, channel out, taps…] → [group, taps, channel in, channel out]
            numbers = np.asarray([np.ravel_multi_index(index, w.shape[2:]) for index in indices], np.intp)
            matrix = np.moveaxis(grouped.reshape(*grouped.shape[:3], -1)[..., numbers], -1, 1)
            if segments.channels_first:
                matrix = matrix.swapaxes(1, 2)
            return packed(matrix.reshape(conv.groups, -1, columns), parts)

        layout = f"taps {self.context.isa.name} {[(part.widths, part.count) for part in parts]} {conv.groups} "
        layout += f"{conv.transposed} {segments.channels_first} {indices}"
        buffer = self.context.weights.packed(w, layout, pack)
        return Operand("b", Pointer(buffer), (buffer.nbytes // conv.groups,)), {}


@dataclass(frozen=True)
class _Segments:
    """The segments of a reduction: entries of the table of taps, `inner` elements each. `pixel`: elements per tap of a
    row of taps."""

    entries: tuple[tuple[int, ...], ...]
    inner: int
    span: bool
    pixel: int
    channels_first: bool

    @property
    def table(self) -> Pointer:
        return table(np.asarray(self.entries, np.int64).reshape(-1, TAP_WORDS))


def _patch_bytes(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _phase_of(result: Operand, phase: Phase, strides: tuple[int, ...]) -> Operand:
    """A result restricted to the positions of a phase."""
    batch, *spatial, channel = result.strides
    start = sum(stride * first for stride, first in zip(spatial, phase.start, strict=True))
    steps = (stride * step for stride, step in zip(spatial, strides, strict=True))
    pointer = Pointer(result.pointer.buffer, result.pointer.offset + start)
    return Operand(result.name, pointer, (batch, *steps, channel))


def _byte_strides(tensor: Tensor, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(tensor.strides[axis] * tensor.dtype.itemsize for axis in axes)


def _transposed_view(w: Tensor) -> Tensor:
    """The weights [out, in, 1, …] as a matrix [in, out]."""
    return Tensor(w.buffer, w.dtype, (w.shape[1], w.shape[0]), (w.strides[1], w.strides[0]), w.offset)
