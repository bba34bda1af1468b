"""What the cost models say of tiles of warpgroups, and what an epilogue may fetch ahead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.ops import Gemm
from engine.plan.plan import Step
from engine.plan.tensor import row_major
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.conv import lower_in
from engine.targets.cuda.conv_geometry import Geometry, channels_last
from engine.targets.cuda.conv_halo import HaloTile, divisor_arguments
from engine.targets.cuda.conv_halo import pick as pick_halo
from engine.targets.cuda.conv_simt import epilogue_for
from engine.targets.cuda.covering import ACC, F16, F32, add, arg, make_step, mul, stored, weight
from engine.targets.cuda.gemm import epilogue_of, launch_product
from engine.targets.cuda.kernel import Context, Reads, WeightStore
from engine.targets.cuda.product import product_of
from engine.targets.cuda.tiles import WGMMA_TILES, Operands, late_fetches, pick_wgmma
from tests.engine.targets.cuda.cases import check
from tests.engine.targets.cuda.harness import Case, Runner

CONTEXT = Context(SM_90A, 132, WeightStore())


def residual_conv(batch: int = 2, size: int = 56) -> Step:
    """3×3, 64 → 64 channels, with bias and residual."""
    pixels = cv.channels_inner(batch, 64, size, size)
    return make_step(cv.conv_op(3, store=cv.BIAS_RESIDUAL), [pixels, weight(64, 64, 3, 3), weight(64, 1, 1), pixels])


@pytest.mark.parametrize(
    ("store", "expected"),
    [
        (stored(ACC), Reads()),
        (cv.BIAS, Reads(fixed=4, instructions=1)),
        (cv.BIAS_RESIDUAL, Reads(fixed=4, varying=4, instructions=2)),
    ],
)
def test_a_bias_is_the_same_in_every_row_and_a_residual_is_not(store: ex.Expr, expected: Reads) -> None:
    inputs: list[cv.Given] = [(F16, (32, 64)), weight(64, 72), weight(72), (F16, (32, 72))]
    step = make_step(Gemm((store,)), inputs[: 2 + bool(expected.fixed) + bool(expected.varying)])
    assert epilogue_of(step, (store,), (0, 1), 72).reads == expected


def test_a_number_for_each_row_takes_one_register() -> None:
    step = make_step(Gemm((stored(mul(ACC, arg(2, F32))),)), [(F16, (32, 64)), weight(64, 72), (F32, (32, 1))])
    assert epilogue_of(step, (stored(mul(ACC, arg(2, F32))),), (0, 1), 72).reads == Reads(
        varying=1, by_row=1, instructions=1
    )


def test_what_fits_registers_is_never_waited_for() -> None:
    residual = Reads(fixed=4, varying=4)
    assert late_fetches(Reads(fixed=4), pieces=16, groups=4, room=32) == 0
    assert late_fetches(residual, pieces=8, groups=2, room=96) == 0
    # 16 registers hold the bias, four pieces of the residual have room: of 16 the first four are there.
    assert late_fetches(residual, pieces=16, groups=4, room=32) == 3
    # The bias of 256 columns leaves no room: both are fetched piece by piece.
    assert late_fetches(residual, pieces=16, groups=8, room=32) == 3
    # Two at a time.
    assert late_fetches(residual, pieces=16, groups=1, room=16, chunk=2) == 7


def test_residuals_want_tiles_whose_registers_hold_them() -> None:
    """64 → 256 channels at 56 × 56, batch 128, on an H100: 102 µs without a residual in 128 × 256; with one 224 there,
    and 164 in 128 × 128 for two warpgroups."""
    rows = 128 * 56 * 56
    plain = pick_wgmma(rows, 256, 64, 132, Operands.HALF, 1, Reads(fixed=4))
    assert plain.m * plain.n // (256 if plain.cooperative else 128) == 128
    tile = pick_wgmma(rows, 256, 64, 132, Operands.HALF, 1, Reads(fixed=4, varying=4))
    assert tile.m * tile.n // (256 if tile.cooperative else 128) <= 64


def test_a_halo_under_a_residual_is_small() -> None:
    """On an H100 128 places took 68 µs, 256 took 104, and without the residual 55 and 54."""
    step = residual_conv(batch=128)
    choice = pick_halo(step, Geometry(step), Operands.HALF, CONTEXT)
    assert choice is not None
    assert choice.tile.m == 128


def test_divisions_by_multiplication_are_exact() -> None:
    rng = np.random.default_rng(0)
    for divisor in (*range(1, 400), 4095, 4096, 4097, 2**29 - 1, 2**29):
        arguments = divisor_arguments("d", divisor)
        assert arguments["d_factor"] < 2**31
        some = rng.integers(0, 2**30, 200).tolist()
        edges = [k * divisor + e for k in (0, 1, 2, 2**30 // divisor - 1) for e in (0, divisor - 1)]
        for n in (*some, *(n for n in edges if n < 2**30), 2**30 - 1):
            assert n * arguments["d_factor"] >> arguments["d_shift"] == n // divisor


def test_operands_that_fill_the_registers_come_piece_by_piece(hopper: Runner, count: int) -> None:
    """Three residuals and two biases: what is held and how far ahead it is fetched differs from tile to tile."""
    acc = add(mul(add(ACC, arg(2)), arg(3)), add(add(arg(4), arg(5)), arg(6)))
    rows, k, n = 300, 72, 296
    more = (F16, (rows, n))
    step = make_step(Gemm((stored(acc),)), [(F16, (rows, k)), weight(k, n), weight(n), weight(n), more, more, more])
    product, cases = product_of(step, hopper.context), []
    epilogue = epilogue_of(step, step.op.stores, (0, 1), n)
    assert epilogue.reads == Reads(fixed=8, varying=12, instructions=5)
    for tile in WGMMA_TILES:
        launches = [launch_product(product, epilogue, tile, hopper.context)]
        cases.append(Case(f"three residuals {tile}", step, k, lowered=launches, rounding=2.0**-21))
    residual, bias = (F16, (2, 128, 13, 11)), weight(128, 1, 1)
    inputs: list[cv.Given] = [(F16, (2, 64, 13, 11)), weight(128, 64, 3, 3), bias, bias, residual, residual, residual]
    conv = make_step(cv.conv_op(3, store=stored(acc)), inputs)
    inner = [replace(x, strides=row_major(x.shape, channels_last(4))) for x in conv.inputs[4:]]
    conv = replace(conv, inputs=(*conv.inputs[:4], *inner))
    assert epilogue_for(conv, 128).reads == Reads(fixed=8, varying=12, instructions=5)
    for halo in (HaloTile(128, 128, 2), HaloTile(128, 128, 2, swapped=True), HaloTile(256, 64, 2, swapped=True)):
        launches = lower_in(conv, Geometry(conv), halo, hopper.context)
        cases.append(Case(f"three residuals {halo}", conv, 9 * 64, lowered=launches, rounding=2.0**-21))
    check(hopper, cases)
