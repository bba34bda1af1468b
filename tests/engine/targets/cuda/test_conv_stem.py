"""Convolutions of images with few channels against float64, on random ragged shapes (conftest.py says on what), and
which of them the kernel takes."""

from __future__ import annotations

from dataclasses import replace

from engine.ir.dtype import DType
from engine.ir.ops import Conv
from engine.plan.plan import Step
from engine.plan.tensor import Tensor, row_major
from engine.targets.cuda.conv import operands_of
from engine.targets.cuda.conv_geometry import Geometry, channels_last
from engine.targets.cuda.conv_patch import is_patches, launch_patches
from engine.targets.cuda.conv_stem import candidates, is_stem, launch_stem
from engine.targets.cuda.covering import F16, F32
from tests.engine.targets.cuda.cases import check, ragged, rng_of
from tests.engine.targets.cuda.harness import Runner
from tests.engine.targets.cuda.test_conv import EPILOGUES, FP16, Kind, Shape, case, random_shape, random_step
from tests.engine.targets.cuda.test_conv import KINDS as ALL_KINDS

BF16 = DType.BF16
KINDS = (Kind(F32, F16), FP16, Kind(BF16, BF16), Kind(F32, BF16))


def in_nhwc(step: Step) -> Step:
    """The same step with its image in NHWC."""
    x, *rest = step.inputs
    inner = Tensor(x.buffer, x.dtype, x.shape, row_major(x.shape, channels_last(len(x.shape))))
    return replace(step, inputs=(inner, *rest))


def test_stem_matches_float64(runner: Runner, count: int) -> None:
    """Every layout of the image, one or two axes, every tile, asymmetric and negative pads, even kernels, dilation."""
    rng, cases = rng_of("stem"), []
    while len(cases) < 2 * count:
        i = len(cases)
        kind, axes = KINDS[i % 4], 1 if i % 7 == 6 else 2
        channels, n = int(rng.integers(1, 5)), ragged(rng, 200, int(rng.choice([1, 8])))
        shape = random_shape(rng, axes, 1, channels, n, kernels=8)
        step = random_step(rng, kind, shape, EPILOGUES[i // 2 % 4], strided=i % 3 == 2)
        step = in_nhwc(step) if i % 3 == 1 else step
        geometry, context = Geometry(step), kind.context(runner)
        if not is_stem(step, geometry, context):
            continue
        tiles = candidates(geometry, context.architecture)
        tile = tiles[int(rng.integers(len(tiles)))]
        launches = [launch_stem(step, geometry, context, tile)]
        cases.append(case(rng, kind, shape, step, launches, f"{EPILOGUES[i // 2 % 4]} {tile}"))
    check(runner, cases)


def test_patches_match_float64(runner: Runner, count: int) -> None:
    """Windows that do not overlap, of images in any layout, in every type, with inputs left over at the end."""
    rng, cases = rng_of("patches"), []
    while len(cases) < count:
        i = len(cases)
        kind, axes = ALL_KINDS[i % len(ALL_KINDS)], (2, 2, 1, 3)[i % 4]
        kernel = tuple(int(k) for k in rng.integers(2, (60, 12, 5)[axes - 1], axes))
        channels = int(rng.integers(1, 8))
        size = tuple(k * int(rng.integers(1, 5)) + int(rng.integers(0, k)) for k in kernel)
        op = Conv(kernel, ((0, 0),) * axes, (1,) * axes)
        shape = Shape(op, (int(rng.integers(1, 4)), channels, *size), (ragged(rng, 80), channels, *kernel))
        step = random_step(rng, kind, shape, EPILOGUES[i % 4], strided=i % 3 == 2)
        step = in_nhwc(step) if i % 3 == 1 else step
        geometry, context = Geometry(step), kind.context(runner)
        operands = operands_of(step, context)
        if operands is None or not is_patches(step, geometry):
            continue
        launches = launch_patches(step, geometry, operands, context)
        cases.append(case(rng, kind, shape, step, launches, EPILOGUES[i % 4]))
    check(runner, cases)
