"""Products whose results go through shared memory and the copy engine, against float64; and which epilogues can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import erfc, exp, pi, sqrt

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Gemm
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda import conv
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.choices import choice_of, key_of, tile_of, tile_text
from engine.targets.cuda.covering import ACC, F16, F32, add, arg, make_step, mul, stored, weight
from engine.targets.cuda.gelu import gelu_of
from engine.targets.cuda.gemm import (
    launches_of,
    needs_staged,
    operands_of,
    other_tiles,
    parts_of,
    pick_tile,
    ranked_tiles,
)
from engine.targets.cuda.kernel import Ahead, Context, Functor, WeightStore
from engine.targets.cuda.product import Product
from engine.targets.cuda.product_cost import Way
from engine.targets.cuda.tiles import PRODUCT_TILES, SHORT_TILES, STAGED_TILES, Operands, WgmmaTile
from tests.engine.targets.cuda.cases import check, check_late, ragged, rng_of, thinned
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.test_gemm import EXACT, KINDS, context_of, launched, rounding, stores_of

BF16 = DType.BF16
HOPPER = Context(SM_90A, 132, WeightStore())
EVERY = (*STAGED_TILES, *SHORT_TILES)


def step_of(m: int, n: int, k: int, name: str, dtype: DType = F16, operand: DType | None = None) -> Step:
    """A product with a weight and one of `stores_of(dtype)`. `operand`: its type, where that is not the result's."""
    operand = operand or dtype
    store = stored(ACC, dtype) if name == "plain" else stores_of(dtype)[name]
    inputs: list[cv.Given] = [(operand, (m, k)), weight(k, n, dtype=operand)]
    inputs += [] if name == "plain" else [weight(n, dtype=dtype)]
    inputs += [(dtype, (m, n))] if name == "residual" else []
    return make_step(Gemm((store,)), inputs)


def random_products(
    hopper: Runner, seed: str, tiles: Sequence[WgmmaTile], count: int, largest: tuple[int, int]
) -> list[Case]:
    """In every tile: every kind of operands, ragged sizes up to `largest` (m, n), rows that are copied first."""
    rng, cases = rng_of(seed), []
    for i in range(count):
        tile = replace(tiles[i % len(tiles)], aligns=i % 3 == 0)
        kind = ("fp16", "bf16", "tf32")[int(rng.integers(0, 3))]
        result = F16 if kind == "tf32" else KINDS[kind][0]
        name = list(stores_of(F16))[int(rng.integers(0, 4))]
        granularity = 8 if needs_staged(tile) else 1
        m, n = ragged(rng, largest[0]), ragged(rng, largest[1], granularity)
        k = ragged(rng, 600, 1 if tile.aligns else 8)
        step = step_of(m, n, k, name, result, KINDS[kind][0])
        launches = launched(step, tile, context_of(hopper, kind))
        cases.append(Case(f"{kind} {m}x{n}x{k} {name} {tile}", step, k, lowered=launches, rounding=rounding(kind)))
    return cases


def test_staged_products_match_float64(hopper: Runner, count: int) -> None:
    check(hopper, random_products(hopper, "staged", EVERY, 2 * count, (500, 400)))


def test_staged_products_of_more_tiles_than_multiprocessors(hopper: Runner, count: int) -> None:
    """Places and rings wrap around, with more panels than places and with as many."""
    cases = []
    large, small = ((3000, 1512, 200), (5000, 1000, 1096), (20000, 200, 40)), ((420, 264, 200), (900, 40, 40))
    for i, (m, n, k) in enumerate(small if isinstance(hopper, EmulatedRunner) else large):
        for j, tile in enumerate(thinned(hopper, EVERY, first=i)):
            for name in ("residual", ("bias gelu", "plain")[(i + j) % 2]):
                step = step_of(m, n, k, name)
                launches = launched(step, tile, hopper.context)
                cases.append(Case(f"{m}x{n}x{k} {name} {tile}", step, k, lowered=launches, rounding=EXACT))
    check(hopper, cases)
    if isinstance(hopper, EmulatedRunner):
        with hopper.in_reverse():
            check(hopper, cases)


def test_residuals_are_brought_behind_the_first_products_whoever_comes_late(hopper: Runner) -> None:
    cases = []
    for tile in (WgmmaTile(128, 64, 8, slots=1), WgmmaTile(128, 96, 7, cooperative=True, slots=3)):
        step = step_of(300, 200, 136, "residual")
        launches = launched(step, tile, replace(hopper.context, multiprocessors=2))
        cases.append(Case(f"{tile}", step, 136, lowered=launches, rounding=EXACT))
    check_late(hopper, cases)


