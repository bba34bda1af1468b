"""The two passes of resampling a picture of four bytes a pixel: along its rows, then down its columns, with whole
weights of `WEIGHT_BITS` bits and 8 bits in between. Called by `image.py`, which makes windows and weights.

Sums have 32 bits. A window is `taps` neighbours that begin at `first` of each output. Sizes that are no multiple of a
block are covered by a last block that ends where they end, and computes again what the one before it did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.targets.cpu.codegen.emit import Builder, Module, Value, lanes_of
from engine.targets.cpu.kernel import Code

WEIGHT_BITS = 22  # a sum of weighted levels has 32, two of them for filters that go below 0 and above 1
PIXEL_BYTES = 4
CHANNELS = 3  # the fourth byte of a pixel says nothing
TAPS = 4  # that are multiplied at once along a row: a vector of whole pixels
ROWS = 4  # that share the weights of a window
COLUMNS = 16  # of a block down the columns

_LANES = TAPS * PIXEL_BYTES
_BYTES, _SUMS = f"<{_LANES} x i8>", f"<{_LANES} x i32>"


@dataclass(frozen=True)
class ResampleRows(Code):
    """``void f(ptr pixels, ptr out, i64 rows, i64 pixel_row, i64 outputs, ptr first, ptr weights, i64 taps)``.

    `rows` rows (at least `ROWS`), `pixel_row` bytes apart, become rows of `outputs` pixels that follow each other.
    `first[outputs]` i64, `weights[outputs, taps]` i32; `taps` is a multiple of `TAPS`.
    """

    family: ClassVar[str] = "resample_rows"

    def ir(self) -> str:
        module = Module(self.isa)

        def build(b: Builder, values: list[Value]) -> None:
            pixels, out, rows, pixel_row, outputs, first, weights, taps = values
            out_row = b.mul(outputs, PIXEL_BYTES)

            def block(row: Value, _: list[Value]) -> None:
                begin = b.smin(row, b.sub(rows, ROWS))
                source, target = b.offset(pixels, b.mul(begin, pixel_row)), b.offset(out, b.mul(begin, out_row))

                def pixel(x: Value, _: list[Value]) -> None:
                    window = b.at(source, b.load("i64", b.at(first, x, 8), 8), PIXEL_BYTES)
                    own = b.at(weights, b.mul(x, taps), 4)

                    def tap(t: Value, sums: list[Value]) -> list[Value]:
                        few = b.load(f"<{TAPS} x i32>", b.at(own, t, 4), 4)
                        weight = b.shuffle(few, few, [lane // PIXEL_BYTES for lane in range(_LANES)])
                        place = b.at(window, t, PIXEL_BYTES)
                        lines = (b.offset(place, b.mul(pixel_row, i)) for i in range(ROWS))
                        return [_plus_weighted(b, s, line, weight) for s, line in zip(sums, lines, strict=True)]

                    sums = b.loop(0, taps, TAPS, tap, [b.const(0, _SUMS)] * ROWS)
                    levels = b.convert("bitcast", _levels(b, _added_up(b, sums)), f"<{ROWS} x i32>")
                    place = b.at(target, x, PIXEL_BYTES)
                    for i in range(ROWS):
                        b.store(b.extract(levels, i), b.offset(place, b.mul(out_row, i)), 1)

                b.loop(0, outputs, 1, pixel)

            b.loop(0, rows, ROWS, block)

        names = ("pixels ptr", "out ptr", "rows i64", "pixel_row i64", "outputs i64", "first ptr", "weights ptr")
        module.function(self.symbol, [_parameter(name) for name in (*names, "taps i64")], build)
        return module.text()


@dataclass(frozen=True)
class ResampleColumns(Code):
    """``void f(ptr pixels, ptr out, i64 width, i64 outputs, ptr first, ptr weights, i64 taps)``.

    Rows of `width` pixels (at least `COLUMNS`) that follow each other become `outputs` rows of each channel: `out` is
    u8[CHANNELS, outputs, width]. `first[outputs]` i64, `weights[outputs, taps]` i32.
    """

    family: ClassVar[str] = "resample_columns"

    def ir(self) -> str:
        module = Module(self.isa)

        def build(b: Builder, values: list[Value]) -> None:
            pixels, out, width, outputs, first, weights, taps = values
            pixel_row, plane = b.mul(width, PIXEL_BYTES), b.mul(width, outputs)
            vectors = COLUMNS * PIXEL_BYTES // _LANES

            def line(y: Value, _: list[Value]) -> None:
                window = b.offset(pixels, b.mul(b.load("i64", b.at(first, y, 8), 8), pixel_row))
                own, target = b.at(weights, b.mul(y, taps), 4), b.offset(out, b.mul(y, width))

                def block(column: Value, _: list[Value]) -> None:
                    begin = b.smin(column, b.sub(width, COLUMNS))
                    source = b.at(window, begin, PIXEL_BYTES)

                    def tap(t: Value, sums: list[Value]) -> list[Value]:
                        weight = b.splat(b.load("i32", b.at(own, t, 4), 4), _LANES)
                        place = b.offset(source, b.mul(t, pixel_row))
                        return [_plus_weighted(b, s, b.offset(place, i * _LANES), weight) for i, s in enumerate(sums)]

                    sums = b.loop(0, taps, 1, tap, [b.const(0, _SUMS)] * vectors)
                    levels = [_levels(b, s) for s in sums]
                    while len(levels) > 1:
                        pairs = zip(levels[::2], levels[1::2], strict=True)
                        levels = [b.shuffle(one, other, range(2 * lanes_of(one.type))) for one, other in pairs]
                    for channel in range(CHANNELS):
                        picked = b.shuffle(levels[0], levels[0], range(channel, COLUMNS * PIXEL_BYTES, PIXEL_BYTES))
                        b.store(picked, b.offset(b.offset(target, begin), b.mul(plane, channel)), 1)

                b.loop(0, width, COLUMNS, block)

            b.loop(0, outputs, 1, line)

        names = ("pixels ptr", "out ptr", "width i64", "outputs i64", "first ptr", "weights ptr", "taps i64")
        module.function(self.symbol, [_parameter(name) for name in names], build)
        return module.text()


def _parameter(text: str) -> tuple[str, str]:
    name, type_ = text.split()
    return name, type_


def _plus_weighted(b: Builder, total: Value, place: Value, weight: Value) -> Value:
    """`total` and the products of the bytes at `place`."""
    wide = b.convert("zext", b.load(_BYTES, place, 1), _SUMS)
    return b.binary("add", total, b.binary("mul", wide, weight))


def _added_up(b: Builder, sums: list[Value]) -> Value:
    """Of each of four vectors the sum of its pixels; the four pixels side by side."""
    half = _LANES // 2

    def fold(one: Value, other: Value, size: int) -> Value:
        """Neighbouring runs of `size` lanes added, of both vectors, the second behind the first."""
        lanes = range(2 * _LANES)
        even = [lane for lane in lanes if lane // size % 2 == 0]
        odd = [lane for lane in lanes if lane // size % 2]
        return b.binary("add", b.shuffle(one, other, even), b.shuffle(one, other, odd))

    return fold(fold(sums[0], sums[1], half), fold(sums[2], sums[3], half), PIXEL_BYTES)


def _levels(b: Builder, sums: Value) -> Value:
    """Sums to bytes, rounded and cut off at both ends."""
    rounded = b.binary("add", sums, b.const(1 << (WEIGHT_BITS - 1), _SUMS))
    level = b.binary("ashr", rounded, b.const(WEIGHT_BITS, _SUMS))
    level = b.intrinsic("llvm.smax", _SUMS, level, b.const(0, _SUMS))
    return b.convert("trunc", b.intrinsic("llvm.smin", _SUMS, level, b.const(255, _SUMS)), _BYTES)
