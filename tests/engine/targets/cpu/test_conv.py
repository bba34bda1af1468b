from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Conv
from engine.plan.plan import Access
from engine.targets.cpu.families import family_of
from tests.engine.targets.cpu.products import assert_sum_of_products, clamp, computed, conv_reference, op
from tests.engine.targets.cpu.steps import ISAS, Layout, place, run_step

pytestmark = pytest.mark.parametrize("isa", ISAS)


def channels_last(rank: int) -> tuple[int, ...]:
    return (0, *range(2, rank), 1)


@dataclass
class Case:
    """A convolution to check. `epilogue` inputs: 1 bias; 2 also a residual; 3 also a scale per image and channel; 4
    also a row along the last axis."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    conv: Conv
    channels_first: bool = False
    known: bool = True
    dtype: type = np.float32
    epilogue: int = 1
    gap: int = 0

    def check(self, isa: str, rng: np.random.Generator, kernel: str) -> None:
        x, w = (rng.standard_normal(shape).astype(self.dtype) for shape in (self.x, self.w))
        rank, kind = len(self.x), DType.of(x.dtype)
        last = channels_last(rank)
        conv = replace(self.conv, stores=(ex.Acc(kind),))
        inputs = [
            place(x, Layout(gap=self.gap) if self.channels_first else Layout(last, gap=self.gap)),
            place(w) if self.known else computed(place(w)),
        ]
        ((_, out),) = conv.infer(inputs)
        shape = tuple(int(str(size)) for size in out)
        expected = conv_reference(x, w, conv, shape)
        magnitude = conv_reference(np.abs(x), np.abs(w), conv, shape)
        ones = (1,) * (rank - 2)
        extra = [
            rng.standard_normal(size).astype(self.dtype)
            for size in ((shape[1], *ones), shape, (*shape[:2], *ones), shape[-1:])
        ]
        inputs += [place(extra[0]), place(extra[1], Layout(last)), place(extra[2]), place(extra[3])]
        store: ex.Expr = ex.Acc(kind)
        kinds = (PointOp.ADD, PointOp.ADD, PointOp.MUL, PointOp.ADD)
        for i, point in enumerate(kinds[: self.epilogue]):
            store = op(point, store, ex.Arg(2 + i, kind))
            expected = expected * extra[i] if point is PointOp.MUL else expected + extra[i]
            magnitude = magnitude * np.abs(extra[i]) if point is PointOp.MUL else magnitude
        conv = replace(conv, stores=(clamp(store, kind, -1, 6),))
        family_of(conv).requirements(conv, tuple(inputs))
        result = run_step(conv, inputs, isa, [Layout(last, gap=self.gap)])
        assert {launch.spec.family for launch in result.launches} == {kernel}
        terms = int(np.prod(self.w)) // self.w[1 if conv.transposed else 0]
        assert_sum_of_products(result.outputs[0], np.clip(expected, -1, 6), magnitude, terms, self)


def pads(rng: np.random.Generator, axes: int, most: int = 3) -> tuple[tuple[int, int], ...]:
    return tuple((int(a), int(b)) for a, b in rng.integers(0, most, (axes, 2)))


def draw(rng: np.random.Generator, low: int, high: int, axes: int) -> tuple[int, ...]:
    return tuple(int(v) for v in rng.integers(low, high, axes))


@pytest.mark.parametrize("seed", range(40))
def test_random_convolutions(isa: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    axes = 1 + seed % 3
    groups = int(rng.choice([1, 1, 2, 3]))
    most = (4, 20, 70)[seed % 3]
    channels, outputs = groups * int(rng.integers(2, most)), groups * int(rng.integers(2, most))
    kernel, strides, dilations = draw(rng, 1, 4, axes), draw(rng, 1, 4, axes), draw(rng, 1, 3, axes)
    padding = pads(rng, axes)
    drawn = draw(rng, 1, (40, 14, 7)[axes - 1], axes)
    size = tuple(max(n, (k - 1) * d + 1) for n, k, d in zip(drawn, kernel, dilations, strict=True))
    first = groups == 1 and channels <= 4 and kernel[-1] > 1 and dilations[-1] == 1
    case = Case(
        (int(rng.integers(1, 3)), channels, *size), (outputs, channels // groups, *kernel),
        Conv(strides, padding, dilations, groups), channels_first=first, known=first or seed % 5 != 0,
        dtype=np.float64 if seed % 7 == 0 else np.float32, epilogue=seed % 5, gap=3 * (seed % 2),
    )  # fmt: skip
    simple = all(k == s == 1 for k, s in zip(kernel, strides, strict=True)) and not any(b or e for b, e in padding)
    case.check(isa, rng, "gemm" if simple and groups == 1 else "conv")


@pytest.mark.parametrize("seed", range(16))
def test_random_transposed_convolutions(isa: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    axes, groups = 1 + seed % 2, 1 + seed % 3
    channels, outputs = groups * int(rng.integers(1, 20)), groups * int(rng.integers(1, 30))
    kernel, strides, dilations = draw(rng, 2, 5, axes), draw(rng, 1, 4, axes), draw(rng, 1, 3, axes)
    extra = tuple(int(rng.integers(0, s)) for s in strides)
    conv = Conv(strides, pads(rng, axes, 2), dilations, groups, True, extra)
    case = Case(
        (2, channels, *draw(rng, 2, 8, axes)), (channels, outputs // groups, *kernel), conv, epilogue=seed % 5,
        gap=2 * (seed % 2),
    )  # fmt: skip
    case.check(isa, rng, "conv")


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("padding", [((0, 1), (0, 1)), ((3, 3), (3, 3)), ((0, 0), (0, 0))])
def test_first_layer_reads_images_in_either_order(
    isa: str, channels_first: bool, padding: tuple[tuple[int, int], ...]
) -> None:
    conv = Conv((2, 2), padding, (1, 1))
    size = 7 if padding[0][0] == 3 else 3
    case = Case((2, 3, 33, 41), (20, 3, size, size), conv, channels_first=channels_first)
    case.check(isa, np.random.default_rng(1), "conv")


def test_first_layer_asks_for_no_other_order(isa: str) -> None:
    conv = Conv((2, 2), ((1, 1), (1, 1)), (1, 1))
    x, w = place(np.zeros((1, 3, 8, 8), np.float32)), place(np.zeros((4, 3, 3, 3), np.float32))
    (need, *_), _ = family_of(conv).requirements(conv, (x, w))
    assert need.access is Access.INNER
    assert need.order in ((), (0, 1, 2, 3))


@pytest.mark.parametrize(("size", "channels", "outputs"), [(7, 512, 64), (5, 2048, 17)])
def test_many_channels_are_summed_in_parts(isa: str, size: int, channels: int, outputs: int) -> None:
    case = Case((1, channels, size, size), (outputs, channels, 3, 3), Conv((1, 1), ((1, 1), (1, 1)), (1, 1)))
    case.check(isa, np.random.default_rng(2), "conv")


@pytest.mark.parametrize(("stride", "kernel"), [(1, "gemm"), (2, "conv")])
def test_one_by_one(isa: str, stride: int, kernel: str) -> None:
    conv = Conv((stride, stride), ((0, 0), (0, 0)), (1, 1))
    Case((2, 40, 14, 14), (64, 40, 1, 1), conv, epilogue=4).check(isa, np.random.default_rng(3), kernel)


@pytest.mark.parametrize("seed", range(40))
def test_random_depthwise_convolutions(isa: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    channels, axes = int(rng.integers(1, 70)), 1 if seed % 5 == 0 else 2
    kernel, strides, dilations = draw(rng, 1, 7, axes), draw(rng, 1, 4, axes), draw(rng, 1, 3, axes)
    size = tuple(max(n, (k - 1) * d + 1) for n, k, d in zip(draw(rng, 1, 33, axes), kernel, dilations, strict=True))
    channels += channels == 1  # a single channel is an ordinary convolution, and may be a matrix product
    case = Case(
        (int(rng.integers(1, 3)), channels, *size), (channels, 1, *kernel),
        Conv(strides, pads(rng, axes, 4), dilations, channels), epilogue=seed % 5, gap=3 * (seed % 2),
        dtype=np.float64 if seed % 7 == 0 else np.float32,
    )  # fmt: skip
    case.check(isa, rng, "depthwise")


def test_another_image_size_needs_no_other_kernel(isa: str) -> None:
    conv = Conv((1, 1), ((1, 1), (1, 1)), (1, 1))
    w = np.ones((20, 8, 3, 3), np.float32)
    images = [place(np.ones((1, 8, size, size), np.float32), Layout((0, 2, 3, 1))) for size in (3, 8, 21)]
    specs = {launch.spec for x in images for launch in run_step(conv, [x, w], isa).launches}
    assert len(specs) == 1


def test_integers_and_four_spatial_axes_are_refused_by_name(isa: str) -> None:
    conv = Conv((1, 1), ((0, 0), (0, 0)), (1, 1))
    x = place(np.zeros((1, 2, 3, 3), np.int8))
    with pytest.raises(UnsupportedOp, match="Conv of i8"):
        family_of(conv).requirements(conv, (x, x))
    four = Conv((1,) * 4, ((0, 0),) * 4, (1,) * 4)
    x = place(np.zeros((1, 2, 3, 3, 3, 3), np.float32))
    with pytest.raises(UnsupportedOp, match="4 spatial axes"):
        family_of(four).requirements(four, (x, x))