def test_constant_columns_are_asked_for_before_the_kernel_before_has_ended() -> None:
    """As many steps as the ring holds where the grid leaves a half of the device to the next one, else a few; none of
    what a kernel before may compute."""

    def early(step: Step, tile: WgmmaTile) -> int:
        *_, launch = launched(step, tile, HOPPER)
        argument = dict(launch.arguments)["early"]
        assert isinstance(argument, Ahead)
        return argument.steps

    small, wide = WgmmaTile(64, 64, 12), WgmmaTile(128, 192, 4, slots=2)
    assert early(step_of(128, 768, 768, "plain"), small) == 12
    assert early(step_of(128, 768, 768, "plain"), replace(small, aligns=True)) == 12
    assert early(step_of(128, 3072, 768, "plain"), small) == 5
    assert early(step_of(4096, 768, 768, "plain"), wide) == 3
    columns = Tensor(Buffer("columns", BufferKind.INPUT, 768 * 768 * 2), F16, (768, 768), (1, 768))
    computed = make_step(Gemm((stored(ACC),)), [(F16, (128, 768)), columns])
    assert early(computed, small) == 0


def test_staged_rows_may_lie_apart(hopper: Runner, count: int) -> None:
    """The result and the residual are windows of wider matrices."""
    cases = []
    for i, tile in enumerate(EVERY):
        m, n, k, dtype = 150, 72 + 8 * i, 72, (F16, BF16)[i % 2]
        step = step_of(m, n, k, "residual", dtype)

        def apart(tensor: Tensor, more: int, m: int = m, n: int = n) -> Tensor:
            buffer = Buffer(tensor.buffer.name, tensor.buffer.kind, m * (n + more) * 2)
            return replace(tensor, buffer=buffer, strides=(n + more, 1), offset=8)

        inputs = (*step.inputs[:3], apart(step.inputs[3], 24))
        step = replace(step, inputs=inputs, outputs=(apart(step.outputs[0], 40),))
        cases.append(Case(f"{tile}", step, k, lowered=launched(step, tile, hopper.context), rounding=EXACT))
    check(hopper, cases)


_LINEAR, _CUBIC = 2 * sqrt(2 / pi), 0.044715 * 2 * sqrt(2 / pi)


def _gelu_by_tanh(x: ex.Expr) -> ex.Expr:
    cubic = add(mul(mul(x, x), ex.const(_CUBIC, F32)), ex.const(_LINEAR, F32))
    return mul(x, ex.apply(PointOp.SIGMOID, mul(x, cubic)))


_GELU = {
    "with erf": (cv.gelu, lambda x: 0.5 * erfc(-x * sqrt(0.5))),
    "by tanh": (_gelu_by_tanh, lambda x: 1 / (1 + exp(min(-x * (_LINEAR + _CUBIC * x * x), 700.0)))),
}


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("name", _GELU)
def test_gelu_of_staged_results(hopper: Runner, name: str, dtype: DType) -> None:
    """Of every number beside any other, as a residual of nothing: half a unit in the last place, and the bounds of
    `gelu_of_two` in kernels/epilogue/gelu.cuh. No NaN spreads, and infinities become their limits."""
    n, (expression, gate) = 64, _GELU[name]
    every = np.random.default_rng(0).permutation(np.arange(2**16, dtype=np.uint32))
    bits = every.astype(np.uint16).view(dtype.numpy).reshape(-1, n)
    nothing, given, unit = np.zeros((len(bits), n), dtype.numpy), add(ACC, arg(2, dtype)), np.eye(n).astype(dtype.numpy)
    step = make_step(Gemm((stored(expression(given), dtype),)), [(dtype, bits.shape), unit, (dtype, bits.shape)])
    (launch,) = launched(step, STAGED_TILES[0], hopper.context)
    assert f"gelu_of_two<{'half' if dtype is F16 else 'bfloat16'}, " in launch.kernel.source.text
    assert hopper.prepare(launch.kernel) is None
    with np.errstate(invalid="ignore"):  # NaNs that signal
        (result,) = hopper.run(step, [launch], [nothing, unit, bits])
        got, x = result.astype(np.float64), bits.astype(np.float64)
    assert np.array_equal(np.isnan(got), np.isnan(x))
    assert got[x == np.inf] == np.inf
    assert got[x == -np.inf] == 0
    finite = np.isfinite(x)
    got, x = got[finite], x[finite]
    want = x * np.array([gate(value) for value in x])
    digits, smallest = (11, 2.0**-24) if dtype is F16 else (8, 2.0**-126)
    half_unit = np.maximum(2.0 ** (np.floor(np.log2(np.maximum(np.abs(want), 1e-300))) - digits), smallest / 2)
    taken = np.abs(np.maximum(x, 0) - want)  # t Φ(−t); of it halves have no less than 2^-24
    off = np.minimum(2.0**-11, 2.0**-6 * taken) + 6 * 2.0**-24
    assert np.all(np.abs(got - want) <= half_unit * (1 + 2.0**-9) + off)


