"""Products of e4m3 against float64, and what e4m3 becomes on the way into memory and out of it.

Operands are numbers of e4m3, and their products are exact; the sums are not. mma.sync makes halves of them and adds in
fp32. wgmma aligns the 32 products of an instruction and the accumulator with the largest of them and keeps 13 bits
behind its leading one (gemm_wgmma.py; the emulator does the same): every instruction may lose a unit of 2⁻¹³ of the
largest partial sum, in either direction, so that K / 32 of them lose 2⁻¹³ · √(K / 32) of the result's root mean square.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Gemm, Pointwise
from engine.plan.plan import Step
from engine.plan.tensor import Tensor, row_major
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.choices import choice_of, key_of, tile_of
from engine.targets.cuda.covering import ACC, F16, F32, make_step, weight
from engine.targets.cuda.families import family_of
from engine.targets.cuda.gemm import (
    launches_of,
    lower,
    operands_of,
    parts_of,
    pick_tile,
    ranked_tiles,
    requirements,
)
from engine.targets.cuda.gemm_stream import StreamTile
from engine.targets.cuda.kernel import Context, Functor, Instruction, Launch, WeightStore, content
from engine.targets.cuda.product import Product, product_of
from engine.targets.cuda.tiles import BATCHED_TILES, MMA_TILES, PRODUCT_TILES, STAGED_TILES, Operands, Tile, WgmmaTile
from tests.engine.targets.cuda.cases import broadcast_of, check, fed, ragged, rng_of, wiped
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner

F8 = DType.F8E4M3
HOPPER = Context(SM_90A, 132, WeightStore())
EXACT = 2.0**-21
"""Sums in fp32 of exact products."""


def lost(k: int) -> float:
    """What sums on wgmma lose: `compare` allows twice the figure, 16 deviations, since partial sums are larger in some
    rows than in others (in a simulation of 20,000 elements up to 9 of them)."""
    return 8 * 2.0**-13 * max(1.0, k / 32) ** 0.5


def rounding(tile: Tile | StreamTile, k: int) -> float:
    return lost(k) if isinstance(tile, WgmmaTile) else EXACT


def parts_in(step: Step, tile: Tile, context: Context) -> list[Launch]:
    return launches_of(*parts(step, context), tile, context)


def stores(k: int, result: DType) -> dict[str, ex.Expr]:
    """Epilogues over a scale for every column (input 2); numbers of the result are of the size of 1."""
    scaled = cv.mul(ACC, cv.arg(2, F32))
    return {
        "scale": cv.stored(scaled, result),
        "bias gelu": cv.stored(cv.gelu(cv.add(scaled, cv.arg(3, F32))), result),
        "residual": cv.stored(cv.add(scaled, cv.arg(3, result)), result),
    }


def scaled_step(rng: np.random.Generator, m: int, n: int, k: int, name: str, result: DType) -> Step:
    """A product with a weight, whose sums a scale brings to the size of 1."""
    scale = (rng.uniform(0.5, 2, n) / np.sqrt(max(1, k))).astype(np.float32)
    inputs: list[cv.Given] = [fed(F8, (m, k), -1, 0), numbers(rng, (k, n)), scale]
    inputs += [weight(n, dtype=F32)] if name == "bias gelu" else [(result, (m, n))] if name == "residual" else []
    return make_step(Gemm((stores(k, result)[name],)), inputs)


def random_tile(rng: np.random.Generator, i: int, context: Context) -> tuple[Tile, int]:
    """The tile of case `i`, k in one part or in several, and what divides a k that it takes of 8 bits."""
    tiles: tuple[Tile, ...] = PRODUCT_TILES if context.architecture.wgmma and i % 3 else MMA_TILES
    tile = tiles[int(rng.integers(0, len(tiles)))]
    if isinstance(tile, WgmmaTile) and i % 2:
        tile = replace(tile, aligns=True)
    aligned = isinstance(tile, WgmmaTile) and not tile.aligns
    splits = min(int(rng.choice([1, 1, 2, 3, 7])), tile.most_splits)
    return replace(tile, splits=splits), 16 if aligned else 1


def twice_in(step: Step, tile: Tile, context: Context) -> list[Launch]:
    """The launches in a tile; where k is split twice, with the result wiped in between: counters must be left as they
    were found."""
    launches = parts_in(step, tile, context)
    return [*launches, *wiped(step.outputs[0], context), *launches] if tile.splits > 1 else launches


def numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return F8.convert(rng.standard_normal(shape).astype(np.float32))


def test_products_with_weights_match_float64(runner: Runner, count: int) -> None:
    """In every tile, k in one part or in several, results of fp8, fp16 and fp32."""
    rng, cases = rng_of("fp8"), []
    for i in range(2 * count):
        tile, granularity = random_tile(rng, i, runner.context)
        name, result = list(stores(1, F16))[i % 3], (F8, F16, F32)[int(rng.integers(0, 3))]
        m, k, n = ragged(rng, 300), ragged(rng, 900, granularity), ragged(rng, 300)
        step = scaled_step(rng, m, n, k, name, result)
        launches, label = twice_in(step, tile, runner.context), f"{m}x{n}x{k} {name} to {result.value} {tile}"
        cases.append(Case(label, step, k, lowered=launches, rounding=rounding(tile, k)))
    check(runner, cases)


def test_products_of_activations_match_float64(runner: Runner, count: int) -> None:
    """Batches that broadcast in any way, k innermost in both, sizes of one and rows at any byte."""
    rng, cases = rng_of("fp8 activations"), []
    for i in range(count):
        m, k, n = (1 if rng.random() < 0.1 else ragged(rng, 150, int(rng.choice([1, 4, 16]))) for _ in range(3))
        lead = tuple(int(rng.integers(1, 4)) for _ in range(int(rng.integers(0, 4))))
        a = rows(rng, (*broadcast_of(rng, lead), m, k), 0)
        b = rows(rng, (*broadcast_of(rng, lead), n, k), 1)
        shape, strides = b.shape, b.strides
        b = replace(b, shape=(*shape[:-2], k, n), strides=(*strides[:-2], strides[-1], strides[-2]))
        result = (F8, F16)[i % 2]
        store = cv.stored(cv.mul(ACC, cv.constant(k**-0.5)), result)
        step = make_step(Gemm((store,)), [a, b])
        label = f"{a.shape} {a.strides} {b.shape} {b.strides} to {result.value}"
        cases.append(Case(label, step, k, lowered=lower(step, runner.context), rounding=lost(k)))
    check(runner, cases)


def rows(rng: np.random.Generator, shape: tuple[int, ...], number: int) -> Tensor:
    """An operand whose last axis is innermost, sometimes with gaps."""
    whole = fed(F8, tuple(size + int(rng.choice([0, 0, 1, 16])) for size in shape), -1, number)
    return Tensor(whole.buffer, F8, shape, whole.strides)


@pytest.mark.parametrize("dtype", [F8, DType.I8], ids=lambda dtype: dtype.value)
def test_staged_results_match_float64(hopper: Runner, count: int, dtype: DType) -> None:
    """What large products are picked to run in: results of fp16 through shared memory, and a residual the other way."""
    rng, cases = rng_of(f"staged {dtype.value}"), []
    for i in range(count):
        tile = STAGED_TILES[i % len(STAGED_TILES)]
        m, n, k = ragged(rng, 300), ragged(rng, 300, 8), ragged(rng, 400, 16)
        scaled = cv.mul(ACC, cv.arg(2, F32))
        store = cv.stored(cv.add(scaled, cv.arg(3)) if i % 2 else cv.gelu(scaled))
        a, b = (rng.integers(-128, 128, shape, np.int8) if dtype is DType.I8 else numbers(rng, shape)
                for shape in ((m, k), (k, n)))  # fmt: skip
        size = 64**2 if dtype is DType.I8 else 1
        scale = (rng.uniform(0.5, 2, n) / np.sqrt(k) / size).astype(np.float32)
        step = make_step(Gemm((store,)), [fed(dtype, (m, k), -1, 0), b, scale, *([(F16, (m, n))] if i % 2 else [])])
        product, epilogue = parts(step, hopper.context)
        if epilogue.staged is None:  # of one row, beside which a residual is another constant
            assert m == 1
            continue
        launches = launches_of(product, epilogue, tile, hopper.context)
        near = EXACT if dtype is DType.I8 else lost(k)
        cases.append(Case(f"{m}x{n}x{k} {tile}", step, k, {0: a}, lowered=launches, rounding=near))
    check(hopper, cases)


def test_several_matrices_on_warpgroups_match_float64(hopper: Runner, count: int) -> None:
    rng, cases = rng_of("fp8 matrices"), []
    for i in range(count):
        tile = BATCHED_TILES[i % len(BATCHED_TILES)]
        lead = tuple(int(rng.integers(2, 4)) for _ in range(int(rng.integers(1, 3))))
        m, n, k = ragged(rng, 200), ragged(rng, 200), ragged(rng, 300, 16)
        step = make_step(Gemm((cv.stored(ACC),)), [fed(F8, (*lead, m, k), -1, 0), fed(F8, (*lead, k, n), -2, 1)])
        product, epilogue = parts(step, hopper.context)
        assert product.suits_tma_batched
        launches = launches_of(product, epilogue, tile, hopper.context)
        cases.append(Case(f"{lead} of {m}x{n}x{k} {tile}", step, k, lowered=launches, rounding=lost(k)))
    check(hopper, cases)


def parts(step: Step, context: Context = HOPPER) -> tuple[Product, Functor]:
    found = parts_of(step, context)
    assert found is not None
    return found


def test_long_sums_on_warpgroups_lose_no_more_than_derived(hopper: Runner) -> None:
    """Relative L2, so that the typical error is looked at and not its largest; whether k is in one part or in several,
    which are added in fp32."""
    rng, (m, n) = rng_of("fp8 long"), (64, 64)
    for k in (1024, 4096) if isinstance(hopper, EmulatedRunner) else (1024, 4096, 8192, 65536):
        step = make_step(Gemm((ACC,)), [fed(F8, (m, k), -1, 0), numbers(rng, (k, n))])
        arrays = [numbers(rng, (m, k)), content(step.inputs[1])]
        expected = arrays[0].astype(np.float64) @ arrays[1].astype(np.float64)
        for splits in (1, 4):
            tile = next(tile for tile in PRODUCT_TILES if (tile.m, tile.n) == (64, 64))
            launches = parts_in(step, replace(tile, splits=splits), hopper.context)
            assert all(hopper.prepare(launch.kernel) is None for launch in launches)
            (got,) = hopper.run(step, launches, arrays)
            error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
            bound = 1.5 * 2.0**-13 * (k / splits / 32) ** 0.5
            hopper.tally.count(step, error / bound, failed=error > bound)
            assert error <= bound, f"{k=} in {splits}: {error:.1e}, {bound:.1e} expected"


def test_every_number_of_e4m3_is_read_as_it_is(runner: Runner) -> None:
    every = np.arange(256, dtype=np.uint8).view(F8.numpy)
    for target in (F32, F16):
        (got,) = converted(runner, every, target)
        assert np.array_equal(got.astype(np.float64), every.astype(np.float64), equal_nan=True)


def test_numbers_are_rounded_to_e4m3_to_nearest_and_saturate(runner: Runner) -> None:
    """Every number of e4m3, the middles between two, what lies beside these, and what is beyond the largest."""
    known = np.sort(np.arange(127, dtype=np.uint8).view(F8.numpy).astype(np.float32))
    middles = (known[1:] + known[:-1]) / 2
    beside = [np.nextafter(middles, to, dtype=np.float32) for to in (np.float32(-np.inf), np.float32(np.inf))]
    far = np.array([448, 449, 463.9, 464, 464.1, 480, 1e9, 3e38, np.inf, np.nan, 1e-9, 1e-40, 0], np.float32)
    magnitudes = np.concatenate([known, middles, *beside, far, rng_of("e4m3").lognormal(0, 4, 2000).astype(np.float32)])
    x = np.concatenate([magnitudes, -magnitudes])
    (got,) = converted(runner, x, F8)
    expected = np.clip(x, -448, 448).astype(F8.numpy)
    assert np.array_equal(np.isnan(got.astype(np.float32)), np.isnan(x))
    finite = ~np.isnan(x)
    assert np.array_equal(got.view(np.uint8)[finite], expected.view(np.uint8)[finite])


def converted(runner: Runner, x: np.ndarray, target: DType) -> list[np.ndarray]:
    """`x` cast by a kernel; in fp32 and out of it a number and a row at once."""
    dtype = DType.of(x.dtype)
    expression = ex.cast(ex.cast(ex.Arg(0, dtype), F32), target)
    results = []
    for shape in ((x.size,), (x.size, 1)):
        step = make_step(Pointwise((expression,)), [(dtype, shape)])
        launches = family_of(step.op).lower(step, runner.context)
        assert all(runner.prepare(launch.kernel) is None for launch in launches)
        results.append(runner.run(step, launches, [x.reshape(shape)])[0].reshape(-1))
    assert np.array_equal(results[0].view(np.uint8), results[1].view(np.uint8))
    return results[:1]


def test_nan_reaches_its_own_row_only(runner: Runner) -> None:
    """In the smallest and in the largest tile of either kind."""
    a, b = np.ones((130, 64), np.float32), np.ones((64, 16), np.float32)
    a[3, 60] = np.nan
    step = make_step(Gemm((ACC,)), [fed(F8, a.shape, -1, 0), F8.convert(b)])
    wgmma = (PRODUCT_TILES[0], PRODUCT_TILES[6]) if runner.context.architecture.wgmma else ()
    for tile in (MMA_TILES[0], MMA_TILES[-1], *wgmma):
        launches = parts_in(step, tile, runner.context)
        assert all(runner.prepare(launch.kernel) is None for launch in launches)
        (got,) = runner.run(step, launches, [F8.convert(a), F8.convert(b)])
        assert np.isnan(got[3]).all() and (np.delete(got, 3, 0) == 64).all(), tile


def test_k_is_innermost_and_weights_take_a_byte_each() -> None:
    a, b = fed(F8, (2, 40, 64), -1, 0), fed(F8, (2, 64, 48), -1, 1)
    needs, _ = requirements(Gemm((ACC,)), (a, b))
    assert [need.order for need in needs] == [(0, 1, 2), (0, 2, 1)]
    step = make_step(Gemm((ACC,)), [(F8, (40, 200)), weight(200, 48, dtype=F8)])
    product = product_of(step, HOPPER)
    assert product.b.is_constant and product.b.pointer.buffer.nbytes == 48 * 256  # rows of whole lines
    assert operands_of(product, HOPPER) is Operands.BYTES


@pytest.mark.parametrize("sizes", [(8192, 8192, 8192), (4096, 768, 3072), (300, 400, 387)])
def test_a_product_is_run_by_warpgroups_where_there_are_some(sizes: tuple[int, int, int]) -> None:
    m, n, k = sizes
    step = make_step(Gemm((cv.stored(ACC),)), [(F8, (m, k)), numbers(rng_of("choice"), (k, min(n, 512)))])
    for architecture, expected in ((SM_90A, Instruction.WGMMA_FP8), (SM_80, Instruction.MMA)):
        launches = lower(step, Context(architecture, 132, WeightStore()))
        assert launches[-1].kernel.instruction is expected, sizes
        assert len(launches) == (2 if architecture is SM_90A and k % 16 else 1), "rows at any byte are copied before"


def test_the_cost_model_expects_nearly_twice_the_rate_of_fp16() -> None:
    """On a large product; a step takes as many bytes, twice as many elements."""

    def us(dtype: DType) -> float:
        step = make_step(Gemm((cv.stored(ACC),)), [(dtype, (8192, 8192)), fed(dtype, (8192, 8192), -2, 1)])
        product, epilogue = parts(step)
        best = ranked_tiles(product, HOPPER, epilogue.reads)[0]
        assert isinstance(best.tile, WgmmaTile)
        return best.estimate.us

    assert 1.7 < us(F16) / us(F8) < 1.95


def test_what_the_tuner_found_is_taken() -> None:
    step = make_step(Gemm((cv.stored(ACC),)), [(F8, (512, 1024)), numbers(rng_of("tuned"), (1024, 256))])
    product, epilogue = parts(step)
    key = key_of(product, Operands.BYTES, epilogue)
    assert key.startswith("bytes f8e4m3 ")
    for tile in (PRODUCT_TILES[7], MMA_TILES[1]):
        choice = choice_of(tile, 1.0)
        assert tile_of(choice, product, Operands.BYTES) == tile
        context = replace(HOPPER, choices={key: choice})
        assert pick_tile(product, epilogue, context) == tile


def test_results_of_fp8_can_lie_in_any_order(runner: Runner, count: int) -> None:
    """As quantised heads do."""
    rng, cases = rng_of("fp8 order"), []
    for _ in range(max(4, count // 4)):
        shape = tuple(int(rng.integers(1, 6)) for _ in range(3))
        k, n = ragged(rng, 200, 16), ragged(rng, 100, int(rng.choice([1, 8])))
        store = cv.stored(cv.mul(ACC, cv.constant(k**-0.5)), F8)
        step = make_step(Gemm((store,)), [(F8, (*shape, k)), numbers(rng, (k, n))])
        order = (*(int(axis) for axis in rng.permutation(3)), 3)
        step = replace(step, outputs=tuple(replace(t, strides=row_major(t.shape, order)) for t in step.outputs))
        cases.append(Case(f"{shape} {order} {k=} {n=}", step, k, lowered=lower(step, runner.context), rounding=lost(k)))
    check(runner, cases)
