"""Convolutions against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.graph import Node, Value
from engine.ir.ops import Conv
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.targets.cuda import covering as cv
from engine.targets.cuda.conv import filters_of, launch_conv, lower
from engine.targets.cuda.conv_geometry import Geometry, channels_last
from engine.targets.cuda.conv_simt import is_depthwise, is_direct, launch_depthwise, launch_direct, launch_simt
from engine.targets.cuda.covering import ACC, F16, F32, make_step, weight
from engine.targets.cuda.kernel import Context, Launch, content
from engine.targets.cuda.tiles import MMA_TILES
from tests.engine import ir_interpreter
from tests.engine.targets.cuda.cases import check, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner

BF16, F64 = DType.BF16, DType.F64


@dataclass(frozen=True)
class Kind:
    """Types of a convolution: of the image, the weights, and what the epilogue stores."""

    x: DType
    w: DType
    tf32: bool = False

    @property
    def rounding(self) -> float:
        """How operands are taken: as they are (fp32 may lose its last bits), or rounded to the nearest tf32
        (test_gemm.py derives the figure)."""
        return 2.0**-10 if self.tf32 else 2.0**-21

    def context(self, runner: Runner) -> Context:
        return replace(runner.context, tf32=self.tf32)


FP16, BF16_, FP32, TF32 = Kind(F16, F16), Kind(BF16, BF16), Kind(F32, F32), Kind(F32, F32, True)
KINDS = (FP16, BF16_, FP32, TF32, Kind(F32, F16), Kind(F32, BF16))


def draw(rng: np.random.Generator, low: int, high: int, axes: int) -> tuple[int, ...]:
    return tuple(int(v) for v in rng.integers(low, high, axes))


def scattered(rng: np.random.Generator, dtype: DType, shape: tuple[int, ...], number: int) -> Tensor:
    """An operand with its axes in any order, with gaps, away from the start of its buffer."""
    order = tuple(int(axis) for axis in rng.permutation(len(shape)))
    offset, gap = int(rng.integers(0, 20)), int(rng.integers(1, 3))
    strides = tuple(stride * gap for stride in row_major(shape, order))
    size = offset + 1 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    buffer = Buffer(f"input{number}", BufferKind.INPUT, size * dtype.itemsize)
    return Tensor(buffer, dtype, shape, strides, offset)


@dataclass(frozen=True)
class Shape:
    """The sizes of a random convolution."""

    op: Conv
    x: tuple[int, ...]
    w: tuple[int, ...]

    @property
    def terms(self) -> int:
        """The most products in a sum."""
        channels = self.x[1] // self.op.groups
        return channels * int(np.prod(self.w[2:]))


def random_shape(
    rng: np.random.Generator, axes: int, groups: int, c: int, n: int, transposed: bool = False, kernels: int = 5
) -> Shape:
    """`c`, `n`: channels in and out of a group. Even kernels, strides larger than kernels, pads on either side and
    negative ones."""
    kernel, strides = draw(rng, 1, kernels, axes), draw(rng, 1, 4, axes)
    dilations = draw(rng, 1, 4 if rng.random() < 0.4 else 2, axes)
    pads = tuple((int(b), int(e)) for b, e in rng.integers(-1 if rng.random() < 0.3 else 0, 4, (axes, 2)))
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    largest = (60, 16, 6)[axes - 1]
    drawn = draw(rng, 1, largest, axes)
    extra: tuple[int, ...] = ()
    if transposed:
        extra = tuple(int(rng.integers(0, s)) for s in strides)
        least = [
            max(1, -(-(1 - extent - more + b + e) // s) + 1)
            for extent, more, (b, e), s in zip(extents, extra, pads, strides, strict=True)
        ]
        drawn = draw(rng, 1, max(3, largest // 2), axes)
    else:
        least = [max(1, extent - b - e) for extent, (b, e) in zip(extents, pads, strict=True)]
    size = tuple(max(a, b) for a, b in zip(drawn, least, strict=True))
    op = Conv(strides, pads, dilations, groups, transposed, extra if any(extra) else ())
    w = (groups * c, n, *kernel) if transposed else (groups * n, c, *kernel)
    return Shape(op, (int(rng.integers(1, 4)), groups * c, *size), w)


def stored(kind: Kind, name: str, acc: ex.Expr = ACC) -> ex.Expr:
    wide, narrow = acc.dtype, kind.w
    value = acc if name == "plain" else cv.add(acc, ex.cast(ex.Arg(2, narrow), wide))
    if name == "residual":
        value = cv.add(value, ex.cast(ex.Arg(3, narrow), wide))
    return ex.cast(cv.relu6(value) if name == "relu6" else value, narrow)


EPILOGUES = ("relu6", "residual", "bias", "plain")


def random_step(
    rng: np.random.Generator, kind: Kind, shape: Shape, name: str, known: bool = True, strided: bool = False
) -> Step:
    """`known`: weights are constants; `strided`: operands lie in any way."""
    acc = ex.Acc(F64) if kind.w is F64 else ACC
    op = replace(shape.op, stores=(stored(kind, name, acc),))
    x: cv.Given = scattered(rng, kind.x, shape.x, 0) if strided else (kind.x, shape.x)
    w: cv.Given = scattered(rng, kind.w, shape.w, 1) if strided else (kind.w, shape.w)
    channels = op.infer((_typed(kind.x, shape.x), _typed(kind.w, shape.w)))[0][1]
    inputs: list[cv.Given] = [x, weight(*shape.w, dtype=kind.w) if known else w]
    inputs += [] if name == "plain" else [weight(channels[1], *(1,) * (len(shape.x) - 2), dtype=kind.w)]
    inputs += [(kind.w, channels)] if name == "residual" else []
    return make_step(op, inputs)


def window_step(rng: np.random.Generator, kind: Kind, shape: Shape) -> Step:
    """A step with a bias, of some of the channels, rows and pixels of a larger image whose pixels begin at multiples of
    16 bytes."""
    chunk = 16 // kind.w.itemsize
    around = (shape.x[0], shape.x[1] + -shape.x[1] % chunk + chunk, shape.x[2] + 2, shape.x[3] + 3)
    strides = row_major(around, channels_last(4))
    offset = chunk + 2 * strides[2] + 3 * strides[3]
    buffer = Buffer("input0", BufferKind.INPUT, (offset + int(np.prod(around))) * kind.w.itemsize)
    step = random_step(rng, kind, shape, "bias")
    return replace(step, inputs=(Tensor(buffer, kind.x, shape.x, strides, offset), *step.inputs[1:]))


def _typed(dtype: DType, shape: tuple[int, ...]) -> Tensor:
    return Tensor(Buffer("", BufferKind.INPUT, 0), dtype, shape, row_major(shape))


def case(rng: np.random.Generator, kind: Kind, shape: Shape, step: Step, launches: list[Launch], about: str) -> Case:
    # The kernel rounds an fp32 image to the type of narrow weights: give it one that survives this.
    mixed = kind.x is not kind.w
    feeds = {0: rng.standard_normal(shape.x).astype(kind.w.numpy).astype(kind.x.numpy)} if mixed else {}
    label = f"{kind} {shape.x} {shape.op} {shape.w} {about}"
    return Case(label, step, shape.terms, feeds, launches, rounding=kind.rounding)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_implicit_product_matches_float64(runner: Runner, count: int, transposed: bool) -> None:
    """Every tile and type, one to three axes, groups, any padding, k split or not."""
    rng, cases = rng_of(f"product{transposed}"), []
    for i in range(count):
        kind, tile, axes = KINDS[i % len(KINDS)], MMA_TILES[(i // 2) % len(MMA_TILES)], (2, 1, 3)[i // 2 % 3]
        c, n = (ragged(rng, 64, int(rng.choice([1, 4, 8]))) for _ in range(2))
        shape = random_shape(rng, axes, int(rng.choice([1, 1, 1, 2, 3])), c, n, transposed)
        name = EPILOGUES[i % 4]
        step, context = random_step(rng, kind, shape, name, strided=i % 3 == 2), kind.context(runner)
        geometry = Geometry(step)
        filters, packing = filters_of(step, geometry, context)
        tile = replace(tile, splits=int(rng.choice([1, 1, 2, 3])))
        launches = [*packing, launch_conv(step, geometry, filters, tile, context)]
        cases.append(case(rng, kind, shape, step, launches, f"{name} {tile}"))
    check(runner, cases)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_computed_weights_match_float64(runner: Runner, count: int, transposed: bool) -> None:
    """Weights in any layout that no one has packed."""
    rng, cases = rng_of(f"computed{transposed}"), []
    for i in range(count):
        kind, axes = KINDS[i % len(KINDS)], (2, 1, 3)[i // 2 % 3]
        c, n = (ragged(rng, 40, int(rng.choice([1, 8]))) for _ in range(2))
        groups = int(rng.choice([1, 1, 2]))
        shape = random_shape(rng, axes, groups, c, n, transposed, kernels=2 if i % 4 == 3 else 4)
        step = random_step(rng, kind, shape, "bias", known=False, strided=i % 2 == 0)
        cases.append(case(rng, kind, shape, step, lower(step, kind.context(runner)), "computed"))
    check(runner, cases)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_outside_the_matrix_units_matches_float64(runner: Runner, count: int, transposed: bool) -> None:
    """Depthwise filters of any size, channel multipliers, groups, known weights and computed ones, fp64."""
    rng, cases = rng_of(f"simt{transposed}"), []
    for i in range(count):
        kind, axes = (*KINDS, Kind(F64, F64))[i % 7], (2, 1, 3)[i % 3]
        groups = int(rng.choice([1, 2, 5, 8, 16, 24]))
        c, n = (1, 1) if i % 2 else (int(rng.integers(1, 5)), int(rng.choice([1, 2, 8])))
        shape = random_shape(rng, axes, groups, c, n, transposed, kernels=(8, 12, 5)[axes - 1])
        step = random_step(rng, kind, shape, EPILOGUES[i % 4], known=i % 3 != 0, strided=i % 5 == 0)
        launches = [launch_simt(step, Geometry(step), kind.context(runner))]
        # Nothing is rounded on the way here, not even an fp32 image.
        cases.append(replace(case(rng, kind, shape, step, launches, "simt"), feeds={}, rounding=2.0**-22))
    check(runner, cases)


def test_fp64_keeps_its_precision(runner: Runner, count: int) -> None:
    rng, kind = rng_of("fp64"), Kind(F64, F64)
    for transposed in (False, True):
        shape = random_shape(rng, 2, 1, 20, 8, transposed)
        step = random_step(rng, kind, shape, "plain")
        launches = lower(step, runner.context)
        arrays = [rng.standard_normal(shape.x), content(step.inputs[1])]
        values = tuple(Value(f"i{i}", t.dtype, t.shape) for i, t in enumerate(step.inputs))
        results = tuple(Value("o", t.dtype, t.shape) for t in step.outputs)
        (want,) = ir_interpreter.run_node(Node(step.op, values, results), arrays, {})
        (got,) = runner.run(step, launches, arrays)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_depthwise_matches_float64(runner: Runner, family_count: int) -> None:
    rng, cases, kinds = rng_of("depthwise"), [], (FP16, BF16_, FP32, Kind(F32, F16))
    while len(cases) < family_count:
        i = len(cases)
        kind, groups, axes = kinds[i % 4], ragged(rng, 200, 8), 1 if i % 5 == 0 else 2
        shape = random_shape(rng, axes, groups, 1, 1, kernels=8)
        step = random_step(rng, kind, shape, EPILOGUES[i % 4])
        if not is_depthwise(step, Geometry(step)):
            continue  # too wide a window: the test above has such
        # The patch grows as there are fewer multiprocessors to fill.
        context = replace(kind.context(runner), multiprocessors=int(rng.choice([0, 2, 132])))
        launches = [launch_depthwise(step, Geometry(step), context)]
        cases.append(replace(case(rng, kind, shape, step, launches, "depthwise"), feeds={}, rounding=2.0**-22))
    check(runner, cases)


def test_images_with_few_channels_match_float64(runner: Runner, count: int) -> None:
    rng, cases, kinds = rng_of("direct"), [], (Kind(F32, F16), FP32, FP16, BF16_)
    while len(cases) < count:
        i = len(cases)
        kind, axes = kinds[i % 4], (2, 2, 1, 3)[i % 4]
        shape = random_shape(rng, axes, 1, int(rng.integers(1, 5)), ragged(rng, 80, 8))
        step = random_step(rng, kind, shape, EPILOGUES[i % 4], strided=i % 3 == 0)
        if not is_direct(step, Geometry(step)):
            continue
        launches = [launch_direct(step, Geometry(step), kind.context(runner))]
        cases.append(replace(case(rng, kind, shape, step, launches, "direct"), feeds={}, rounding=2.0**-22))
    check(runner, cases)


def test_squeeze_and_excite_layers_match_float64(runner: Runner) -> None:
    """1×1 convolutions of 1×1 images, whatever their channels are a multiple of."""
    cases = []
    for batch, channels, n in ((1, 4, 96), (1, 20, 480), (5, 6, 144), (3, 480, 20), (1, 7, 33)):
        step = make_step(cv.conv_op(1), [(F16, (batch, channels, 1, 1)), weight(n, channels, 1, 1), weight(n, 1, 1)])
        launches = lower(step, runner.context)
        assert all(launch.kernel.family == "gemm" for launch in launches)
        label = f"{batch}x{channels} to {n}"
        cases.append(Case(label, step, channels, lowered=launches, rounding=FP16.rounding))
    check(runner, cases)


def test_chosen_kernels_match_float64(runner: Runner, count: int) -> None:
    """What the target would launch, pointwise ones among them."""
    rng, cases = rng_of("chosen"), []
    for i in range(count):
        kind, axes = KINDS[i % len(KINDS)], (2, 2, 1, 3)[i % 4]
        transposed = i % 5 == 4
        groups = int(rng.choice([1, 1, 1, 4, 32]))
        c, n = (ragged(rng, 160 if groups == 1 else 8, int(rng.choice([1, 8]))) for _ in range(2))
        shape = random_shape(rng, axes, groups, c, n, transposed, kernels=2 if i % 3 == 0 else 4)
        if i % 6 == 0:
            plain = Conv((1,) * axes, ((0, 0),) * axes, (1,) * axes, groups, transposed)
            shape = replace(shape, op=plain)
        step = random_step(rng, kind, shape, EPILOGUES[i % 4], strided=i % 7 == 6)
        cases.append(case(rng, kind, shape, step, lower(step, kind.context(runner)), "chosen"))
    check(runner, cases)
