"""Convolutions against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

import numpy as np

from engine.ir.ops import Conv
from engine.targets.cuda import covering as cv
from engine.targets.cuda.conv import Geometry, channels_last, launch_conv, launch_depthwise, pack_depthwise, pack_filter
from engine.targets.cuda.covering import F16, F32, make_step, weight
from engine.targets.cuda.gemm import epilogue_of
from engine.targets.cuda.kernel import Pointer
from engine.targets.cuda.tiles import MMA_TILES
from tests.engine.targets.cuda.cases import check, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner


def test_convolution_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("conv"), []
    for i in range(count):
        groups = int(rng.choice([1, 1, 1, 2, 3]))
        c = groups * ragged(rng, 72, 8 if rng.random() < 0.6 else 1)
        n = groups * ragged(rng, 96, 8 if rng.random() < 0.6 else 1)
        kernel = tuple(int(rng.integers(1, 5)) for _ in range(2))
        strides = tuple(int(rng.integers(1, 3)) for _ in range(2))
        dilations = tuple(int(rng.integers(1, 3)) for _ in range(2))
        pads = tuple((int(rng.integers(0, 3)), int(rng.integers(0, 3))) for _ in range(2))
        size = tuple((k - 1) * d + 1 + int(rng.integers(0, 20)) for k, d in zip(kernel, dilations, strict=True))
        x = (F32 if c < 8 and i % 2 else F16, (int(rng.integers(1, 4)), c, *size))
        # The kernel rounds an fp32 image to fp16: give it one that survives this.
        feeds = {0: rng.standard_normal(x[1]).astype(np.float16).astype(np.float32)} if x[0] is F32 else {}
        store = cv.BIAS_RELU6 if i % 2 else cv.BIAS
        op = Conv(strides, pads, dilations, groups, stores=(store,))
        step = make_step(op, [x, weight(n, c // groups, *kernel), weight(n, 1, 1)])
        tile = MMA_TILES[i % len(MMA_TILES)]
        packed = Pointer(runner.context.weights.packed(step.inputs[1], "n,rsc8", pack_filter))
        epilogue = epilogue_of(step, (store,), channels_last(4), n // groups)
        launch = launch_conv(Geometry(step), epilogue, packed, tile)
        cases.append(
            Case(f"{x} * {n} {kernel} {op.strides} {pads} {dilations} g{groups}", step, c * 16, feeds, [launch])
        )
    check(runner, cases)


def test_chosen_convolutions_match_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("chosen"), []
    for i in range(count):
        c, n = ragged(rng, 200, 8), ragged(rng, 200, 8)
        image = (F16, (int(rng.integers(1, 4)), c, int(rng.integers(3, 30)), int(rng.integers(3, 30))))
        size = int(rng.choice([1, 1, 3]))
        store = cv.BIAS_RESIDUAL if i % 3 == 0 else cv.BIAS_RELU6
        inputs: list[cv.Given] = [image, weight(n, c, size, size), weight(n, 1, 1)]
        inputs += [(F16, (image[1][0], n, *image[1][2:]))] if i % 3 == 0 else []
        cases.append(Case(f"{image} * {n} {size}", make_step(cv.conv_op(size, store=store), inputs), c * size * size))
    check(runner, cases)


def test_depthwise_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("depthwise"), []
    for _ in range(count):
        c = ragged(rng, 200, 8)
        kernel, stride, dilation = int(rng.choice([3, 5])), int(rng.integers(1, 3)), int(rng.choice([1, 1, 2]))
        pads = tuple((int(rng.integers(0, 4)), int(rng.integers(0, 4))) for _ in range(2))
        size = tuple((kernel - 1) * dilation + 1 + int(rng.integers(0, 24)) for _ in range(2))
        op = Conv((stride, stride), pads, (dilation, dilation), c, stores=(cv.BIAS_RELU6,))
        image = (F16, (int(rng.integers(1, 4)), c, *size))
        step = make_step(op, [image, weight(c, 1, kernel, kernel), weight(c, 1, 1)])
        taps = runner.context.weights.packed(step.inputs[1], "f32 r,s,c", pack_depthwise)
        epilogue = epilogue_of(step, op.stores, channels_last(4), 8)
        # The patch grows as there are fewer multiprocessors to fill.
        launch = launch_depthwise(Geometry(step), epilogue, taps, int(rng.choice([0, 2, 132])))
        cases.append(Case(f"{image} {kernel} {stride} {dilation} {pads}", step, 25, lowered=[launch]))
    check(runner, cases)