def test_gelu_that_something_is_done_to_is_computed_in_fp32(hopper: Runner) -> None:
    """What halves cannot hold may come back: 70,000 · 0.01."""
    n = 64
    ones, weights = np.ones((128, n), F16.numpy), np.diag(np.linspace(-1000, 1100, n)).astype(F16.numpy)
    value = mul(cv.gelu(mul(ACC, ex.const(70.0, F32))), ex.const(0.01, F32))
    step = make_step(Gemm((stored(value, F16),)), [(F16, ones.shape), weights])
    (launch,) = launched(step, STAGED_TILES[0], hopper.context)
    assert "gelu_of_two<" not in launch.kernel.source.text
    check(hopper, [Case("scaled", step, n, {0: ones}, lowered=[launch], rounding=EXACT)])


def test_what_is_gelu() -> None:
    x, other = add(ACC, arg(2)), add(ACC, arg(3))
    for spelled, (expression, _) in _GELU.items():
        found = gelu_of(expression(x))
        assert found is not None
        assert (found.x, found.with_erf) == (x, spelled == "with erf")

    def with_erf(a: ex.Expr, b: ex.Expr, half: float = 0.5, root: float = sqrt(0.5), one: float = 1.0) -> ex.Expr:
        erf = ex.apply(PointOp.ERF, mul(b, ex.const(root, F32)))
        return mul(mul(a, ex.const(half, F32)), add(erf, ex.const(one, F32)))

    def by_tanh(a: ex.Expr, b: ex.Expr, c: ex.Expr, cubic: float = _CUBIC, linear: float = _LINEAR) -> ex.Expr:
        terms = add(mul(mul(c, c), ex.const(cubic, F32)), ex.const(linear, F32))
        return mul(a, ex.apply(PointOp.SIGMOID, mul(b, terms)))

    assert gelu_of(with_erf(x, x)) is not None
    assert gelu_of(by_tanh(x, x, x)) is not None
    others = [
        with_erf(x, other), with_erf(x, x, half=0.501), with_erf(x, x, root=0.7), with_erf(x, x, one=1.001),
        by_tanh(other, x, x), by_tanh(x, other, x), by_tanh(x, x, other), by_tanh(x, x, x, cubic=1.01 * _CUBIC),
        by_tanh(x, x, x, linear=1.01 * _LINEAR), mul(x, ex.apply(PointOp.SIGMOID, x)),
    ]  # fmt: skip
    assert [gelu_of(each) for each in others] == [None] * len(others)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_silu_of_staged_results_is_good_to_their_rounding(hopper: Runner, dtype: DType) -> None:
    """Of every number beside any other, as a residual of nothing: half a unit in the last place, and what rounding the
    exponent in fp32 costs (62 · 2^-24 at most above −43; `silu_all` in kernels/epilogue/math.cuh). No NaN spreads."""
    n = 64
    every = np.random.default_rng(0).permutation(np.arange(2**16, dtype=np.uint32))
    bits = every.astype(np.uint16).view(dtype.numpy).reshape(-1, n)
    nothing, given = np.zeros((len(bits), n), dtype.numpy), add(ACC, arg(2, dtype))
    store = stored(mul(given, ex.apply(PointOp.SIGMOID, given)), dtype)
    step = make_step(Gemm((store,)), [(dtype, bits.shape), np.eye(n).astype(dtype.numpy), (dtype, bits.shape)])
    (launch,) = launched(step, STAGED_TILES[0], hopper.context)
    assert "silu_all(" in launch.kernel.source.text
    assert hopper.prepare(launch.kernel) is None
    with np.errstate(invalid="ignore"):  # NaNs that signal
        (result,) = hopper.run(step, [launch], [nothing, np.eye(n).astype(dtype.numpy), bits])
        got, x = result.astype(np.float64), bits.astype(np.float64)
    assert np.array_equal(np.isnan(got), np.isnan(x))
    assert got[x == np.inf] == np.inf
    assert abs(got[x == -np.inf]) <= 2.0**-56, "−∞ gives its limit, 0"
    finite = np.isfinite(x)
    got, x = got[finite], x[finite]
    want = x / (1 + np.exp(np.minimum(-x, 700)))
    digits, smallest = (11, 2.0**-24) if dtype is F16 else (8, 2.0**-126)
    half_unit = np.maximum(2.0 ** (np.floor(np.log2(np.maximum(np.abs(want), 1e-300))) - digits), smallest / 2)
    bound = half_unit * (1 + 2.0**-10) + np.where(x > -43, 2.0**-17 * np.abs(want), 2.0**-56)
    assert np.all(np.abs(got - want) <= bound)


