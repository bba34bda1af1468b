"""Convolutions (`Conv`) on activations whose channels are innermost, as a matrix product that reads the input in place.

The rows of the product are output positions, its columns output channels. The reduction runs over *segments*: one tap of
the kernel each, of all channels of the group, or, where there are few channels, a whole row of taps, which lie together in
memory. For every row and segment the kernel works out where the input lies; positions in the padding read a piece of
zeros, rows of taps that are partly in the padding a small copy in scratch. There is no im2col buffer and no padded copy.
A transposed convolution is one such product for each phase of its stride. Depthwise convolutions have `depthwise.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product as cartesian
from math import prod
from typing import ClassVar, cast

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Conv, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cpu import depthwise, gemm
from engine.targets.cpu.codegen.emit import Int, Value, element_type, vector_type
from engine.targets.cpu.codegen.tile import Epilogue, TileSpec
from engine.targets.cpu.kernel import Context, KernelBuilder, Launch, Pointer, Slot, is_constant, pointer_to, table
from engine.targets.cpu.tiling import Operand, Panels, Product, epilogue_of, launches, merge_axes, packed, panels_of, zeros

_LONGEST_SPAN = 32  # elements of a row of taps up to which the taps are joined: beyond, a tap is long enough by itself
_LONGEST_UNROLLED = 16  # elements of a segment up to which its loop is written out
_FEW_CHANNELS = 4  # inputs with at most so many channels may come channels first
_AXES = "zyx"


@dataclass(frozen=True)
class ConvSpec(TileSpec):
    """Rows are positions of an output of `spatial` axes. `span`: a segment is a row of taps, else one tap. `packs`: the
    weights are packed by the tasks."""

    spatial: int
    span: bool
    packs: bool
    family: ClassVar[str] = "conv"

    @property
    def axes(self) -> str:
        """Names of the spatial axes, outermost first."""
        return _AXES[-self.spatial :]

    @property
    def row_parameters(self) -> tuple[str, ...]:
        names = ["zero", "taps", *(["origin"] if self.batched else [])]
        for axis in self.axes:
            names += [f"in.{axis}", f"out.{axis}", f"stride.{axis}", f"pad.{axis}", f"a.{axis}"]
        if self.span:
            names += ["taps.x", "pixel", "patch", "patches"]
        if self.packs:
            names += ["b.depth", "b.column"]
        return tuple(names)

    def emit_pointers(self, kernel: KernelBuilder, a: Value, table: Value, row: Int, count: Int, block: Int) -> None:
        k = kernel
        if self.batched:
            batch = k.div(k.task, k.mul(k.integer("groups"), k.integer("chunks")))
            row = k.add(row, k.load("i64", k.at(k.pointer("origin"), batch, 8), 8))
        starts = self._coordinates(k, row)
        lanes = vector_type("i64", self.rows)
        place = k.splat(k.convert("ptrtoint", a, "i64"), self.rows)
        for axis, start in starts.items():
            place = k.binary("add", place, k.binary("mul", start, k.splat(k.integer(f"a.{axis}"), self.rows)))
        sizes = {axis: k.splat(k.integer(f"in.{axis}"), self.rows) for axis in self.axes}
        zero = k.splat(k.convert("ptrtoint", k.pointer("zero"), "i64"), self.rows)
        taps = k.pointer("taps")
        checked = [axis for axis in self.axes if not (self.span and axis == "x")]

        def segment(s: Value, _: list[Value]) -> None:
            inside, offset = self._tap(k, taps, s, starts, sizes, checked)
            where = k.binary("add", place, k.splat(offset, self.rows))
            if inside is not None:
                where = k.select(inside, where, zero)
            k.store(where, k.offset(table, k.mul(s, self.rows * 8)), 8)

        k.loop(0, k.integer("segments"), 1, segment)
        if not self.span:
            return
        x = starts["x"]
        last = k.binary("add", x, k.splat(k.integer("taps.x"), self.rows))
        outside = k.binary("or", k.compare("slt", x, k.const(0, lanes)), k.compare("sgt", last, sizes["x"]))
        some = k.reduce("or", outside)
        k.branch(some, lambda: self._patches(k, table, block, outside, place, starts, sizes))

    def _coordinates(self, k: KernelBuilder, row: Int) -> dict[str, Value]:
        """The first input coordinate of each row of a tile, per axis: output coordinate times stride minus padding."""
        current: dict[str, Int] = {}
        rest = row
        for axis in reversed(self.axes[1:]):
            size = k.integer(f"out.{axis}")
            current[axis], rest = k.rem(rest, size), k.div(rest, size)
        current[self.axes[0]] = rest
        type_ = vector_type("i64", self.rows)
        vectors = {axis: Value("poison", type_) for axis in self.axes}
        for r in range(self.rows):
            for axis in self.axes:
                value = k.i64(current[axis])
                text = f"insertelement {type_} {vectors[axis].text}, i64 {value.text}, i64 {r}"
                vectors[axis] = k.emit(text, type_)
            # One step on, with carry from the innermost axis outwards.
            carry: Int = 1
            for axis in reversed(self.axes):
                moved = k.i64(k.add(current[axis], carry))
                if axis == self.axes[0]:
                    current[axis] = moved
                    break
                over = k.compare("sge", moved, k.integer(f"out.{axis}"))
                current[axis] = k.select(over, k.i64(0), moved)
                carry = k.convert("zext", over, "i64")
        return {
            axis: k.binary(
                "sub",
                k.binary("mul", vectors[axis], k.splat(k.integer(f"stride.{axis}"), self.rows)),
                k.splat(k.integer(f"pad.{axis}"), self.rows),
            )
            for axis in self.axes
        }

    def _tap(
        self,
        k: KernelBuilder,
        taps: Value,
        s: Value,
        starts: dict[str, Value],
        sizes: dict[str, Value],
        checked: Sequence[str],
    ) -> tuple[Value | None, Value]:
        """Which rows of a segment lie inside the input along the axes `checked`, and the segment's byte offset."""
        entry = k.offset(taps, k.mul(s, _TAP_WORDS * 8))
        inside: Value | None = None
        for axis in checked:
            step = k.load("i64", k.offset(entry, 8 * _AXES.index(axis)), 8)
            at = k.binary("add", starts[axis], k.splat(step, self.rows))
            fits = k.compare("ult", at, sizes[axis])
            inside = fits if inside is None else k.binary("and", inside, fits)
        return inside, k.load("i64", k.offset(entry, 24), 8)

    def _patches(
        self,
        k: KernelBuilder,
        table: Value,
        block: Int,
        outside: Value,
        place: Value,
        starts: dict[str, Value],
        sizes: dict[str, Value],
    ) -> None:
        """Give the rows whose taps are partly in the padding a copy with zeros in it."""
        rows, itemsize = self.rows, self.dtype.itemsize
        patch, segments = k.integer("patch"), k.integer("segments")
        area = k.offset(k.scratch, k.add(k.integer("patches"), k.mul(block, k.mul(k.mul(segments, rows), patch))))
        kept: dict[str, Value] = {}
        for name, vector in {"outside": k.convert("zext", outside, place.type), "place": place, "x": starts["x"]}.items():
            kept[name] = k.stack(rows * 8)
            k.store(vector, kept[name], 8)
        others = [axis for axis in self.axes if axis != "x"]
        x_size, pixel, step = k.integer("in.x"), k.integer("pixel"), k.integer("a.x")

        def segment(s: Value, _: list[Value]) -> None:
            inside, offset = self._tap(k, k.pointer("taps"), s, starts, sizes, others)
            valid = k.stack(rows * 8)
            if inside is not None:
                k.store(k.convert("zext", inside, place.type), valid, 8)

            def row(r: Value, _: list[Value]) -> None:
                def fill() -> None:
                    target = k.offset(area, k.mul(k.add(k.mul(s, rows), r), patch))
                    first = k.load("i64", k.at(kept["x"], r, 8), 8)
                    source = k.convert("inttoptr", k.add(k.load("i64", k.at(kept["place"], r, 8), 8), offset), "ptr")

                    def tap(t: Value, _: list[Value]) -> None:
                        fits = k.compare("ult", k.add(first, t), x_size)

                        def element(i: Value, _: list[Value]) -> None:
                            type_ = element_type(self.dtype)
                            at = k.offset(k.offset(source, k.mul(t, step)), k.mul(i, itemsize))
                            (value,) = k.branch(
                                fits, lambda: [k.load(type_, at, itemsize)], lambda: [k.const(0.0, type_)]
                            )
                            k.store(value, k.at(target, k.add(k.mul(t, pixel), i), itemsize), itemsize)

                        k.loop(0, pixel, 1, element)

                    k.loop(0, k.integer("taps.x"), 1, tap)
                    k.store(target, k.offset(table, k.add(k.mul(s, rows * 8), k.mul(r, 8))), 8)

                wanted = k.load("i64", k.at(kept["outside"], r, 8), 8)
                if inside is not None:
                    wanted = k.emit(f"and i64 {wanted.text}, {k.load('i64', k.at(valid, r, 8), 8).text}", "i64")
                k.branch(k.compare("ne", wanted, 0), fill)

            k.loop(0, rows, 1, row)

        k.loop(0, segments, 1, segment)

    def emit_pack(self, kernel: KernelBuilder, b: Value, first: Int, last: Int) -> Value:
        if not self.packs:
            return b
        k, itemsize = kernel, self.dtype.itemsize
        area = k.offset(k.scratch, k.integer("packed"))
        panel_bytes, inner = k.integer("panel_bytes"), k.integer("inner")
        down, across = k.integer("b.depth"), k.integer("b.column")

        def panel(p: Value, _: list[Value]) -> None:
            target = k.offset(area, k.mul(k.sub(p, first), panel_bytes))
            columns = k.sub(k.integer("columns"), k.mul(p, self.width))

            def segment(s: Value, _: list[Value]) -> None:
                offset = k.load("i64", k.offset(k.offset(k.pointer("taps"), k.mul(s, _TAP_WORDS * 8)), 32), 8)
                to = k.offset(target, k.mul(k.mul(s, inner), self.width * itemsize))

                def column(j: Value, _: list[Value]) -> None:
                    used = k.compare("slt", j, columns)
                    at = k.add(k.mul(p, self.width), k.smin(j, k.sub(columns, 1)))
                    source = k.offset(k.offset(b, offset), k.mul(at, across))

                    def element(i: Value, _: list[Value]) -> None:
                        value = k.load(element_type(self.dtype), k.offset(source, k.mul(i, down)), itemsize)
                        value = k.select(used, value, k.const(0.0, value.type))
                        k.store(value, k.at(k.at(to, j, itemsize), i, self.width * itemsize), itemsize)

                    k.loop(0, inner, 1, element)

                k.loop(0, self.width, 1, column)

            k.loop(0, k.integer("segments"), 1, segment)

        k.loop(first, last, 1, panel)
        return k.offset(area, k.mul(k.sub(0, first), panel_bytes))


