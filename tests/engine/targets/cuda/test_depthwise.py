"""Depthwise convolutions on the matrix units against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

from engine.targets.cuda.conv_geometry import Geometry
from engine.targets.cuda.depthwise import candidates, is_depthwise_product, launch_depthwise_product, window_of
from tests.engine.targets.cuda.cases import check, ragged, rng_of
from tests.engine.targets.cuda.harness import Runner
from tests.engine.targets.cuda.test_conv import BF16_, EPILOGUES, FP16, case, random_shape, random_step


def test_depthwise_product_matches_float64(runner: Runner, count: int) -> None:
    """Every kernel size up to 7, stride, dilation and tile, one or two axes, asymmetric and negative pads."""
    rng, cases = rng_of("depthwise product"), []
    while len(cases) < 2 * count:
        i = len(cases)
        kind, channels, axes = (FP16, BF16_)[i % 2], ragged(rng, 200, 8), 1 if i % 7 == 6 else 2
        shape = random_shape(rng, axes, channels, 1, 1, kernels=8)
        step = random_step(rng, kind, shape, EPILOGUES[i % 4])
        geometry, context = Geometry(step), kind.context(runner)
        if not is_depthwise_product(step, geometry, context):
            continue
        tiles = list(candidates(window_of(geometry), context.architecture.shared_bytes))
        tile = tiles[int(rng.integers(len(tiles)))]
        launches = [launch_depthwise_product(step, geometry, context, tile)]
        cases.append(case(rng, kind, shape, step, launches, f"{EPILOGUES[i % 4]} {tile}"))
    check(runner, cases)
