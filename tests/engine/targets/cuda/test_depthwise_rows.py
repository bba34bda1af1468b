"""Depthwise convolutions whose rows stream through shared memory, against float64: every tile, on random ragged shapes
(conftest.py says on what)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.targets.cuda.conv_geometry import Geometry, channels_last
from engine.targets.cuda.depthwise import window_of
from engine.targets.cuda.depthwise_rows import RowsTile, candidates, has_rows, launch_rows
from engine.targets.cuda.kernel import Context
from tests.engine.targets.cuda.cases import check, ragged, rng_of
from tests.engine.targets.cuda.harness import Runner
from tests.engine.targets.cuda.test_conv import BF16_, EPILOGUES, FP16, Kind, Shape, case, random_shape, random_step


def streamed(rng: np.random.Generator, axes: int, kind: Kind, context: Context) -> Shape:
    """A random depthwise convolution that the kernel can run, of a few images."""
    while True:
        shape = random_shape(rng, axes, ragged(rng, 150, 8), 1, 1, kernels=6)
        shape = replace(shape, x=(int(rng.integers(1, 6)), *shape.x[1:]))
        step = random_step(rng, kind, shape, "plain")
        if has_rows(step, Geometry(step), context):
            return shape


def tile_of(rng: np.random.Generator, shape: Shape, kind: Kind, context: Context) -> RowsTile:
    """One of the tiles that fit."""
    step = random_step(rng, kind, shape, "plain")
    fitting = candidates(window_of(Geometry(step)), context.architecture.shared_bytes)
    return fitting[int(rng.integers(len(fitting)))]


@pytest.mark.parametrize("axes", [2, 1])
def test_streamed_rows_match_float64(hopper: Runner, count: int, axes: int) -> None:
    """Strides and dilations that differ between axes, strides beyond the kernel, even kernels, pads of either side and
    negative ones, ragged channels and widths, from image to image; one block for all rows, and a few."""
    rng, cases = rng_of(f"rows{axes}"), []
    for i in range(2 * count):
        kind, name = (FP16, BF16_)[i % 2], EPILOGUES[i // 2 % 4]
        context = kind.context(hopper)
        few = replace(context, multiprocessors=int(rng.choice([1, 3, 12])))
        shape = streamed(rng, axes, kind, context)
        tile = tile_of(rng, shape, kind, context)
        step = random_step(rng, kind, shape, name)
        launches = [launch_rows(step, Geometry(step), tile, few)]
        cases.append(case(rng, kind, shape, step, launches, f"{name} {tile}"))
    check(hopper, cases)