_TAP_WORDS = 5  # of an entry of the table of taps: steps along z, y, x; byte offset in the input; byte offset in weights


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Channels innermost everywhere; an input with few channels may also come channels first."""
    conv = cast(Conv, op)
    x, w = inputs[:2]
    if x.dtype is not w.dtype or x.dtype not in (DType.F32, DType.F64):
        raise UnsupportedOp(f"Conv of {x.dtype.value} and {w.dtype.value}: the CPU target convolves f32 and f64")
    spatial = len(conv.strides)
    if spatial > len(_AXES):
        raise UnsupportedOp(f"Conv with {spatial} spatial axes: the CPU target has at most {len(_AXES)}")
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
        moved = [
            Operand(
                o.name,
                Pointer(o.pointer.buffer, o.pointer.offset + sum(s * p for s, p in zip(o.strides[1:], phase.start, strict=False))),
                (o.strides[0], *(s * step for s, step in zip(o.strides[1:-1], conv.strides, strict=True)), o.strides[-1]),
            )
            for o in results
        ]  # fmt: skip
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
        """The phases of a transposed convolution: output o gets input i by tap k where o + pad = i·stride + k·dilation."""
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
        """The product over `taps` for `out` positions, written to `results` (strides over n, spatial axes, channels)."""
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
        names = _AXES[-len(out) :]
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
        problem = Product(
            x.dtype, sizes, columns, count * segments.inner, count, segments.inner, operands, self.epilogue, slots,
            packs=not known,
            split_segments=count if known else 0,
            row_bytes=channels * itemsize * prod(strides),
            scratch_per_row=count * _patch_bytes(segments.inner * itemsize) if segments.span else 0,
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
            and 1 < width
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
            slots: dict[str, Slot] = {"b.depth": w.strides[channel] * itemsize, "b.column": w.strides[column] * itemsize}
            return Operand("b", pointer_to(w), (group * itemsize,)), slots
        indices = [tap.index for tap in taps]

        def pack(weights: np.ndarray) -> np.ndarray:
            grouped = weights.reshape(conv.groups, weights.shape[0] // conv.groups, *weights.shape[1:])
            if not conv.transposed:
                grouped = grouped.swapaxes(1, 2)
            # [group, channel in, channel out, taps…] → [group, taps, channel in, channel out]
            chosen = [grouped[(slice(None), slice(None), slice(None), *index)] for index in indices]
            matrix = np.stack(chosen, axis=1) if chosen else np.zeros((conv.groups, 0, *grouped.shape[1:3]), weights.dtype)
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
        return table(np.asarray(self.entries, np.int64).reshape(-1, _TAP_WORDS))


def _patch_bytes(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _byte_strides(tensor: Tensor, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(tensor.strides[axis] * tensor.dtype.itemsize for axis in axes)


def _transposed_view(w: Tensor) -> Tensor:
    """The weights [out, in, 1, …] as a matrix [in, out]."""
    return Tensor(w.buffer, w.dtype, (w.shape[1], w.shape[0]), (w.strides[1], w.strides[0]), w.offset)