def parts(step: Step, context: Context = HOPPER) -> tuple[Product, Functor]:
    found = parts_of(step, context)
    assert found is not None
    return found


def test_which_epilogues_can_be_staged() -> None:
    m, n, k = 300, 400, 384
    for name in stores_of(F16):
        if name != "plain":
            _, epilogue = parts(step_of(m, n, k, name))
            assert epilogue.staged is not None
            assert (epilogue.staged.tile is not None) == (name == "residual")
    a, b, rows = (F16, (m, k)), weight(k, n), (F16, (m, n))
    others: list[tuple[str, tuple[ex.Expr, ...], list[cv.Given]]] = [
        ("fp32 results", (ACC,), [a, b]),
        ("two results", (stored(ACC), stored(add(ACC, ACC))), [a, b]),
        ("two tiles", (stored(add(add(ACC, arg(2)), arg(3))),), [a, b, rows, rows]),
        ("a number for each row", (stored(mul(ACC, arg(2, F32))),), [a, b, (F32, (m, 1))]),
        ("a tile of fp32", (stored(add(ACC, arg(2, F32))),), [a, b, (F32, (m, n))]),
        ("a tile of rows that are not aligned", (stored(add(ACC, arg(2))),), [a, weight(k, n + 1), (F16, (m, n + 1))]),
        (
            "many biases",
            (stored(add(add(ACC, arg(2, F32)), arg(3, F32))),),
            [a, b, weight(n, dtype=F32), weight(n, dtype=F32)],
        ),
    ]
    for what, stores, inputs in others:
        assert parts(make_step(Gemm(stores), inputs))[1].staged is None, what
    split = make_step(Gemm((stored(ACC),)), [(F16, (2, 150, k)), b])
    (result,) = split.outputs
    split = replace(split, outputs=(replace(result, strides=(150 * n + 8, n, 1)),))
    assert parts(split)[1].staged is None, "rows in two levels"


def test_staged_tiles_are_chosen_by_their_estimates() -> None:
    product, epilogue = parts(step_of(16384, 768, 768, "residual"))
    assert pick_tile(product, epilogue, HOPPER) == other_tiles(product, epilogue, HOPPER)[Way.STAGED][0].tile
    bare = replace(epilogue, stage=lambda: None)
    assert pick_tile(product, bare, HOPPER) == ranked_tiles(product, HOPPER, epilogue.reads)[0].tile
    older = replace(HOPPER, architecture=SM_80)
    assert not other_tiles(*parts(step_of(16384, 768, 768, "residual"), older), older)[Way.STAGED]


@pytest.mark.parametrize(("m", "n", "k"), [(6272, 160, 960), (100352, 40, 240)])
def test_of_equal_estimates_results_beside_residuals_are_not_staged(m: int, n: int, k: int) -> None:
    product, epilogue = parts(step_of(m, n, k, "residual"))
    tile, best = pick_tile(product, epilogue, HOPPER), other_tiles(product, epilogue, HOPPER)[Way.STAGED][0]
    single = ranked_tiles(product, HOPPER, epilogue.reads)[0]
    assert best.estimate.cycles < single.estimate.cycles < 1.01 * best.estimate.cycles
    assert tile == single.tile and not needs_staged(tile)


