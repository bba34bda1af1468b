"""Convolution as a tile kernel: the rows are output positions, the segments taps of the kernel.

The device side of `conv.py`. For every tile and segment it works out where the rows lie in the input; positions in the
padding read a piece of zeros instead, rows of taps that are partly in the padding a small copy in scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from engine.targets.cpu.codegen.emit import Int, Value, element_type, vector_type
from engine.targets.cpu.codegen.tile import TileSpec
from engine.targets.cpu.kernel import KernelBuilder

AXES = "zyx"  # names of the spatial axes, outermost first; fewer axes have the last of them
TAP_WORDS = 5  # of a table entry: steps along z, y, x; byte offsets in the input and in the weights


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
        return AXES[-self.spatial :]

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
        k.branch(some, lambda: self._patches(k, table, block, outside, place, starts))

    def _coordinates(self, k: KernelBuilder, row: Int) -> dict[str, Value]:
        """The first input coordinate of each row of a tile, per axis: output coordinate times stride minus padding."""
        sizes = {axis: k.i64(k.integer(f"out.{axis}")) for axis in self.axes[1:]}
        first: dict[str, Int] = {}
        rest = row
        for axis in reversed(self.axes[1:]):
            first[axis], rest = k.rem(rest, sizes[axis]), k.div(rest, sizes[axis])
        first[self.axes[0]] = rest
        if self.spatial == 1:
            places = [k.binary("add", self._splat(k, rest), self._counting())]
        else:
            # Lines of the output are seldom shorter than a tile; then a tile goes over one end of a line at most.
            long = k.compare("sge", sizes["x"], self.rows)
            places = k.branch(
                long, lambda: self._on_two_lines(k, first, sizes), lambda: self._one_by_one(k, first, sizes)
            )
        return {
            axis: k.binary(
                "sub",
                k.binary("mul", place, self._splat(k, k.integer(f"stride.{axis}"))),
                self._splat(k, k.integer(f"pad.{axis}")),
            )
            for axis, place in zip(self.axes, places, strict=True)
        }

    def _on_two_lines(self, k: KernelBuilder, first: dict[str, Int], sizes: dict[str, Value]) -> list[Value]:
        """Coordinates of the rows of a tile, from those of its first row, when a line is at least as long as a tile."""
        type_ = vector_type("i64", self.rows)
        places = {}
        step = self._counting()
        for axis in reversed(self.axes):
            place = k.binary("add", self._splat(k, first[axis]), step)
            if axis != self.axes[0]:
                size = self._splat(k, sizes[axis])
                over = k.compare("sge", place, size)
                place = k.select(over, k.binary("sub", place, size), place)
                step = k.convert("zext", over, type_)
            places[axis] = place
        return [places[axis] for axis in self.axes]

    def _one_by_one(self, k: KernelBuilder, first: dict[str, Int], sizes: dict[str, Value]) -> list[Value]:
        """The same for lines of any length."""
        type_ = vector_type("i64", self.rows)
        current = dict(first)
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
                current[axis] = moved
                if axis != self.axes[0]:
                    over = k.compare("sge", moved, sizes[axis])
                    current[axis] = k.select(over, k.i64(0), moved)
                    carry = k.convert("zext", over, "i64")
        return [vectors[axis] for axis in self.axes]

    def _splat(self, k: KernelBuilder, value: Int) -> Value:
        return k.splat(k.i64(value), self.rows)

    def _counting(self) -> Value:
        """0, 1, 2, … over the rows of a tile."""
        return Value(f"<{', '.join(f'i64 {r}' for r in range(self.rows))}>", vector_type("i64", self.rows))

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
        entry = k.offset(taps, k.mul(s, TAP_WORDS * 8))
        inside: Value | None = None
        for axis in checked:
            step = k.load("i64", k.offset(entry, 8 * AXES.index(axis)), 8)
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
    ) -> None:
        """Give the rows whose taps are partly in the padding a copy with zeros in it."""
        rows, itemsize = self.rows, self.dtype.itemsize
        patch, segments = k.integer("patch"), k.integer("segments")
        area = k.offset(k.scratch, k.add(k.integer("patches"), k.mul(block, k.mul(k.mul(segments, rows), patch))))
        kept: dict[str, Value] = {}
        for name, vector in (("outside", k.convert("zext", outside, place.type)), ("place", place)):
            kept[name] = k.stack(rows * 8)
            k.store(vector, kept[name], 8)
        for axis in self.axes:
            kept[axis] = k.stack(rows * 8)
            k.store(starts[axis], kept[axis], 8)
        taps, x_size, pixel, step = k.pointer("taps"), k.integer("in.x"), k.integer("pixel"), k.integer("a.x")
        type_ = element_type(self.dtype)

        def row(r: Value, _: list[Value]) -> None:
            def word(name: str) -> Value:
                return k.load("i64", k.at(kept[name], r, 8), 8)

            def segment(s: Value, _: list[Value]) -> None:
                entry = k.offset(taps, k.mul(s, TAP_WORDS * 8))
                target = k.offset(area, k.mul(k.add(k.mul(s, rows), r), patch))
                start = k.add(word("place"), k.load("i64", k.offset(entry, 24), 8))
                source = k.convert("inttoptr", k.i64(start), "ptr")

                def tap(t: Value, _: list[Value]) -> None:
                    fits = k.compare("ult", k.add(word("x"), t), x_size)

                    def element(i: Value, _: list[Value]) -> None:
                        at = k.offset(k.offset(source, k.mul(t, step)), k.mul(i, itemsize))
                        (value,) = k.branch(fits, lambda: [k.load(type_, at, itemsize)], lambda: [k.const(0.0, type_)])
                        k.store(value, k.at(target, k.add(k.mul(t, pixel), i), itemsize), itemsize)

                    k.loop(0, pixel, 1, element)

                def fill() -> None:
                    k.loop(0, k.integer("taps.x"), 1, tap)
                    k.store(target, k.offset(table, k.add(k.mul(s, rows * 8), k.mul(r, 8))), 8)

                inside = Value("true", "i1")
                for axis in self.axes[:-1]:
                    at = k.add(word(axis), k.load("i64", k.offset(entry, 8 * AXES.index(axis)), 8))
                    inside = k.binary("and", inside, k.compare("ult", at, k.integer(f"in.{axis}")))
                k.branch(inside, fill)

            wanted = k.compare("ne", word("outside"), 0)
            k.branch(wanted, lambda: _nothing(k.loop(0, segments, 1, segment)))

        k.loop(0, rows, 1, row)

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
                offset = k.load("i64", k.offset(k.offset(k.pointer("taps"), k.mul(s, TAP_WORDS * 8)), 32), 8)
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


def _nothing(_: object) -> None:
    return None
