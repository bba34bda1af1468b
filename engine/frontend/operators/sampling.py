"""GridSample and RoiAlign: reading an image at places that are data, as weighted sums of lookups in its pixels.

The formulas are those of the ONNX operators. GridSample's: a coordinate in [-1, 1] is scaled to pixels, brought inside
by the padding mode, and interpolated between the pixels around it; pixels that are not there are padded once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product as combinations

from engine.frontend import foreign
from engine.frontend import formula as f
from engine.frontend.formula import Term
from engine.frontend.onnx_node import OnnxNode, compute_dtype, source, store
from engine.frontend.operators.indexing import lookup
from engine.frontend.operators.shape import positions
from engine.frontend.operators.slicing import drop_axis
from engine.frontend.registry import Results, operator
from engine.ir import ops
from engine.ir.dim import product
from engine.ir.dtype import DType
from engine.ir.graph import Value

_OLD_MODES = {"bilinear": "linear", "bicubic": "cubic"}
_CUBIC = -0.75
_AT_ONCE = 8  # lookups that are added up in one expression


@dataclass(frozen=True)
class _Sampling:
    """The attributes, and the formulas for one axis of `size` pixels (a float, as all terms here are)."""

    mode: str
    padding: str
    align_corners: bool

    @property
    def taps(self) -> tuple[int, ...]:
        """The pixels around a coordinate that count, from its own on."""
        return {"nearest": (0,), "linear": (0, 1), "cubic": (-1, 0, 1, 2)}[self.mode]

    def coordinate(self, normalised: Term, size: Term) -> Term:
        """In pixels, inside by the padding mode."""
        from_edge = (normalised + 1.0) * 0.5
        x = from_edge * (size - 1.0) if self.align_corners else from_edge * size - 0.5
        if self.mode == "nearest":
            x = f.round_half_even(x)
        if self.padding == "border":
            # What lies less than half a pixel outside stays there: a cubic tells the difference.
            low, high = (0.0, size - 1.0) if self.align_corners else (-0.5, size - 0.5)
            inside = f.logical_and(f.less_equal(x.like(low), x), f.less_equal(x, high))
            return f.where(inside, x, f.minimum(f.maximum(x, 0.0), size - 1.0))
        return self._reflected(x, size) if self.padding == "reflection" else x

    def _reflected(self, x: Term, size: Term) -> Term:
        """Turned back at the outer pixels' centres or, without `align_corners`, their outer edges."""
        low = 0.0 if self.align_corners else -0.5
        length = size - 1.0 if self.align_corners else size
        distance = f.absolute(x - low)
        turns = f.floor(distance / length)
        rest = distance - turns * length
        is_even = f.equal(turns - f.floor(turns * 0.5) * 2.0, 0.0)
        return f.where(is_even, rest + low, length - rest + low)

    def pixel(self, coordinate: Term, tap: int, size: Term) -> tuple[Term, Term]:
        """(Position, whether it counts) of a tap. The position is always inside, also that of a NaN."""
        i = f.floor(coordinate) + float(tap)
        last = size - 1.0
        counts = f.logical_and(f.less_equal(i.like(0.0), i), f.less_equal(i, last))
        if self.padding == "reflection":
            i = f.round_half_even(self._reflected(i, size))
        i = f.where(f.equal(i, i), f.minimum(f.maximum(i, 0.0), last), 0.0)
        return i, counts

    def weight(self, coordinate: Term, tap: int) -> Term:
        if self.mode == "nearest":
            return coordinate.like(1.0)
        t = coordinate - f.floor(coordinate)
        if self.mode == "linear":
            return t if tap else 1.0 - t
        # Keys, "Cubic convolution interpolation for digital image processing", 1981.
        a = _CUBIC
        d = {-1: t + 1.0, 0: t, 1: 1.0 - t, 2: 2.0 - t}[tap]
        if tap in (0, 1):
            return ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0
        return ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a