@pytest.mark.parametrize(("n", "k"), [(384, 64), (672, 112)])
def test_wide_staged_tiles_in_turn_are_not_taken_unmeasured_for_a_short_k(n: int, k: int) -> None:
    wide = WgmmaTile(128, 192, 4, slots=2)
    short, long = (parts(step_of(25088, n, each, "plain")) for each in (k, 768))
    assert wide in [ranked.tile for ranked in other_tiles(*short, HOPPER)[Way.STAGED]]
    assert pick_tile(*short, HOPPER) != wide and pick_tile(*long, HOPPER) == wide


def test_small_staged_tiles_are_timed_where_many_have_one_step_each() -> None:
    for m, n, k, name, offered in (
        (401408, 256, 64, "bias", True),
        (401408, 320, 40, "residual", True),
        (401408, 256, 72, "bias", False),
        (25088, 256, 64, "bias", False),
    ):
        product, epilogue = parts(step_of(m, n, k, name))
        found = [ranked.tile for ranked in other_tiles(product, epilogue, HOPPER)[Way.SHORT]]
        assert found == (list(SHORT_TILES) if offered else [])
        assert pick_tile(product, epilogue, HOPPER) not in SHORT_TILES
    product, epilogue = parts(step_of(401408, 256, 64, "bias"))
    bare = replace(epilogue, stage=lambda: None)
    assert not other_tiles(product, bare, HOPPER)[Way.SHORT]


def test_a_staged_tile_that_was_fastest_is_taken() -> None:
    product, epilogue = parts(step_of(4096, 768, 768, "residual"))
    for tile in EVERY:
        assert tile_of(choice_of(tile, 1.0), product, Operands.HALF) == tile
        assert "staged" in tile_text(tile)
        assert tile.shared_bytes <= SM_90A.shared_bytes and tile.most_splits == 1
    assert len({tile_text(tile) for tile in (*EVERY, *PRODUCT_TILES)}) == len(EVERY) + len(PRODUCT_TILES)
    key = key_of(product, operands_of(product, HOPPER), epilogue)
    context = replace(HOPPER, choices={key: choice_of(STAGED_TILES[1], 9.0)})
    assert pick_tile(product, epilogue, context) == STAGED_TILES[1]
    bare = replace(epilogue, stage=lambda: None)
    assert pick_tile(product, bare, context) == pick_tile(product, bare, HOPPER)


def test_a_convolution_that_is_a_product_can_be_staged() -> None:
    """1×1 with a residual: what the tuner times is what is lowered."""
    pixels = cv.channels_inner(2, 64, 14, 14)
    more = cv.channels_inner(2, 256, 14, 14)
    step = make_step(cv.conv_op(1, store=cv.BIAS_RESIDUAL), [pixels, weight(256, 64, 1, 1), weight(256, 1, 1), more])
    found = conv.parts_of(step, HOPPER)
    assert found is not None
    product, epilogue = found
    assert (product.m, product.n, product.k) == (2 * 14 * 14, 256, 64)
    assert epilogue.staged is not None and epilogue.staged.tile is not None
    sources = [launch.kernel.source for launch in conv.lower(step, HOPPER)]
    chosen = pick_tile(product, epilogue, HOPPER)
    assert sources == [launch.kernel.source for launch in launches_of(product, epilogue, chosen, HOPPER)]
    for other in (cv.conv_op(3), cv.conv_op(1, stride=2), cv.conv_op(1, groups=2)):
        kernel = 3 if other.pads[0][0] else 1
        filters = weight(256, 64 // other.groups, kernel, kernel)
        assert conv.parts_of(make_step(other, [pixels, filters, weight(256, 1, 1)]), HOPPER) is None


def test_a_staged_convolution_matches_float64(hopper: Runner, count: int) -> None:
    cases = []
    for tile in EVERY:
        pixels, more = cv.channels_inner(2, 64, 9, 13), cv.channels_inner(2, 136, 9, 13)
        inputs = [pixels, weight(136, 64, 1, 1), weight(136, 1, 1), more]
        step = make_step(cv.conv_op(1, store=cv.BIAS_RESIDUAL), inputs)
        step = replace(
            step, inputs=(*step.inputs[:3], replace(more, buffer=Buffer("more", more.buffer.kind, more.buffer.nbytes)))
        )
        found = conv.parts_of(step, hopper.context)
        assert found is not None
        launches = launches_of(*found, tile, hopper.context)
        cases.append(Case(f"{tile}", step, 64, lowered=launches, rounding=EXACT))
    check(hopper, cases)