@operator("GridSample")
def GridSample(node: OnnxNode, x: Value, grid: Value) -> Value:
    mode = node.text("mode", "linear" if node.version >= 20 else "bilinear")
    mode = _OLD_MODES.get(mode, mode)
    if mode not in ("nearest", "linear", "cubic"):
        raise node.unsupported(f"attribute mode = {mode!r}")
    padding = node.choice("padding_mode", "zeros", "border", "reflection")
    sampling = _Sampling(mode, padding, bool(node.integer("align_corners", 0)))
    axes = x.rank - 2
    if axes < 1 or grid.rank != x.rank or grid.shape[-1] != axes or not (x.dtype.is_float and grid.dtype.is_float):
        raise node.invalid(f"an input of rank {x.rank} with a grid of shape {list(grid.shape)}")
    wide = compute_dtype(grid.dtype)
    # The grid names the innermost axis first.
    places = [node.cast(drop_axis(node, grid, axes + 1, axes - 1 - i), wide) for i in range(axes)]
    sizes = [node.cast(node.builder.sizes([size], ()), wide) for size in x.shape[2:]]
    image = positions(node, x.shape[0], 0, axes + 1)
    table = _pixels(node, x)

    def one(taps: tuple[int, ...]) -> tuple[Value, Value]:
        """The pixels at some taps [n, …, channels], and their weights [n, …, 1]."""
        index = node.pointwise(_index(sampling, taps), *places, *sizes, image)
        weight = node.pointwise(_weight(sampling, taps), *places, *sizes)
        return lookup(node, table, index), node.reshape(weight, (*weight.shape, 1))

    total: Value | None = None
    every = [one(taps) for taps in combinations(sampling.taps, repeat=axes)]
    for first in range(0, len(every), _AT_ONCE):
        pixels, weights = zip(*every[first : first + _AT_ONCE], strict=True)
        before = [total] if total is not None else []
        is_last = first + _AT_ONCE >= len(every)
        total = node.pointwise(_sum(len(pixels), x.dtype if is_last else None), *pixels, *weights, *before)
    assert total is not None
    return node.transpose(total, (0, axes + 1, *range(1, axes + 1)))


def _pixels(node: OnnxNode, x: Value) -> Value:
    """[n, channels, …] as a table of pixels, a row of channels each."""
    last = node.transpose(x, (0, *range(2, x.rank), 1))
    return node.reshape(last, (x.shape[0] * product(x.shape[2:]), x.shape[1]))


def _index(sampling: _Sampling, taps: tuple[int, ...]) -> Callable[..., Term]:
    """The row of the table: of terms (places, sizes, number of the image)."""

    def formula(*terms: Term) -> Term:
        axes = len(taps)
        flat = terms[-1]
        for place, size, tap in zip(terms[:axes], terms[axes : 2 * axes], taps, strict=True):
            pixel, _ = sampling.pixel(sampling.coordinate(place, size), tap, size)
            flat = flat * size.cast(DType.I64) + pixel.cast(DType.I64)
        return flat

    return formula


def _weight(sampling: _Sampling, taps: tuple[int, ...]) -> Callable[..., Term]:
    """The weight of a pixel, 0 where zeros stand for it: of terms (places, sizes)."""

    def formula(*terms: Term) -> Term:
        result: Term | None = None
        for place, size, tap in zip(terms[: len(taps)], terms[len(taps) :], taps, strict=True):
            coordinate = sampling.coordinate(place, size)
            weight = sampling.weight(coordinate, tap)
            if sampling.padding == "zeros":
                weight = f.where(sampling.pixel(coordinate, tap, size)[1], weight, 0.0)
            result = weight if result is None else result * weight
        assert result is not None
        return result

    return formula


def _sum(count: int, dtype: DType | None) -> Callable[..., Term]:
    """The weighted sum of `count` pixels, and of a sum so far: of terms (pixels, weights, sum), rounded to `dtype`."""

    def formula(*terms: Term) -> Term:
        wide = terms[count].dtype
        products = [pixel.cast(wide) * weight for pixel, weight in zip(terms[:count], terms[count:], strict=False)]
        products += terms[2 * count :]
        result = products[0]
        for other in products[1:]:
            result = result + other
        return result if dtype is None else result.cast(dtype)

    return formula


@operator("RoiAlign")
def RoiAlign(node: OnnxNode, x: Value, regions: Value, images: Value) -> Results:
    """[regions, channels, height, width]: every result the mean (largest) of `sampling_ratio` by as many samples of a
    part of a region [left, top, right, bottom] of an image. Where their number depends on the region, the host takes
    them."""
    ratio = node.integer("sampling_ratio", 0)
    if x.rank != 4 or regions.rank != 2 or regions.shape[1] != 4 or not (x.dtype.is_float and regions.dtype.is_float):
        raise node.invalid(f"an input of rank {x.rank} with regions of shape {[str(dim) for dim in regions.shape]}")
    if ratio < 1:
        return foreign.opaque(node, [x, regions, images])
    is_half = node.version >= 16 and node.choice(
        "coordinate_transformation_mode", "half_pixel", "output_half_pixel"
    ) == ("half_pixel")
    is_mean = node.choice("mode", "avg", "max") == "avg"
    parts = node.integer("output_height", 1), node.integer("output_width", 1)
    if min(parts) < 1:
        raise node.invalid(f"{parts[0]} by {parts[1]} results a region")
    scale, wide, count = node.number("spatial_scale", 1.0), compute_dtype(regions.dtype), regions.shape[0]
    # Along each axis: the places [regions, samples], and of the pixels before and behind them positions and weights.
    taps: list[list[tuple[Value, Value]]] = []
    for axis in (0, 1):
        samples = parts[axis] * ratio
        low, high = (node.reshape(drop_axis(node, regions, 1, 1 - axis + two), (count, 1)) for two in (0, 2))
        line = node.cast(positions(node, samples, 1, 2), wide)
        size = node.cast(node.builder.sizes([x.shape[2 + axis]], ()), wide)
        terms = (node.cast(low, wide), node.cast(high, wide), line, size)
        region = _Region(scale, is_half, samples)
        taps.append(
            [(node.pointwise(region.pixel(tap), *terms), node.pointwise(region.weight(tap), *terms)) for tap in (0, 1)]
        )
    table, of = _pixels(node, x), node.reshape(node.cast(images, DType.I64), (count, 1, 1))
    height, width = (node.builder.sizes([size], ()) for size in x.shape[2:])
    rows, columns = (parts[axis] * ratio for axis in (0, 1))
    pixels, weights = [], []
    for (row, above), (column, beside) in combinations(*taps):
        index = node.pointwise(
            lambda n, i, j, h, w: (n * h + i) * w + j,
            of, node.reshape(row, (count, rows, 1)), node.reshape(column, (count, 1, columns)), height, width,
        )  # fmt: skip
        apart = (count, parts[0], ratio, parts[1], ratio)
        pixels.append(node.reshape(lookup(node, table, index), (*apart, x.shape[1])))
        first = node.reshape(above, (count, parts[0], ratio, 1, 1, 1))
        second = node.reshape(beside, (count, 1, 1, parts[1], ratio, 1))
        weights.append(node.pointwise(lambda a, b: a * b, first, second))
    total = node.pointwise(_sum(4, None) if is_mean else _largest, *pixels, *weights)
    kind = ops.ReduceKind.MEAN if is_mean else ops.ReduceKind.MAX
    result = node.add(ops.Reduce(kind, (2, 4), False, source(total.dtype), store(x.dtype)), total)
    return node.transpose(result, (0, 3, 1, 2))


@dataclass(frozen=True)
class _Region:
    """How `samples` places lie along one axis of a region: formulas of its ends, the number of the sample, and the
    pixels that the image has."""

    scale: float
    is_half: bool
    samples: int

    def _place(self, low: Term, high: Term, number: Term) -> Term:
        offset = 0.5 if self.is_half else 0.0
        start, end = low * self.scale - offset, high * self.scale - offset
        length = end - start if self.is_half else f.maximum(end - start, 1.0)
        return start + length * ((number + 0.5) / float(self.samples))

    def _inside(self, place: Term, size: Term) -> Term:
        """The place on the image; that of a NaN is 0."""
        return f.where(f.equal(place, place), f.minimum(f.maximum(place, 0.0), size - 1.0), 0.0)

    def pixel(self, tap: int) -> Callable[..., Term]:
        """The position of the pixel before the place, or of the one behind it."""

        def formula(low: Term, high: Term, number: Term, size: Term) -> Term:
            before = f.floor(self._inside(self._place(low, high, number), size))
            return (f.minimum(before + 1.0, size - 1.0) if tap else before).cast(DType.I64)

        return formula

    def weight(self, tap: int) -> Callable[..., Term]:
        """How much that pixel counts: nothing for a place more than one pixel outside."""

        def formula(low: Term, high: Term, number: Term, size: Term) -> Term:
            place = self._place(low, high, number)
            inside = self._inside(place, size)
            behind = inside - f.floor(inside)
            near = f.logical_and(f.less_equal(place.like(-1.0), place), f.less_equal(place, size))
            return f.where(near, behind if tap else 1.0 - behind, 0.0)

        return formula


def _largest(*terms: Term) -> Term:
    """The largest of the weighted pixels: of terms (pixels, weights)."""
    half = len(terms) // 2
    products = [pixel.cast(weight.dtype) * weight for pixel, weight in zip(terms[:half], terms[half:], strict=True)]
    result = products[0]
    for other in products[1:]:
        result = f.maximum(result, other)
    return result
