"""Products that divide the rows of their first operand by their standard deviation, and factors of rows, against
float64."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import inf, prod
from pathlib import Path

import numpy as np
import pytest

from engine import frontend, passes
from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.graph import Value, make_node
from engine.ir.ops import Gemm, RowFactors
from engine.plan.build import Constants, build
from engine.plan.plan import Plan, Step
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.choices import choice_of, key_of, tile_of
from engine.targets.cuda.covering import ACC, F16, F32, make_step, weight
from engine.targets.cuda.families import family_of, traits_of
from engine.targets.cuda.gemm import (
    estimated_best,
    found_apart,
    launches_of,
    lower,
    needs_staged,
    operands_of,
    parts_of,
    ranked_in,
    ranked_tiles,
)
from engine.targets.cuda.gemm_rows import MOST_ROWS, ROWS_TILES, AnyTile, RowsTile
from engine.targets.cuda.gemm_stream import stream_tiles
from engine.targets.cuda.joined_tiles import JOINED_PRODUCTS
from engine.targets.cuda.kernel import Context, Functor, Launch, WeightStore, content, is_constant
from engine.targets.cuda.product import Product
from engine.targets.cuda.product_cost import CHOSEN_BY_MODEL
from engine.targets.cuda.tiles import CLUSTER_TILES, MMA_TILES, PRODUCT_TILES, STAGED_TILES, Operands, WgmmaTile
from engine.targets.cuda.tunables import tunable
from tests.engine.ir_interpreter import bind_sizes, run_node
from tests.engine.targets.cuda.cases import check, check_late, ragged, rng_of, wiped
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.planning import CudaCapabilities, copies
from tests.engine.targets.cuda.test_gemm import stores_of
from tests.engine.targets.cuda.test_packed_models import execute

FIXTURES = Path(__file__).parents[3] / "fixtures"
BF16 = DType.BF16
EPSILON = 1e-5
NORMS = {
    "gpt2_legacy": 2, "vit-eager-legacy-11": 2, "deit-sdpa-legacy-14": 2, "clip_text-sdpa-dynamo-18": 2,
    "clip_vision-sdpa-dynamo-18": 1, "modernbert-sdpa-legacy-17": 2, "swin-eager-dynamo-18": 6,
}  # fmt: skip
"""Pre-norm Transformers of two layers, and the norms that stay: the first, which computes what it normalises, or whose
result is wanted, and the last. Swin has more of them, of rows that are moved first."""
EXECUTED = [("gpt2_legacy", F16), ("vit-eager-legacy-11", BF16)]
FAR = 2.0**-16
"""What a product of fp32 sums loses of a row whose mean is 30 of its deviations: they are that much larger on the way
than what is left of them."""
HOPPER = Context(SM_90A, 132, WeightStore())


FOUND_BESIDE = ((8192, 768, 768), (2048, 768, 768))
"""Sizes of products whose tiles should find the factors of their rows: others are faster in tiles that do not (a long k
of few rows), or in none that does (results of rows that are not aligned)."""
ROUNDED = {F16: 2.0**-11, BF16: 2.0**-8}
"""Factors are those of results before they are rounded."""


def rows_far_from_zero(rng: np.random.Generator, m: int, k: int, dtype: DType) -> np.ndarray:
    """Rows of which some have a mean of 30 deviations, some a small or a large deviation, and one is all alike."""
    x = (rng.standard_normal((m, k)) + rng.choice([0, 0, -3, 30], (m, 1))) * rng.choice([0.1, 1, 8], (m, 1))
    x[m // 2] = 1.5
    return x.astype(dtype.numpy)


def factors_of(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        (found,) = run_node(make_node(RowFactors(EPSILON), (Value("x", DType.of(x.dtype), x.shape),)), [x], {})
    return found


def centred(k: int, n: int, dtype: DType) -> np.ndarray:
    """A weight whose columns sum to nearly 0, as the pass `divide_rows` makes them."""
    w = weight(k, n).astype(np.float64)
    return (w - w.mean(axis=0)).astype(dtype.numpy)


def divided_step(m: int, n: int, k: int, name: str, dtype: DType = F16, batch: tuple[int, ...] = ()) -> Step:
    """A product of divided rows with a weight and one of `stores_of(dtype)`, whose arguments come after the factors."""
    bias = cv.arg(3, dtype)
    store = {
        "plain": cv.stored(ACC, dtype),
        "bias": cv.stored(cv.add(ACC, bias), dtype),
        "bias gelu": cv.stored(cv.gelu(cv.add(ACC, bias)), dtype),
        "residual": cv.stored(cv.add(cv.add(ACC, bias), cv.arg(4, dtype)), dtype),
    }[name]
    inputs: list[cv.Given] = [(dtype, (*batch, m, k)), centred(k, n, dtype), (F32, (*batch, m, 1))]
    inputs += [] if name == "plain" else [weight(n, dtype=dtype)]
    inputs += [(dtype, (*batch, m, n))] if name == "residual" else []
    return make_step(Gemm((store,), divided=True), inputs)


def factors_step(m: int, n: int, k: int, name: str, dtype: DType = F16) -> Step:
    """A product that finds the factors of its rows."""
    store = cv.stored(ACC, dtype) if name == "plain" else stores_of(dtype)[name]
    inputs: list[cv.Given] = [(dtype, (m, k)), weight(k, n, dtype=dtype)]
    inputs += [] if name == "plain" else [weight(n, dtype=dtype) * 20]
    inputs += [(dtype, (m, n))] if name == "residual" else []
    return make_step(Gemm((store,), factors=EPSILON), inputs)


def launched(step: Step, tile: AnyTile, context: Context) -> list[Launch]:
    found = parts_of(step, context)
    assert found is not None
    return launches_of(*found, tile, context)


def case(
    runner: Runner,
    rng: np.random.Generator,
    tile: AnyTile,
    m: int,
    n: int,
    k: int,
    name: str,
    batch: tuple[int, ...] = (),
) -> Case:
    dtype = (F16, BF16)[int(rng.integers(0, 2))]
    step, rows = divided_step(m, n, k, name, dtype, batch), prod(batch) * m
    x = rows_far_from_zero(rng, rows, k, dtype)
    launches = launched(step, tile, runner.context)
    label = f"{dtype.value} {batch} {m}x{n}x{k} {name} {tile}"
    # A row that is all alike is divided by √ε alone: what its product leaves of 0 is not compared.
    x[rows // 2] = rng.standard_normal(k)
    x = x.reshape(*batch, m, k)
    return Case(label, step, k, {0: x, 2: factors_of(x)}, launches, FAR)


def test_products_of_divided_rows_match_float64(hopper: Runner, count: int) -> None:
    """In tiles of every form, ragged."""
    rng, cases = rng_of("divided"), []
    forms = [*PRODUCT_TILES, *STAGED_TILES, *CLUSTER_TILES, *JOINED_PRODUCTS[::5]]
    for i in range(2 * count):
        tile = forms[(7 * i) % len(forms)]
        if tile.most_splits > 1 and i % 3 == 0:
            tile = replace(tile, splits=2) if replace(tile, splits=2).divides_rows else tile
        granularity = 8 if needs_staged(tile) else 1
        m, n, k = ragged(rng, 300), ragged(rng, 300, granularity), ragged(rng, 600, 8)
        cases.append(case(hopper, rng, tile, m, n, k, list(stores_of(F16))[i % 4]))
    check(hopper, cases)


def test_other_kernels_divide_rows_in_their_epilogue(hopper: Runner, count: int) -> None:
    """Tiles of mma.sync, those for few rows and slices of rows; whole and split, rows of several matrices."""
    rng, cases = rng_of("epilogues"), []
    tiles = [MMA_TILES[3], replace(MMA_TILES[4], splits=3), ROWS_TILES[0], replace(ROWS_TILES[2], splits=2)]
    for i in range(2 * count):
        tile, name = tiles[i % len(tiles)], list(stores_of(F16))[int(rng.integers(0, 4))]
        most, batch = (MOST_ROWS // 2 if isinstance(tile, RowsTile) else 100), (2,) * (i // len(tiles) % 2)
        m, n, k = ragged(rng, most), ragged(rng, 200), 256 + ragged(rng, 1500, 8)
        cases.append(case(hopper, rng, tile, m, n, k, name, batch))
    product, _ = parts(divided_step(400, 72, 32, "bias"))
    slices = stream_tiles(product, Operands.HALF)[0]
    cases.append(case(hopper, rng, slices, 400, 72, 32, "bias"))
    check(hopper, cases)


def test_products_find_the_factors_of_their_rows(hopper: Runner, count: int) -> None:
    """In tiles that do beside short epilogues, and with a launch behind others; panels and tiles that end beside the
    result."""
    rng, cases = rng_of("found"), []
    tiles: list[AnyTile] = [tile for tile in (*STAGED_TILES, *CLUSTER_TILES) if tile.finds_moments]
    tiles += [PRODUCT_TILES[0], replace(PRODUCT_TILES[1], splits=2), MMA_TILES[1]]
    for i in range(2 * count):
        tile, name = tiles[i % len(tiles)], list(stores_of(F16))[int(rng.integers(0, 4))]
        dtype = (F16, BF16)[int(rng.integers(0, 2))]
        # Factors are of rows before they are rounded: over a few columns far from zero not those of what is stored.
        m, n, k = ragged(rng, 400), max(64, ragged(rng, 400, 8)), ragged(rng, 300, 8)
        step = factors_step(m, n, k, name, dtype)
        aligns = isinstance(tile, WgmmaTile) and i % 3 == 1  # then moments share a workspace with rows of the operand
        tile = replace(tile, aligns=True) if isinstance(tile, WgmmaTile) and aligns else tile
        launches = launched(step, tile, hopper.context)
        beside = isinstance(tile, WgmmaTile) and tile.finds_moments and name != "bias gelu"
        assert len(launches) == 1 + aligns + (not beside)
        # Twice, with the factors wiped in between: the tiles of a row must leave their counters as they found them.
        launches = [*launches, *wiped(step.outputs[1], hopper.context), *launches]
        feeds = {3: rows_far_from_zero(rng, m, n, dtype)} if name == "residual" else {}
        cases.append(Case(f"{dtype.value} {m}x{n}x{k} {name} {tile}", step, k, feeds, launches, ROUNDED[dtype]))
    check_late(hopper, cases)


def test_many_steps_and_tiles(hopper: Runner) -> None:
    """More tiles than multiprocessors and more steps than stages; warps that come late."""
    (m, n, k), rng, tile = (420, 264, 392), rng_of("many"), STAGED_TILES[3]
    step, feeds = factors_step(m, n, k, "residual"), {3: rows_far_from_zero(rng, m, n, F16)}
    found = Case(f"found {tile}", step, k, feeds, launched(step, tile, hopper.context), ROUNDED[F16])
    check_late(hopper, [found, case(hopper, rng, tile, m, n, k, "residual")])


def test_row_factors_match_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("factors"), []
    for i in range(2 * count):
        dtype, rows, columns = (F16, BF16)[i % 2], ragged(rng, 400), ragged(rng, 900, 8 if i % 3 else 1)
        step = make_step(RowFactors(EPSILON), [(dtype, (rows, columns))])
        x = rows_far_from_zero(rng, rows, columns, dtype)
        # A single element is alike, too; what is far larger than the other factors would hide their errors.
        x[rows // 2] = rng.standard_normal(columns)
        if columns == 1:
            continue
        cases.append(Case(f"{dtype.value} {rows}x{columns}", step, columns, {0: x}, rounding=0.0))
    check(runner, cases)


def test_a_row_that_is_all_alike_has_no_variance(runner: Runner) -> None:
    """Whatever its value: squares are those of distances from an element of the row."""
    step = make_step(RowFactors(EPSILON), [(F16, (5, 1000))])
    launches = family_of(step.op).lower(step, runner.context)
    assert all(runner.prepare(one.kernel) is None for one in launches)
    x = np.repeat(np.array([0.0, 0.1, -3.3, 100.7, 60000.0], np.float16)[:, None], 1000, axis=1)
    (got,) = runner.run(step, launches, [x])
    np.testing.assert_allclose(got, np.full((5, 1), EPSILON**-0.5), rtol=1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_pre_norm_transformers_copy_no_more_than_with_norms(name: str) -> None:
    plan, _, _ = planned(name, F16)
    whole = passes.run(frontend.read(FIXTURES / f"{name}.onnx"), replace(traits_of(SM_90A), divided_rows=False))
    assert Counter(step.op.name for step in plan.steps)["Norm"] == NORMS[name]
    assert copies(plan) == copies(build(whole, plan.sizes, CudaCapabilities(), Constants()))


@pytest.mark.parametrize(("name", "dtype"), EXECUTED)
def test_pre_norm_transformers_match_their_graphs(hopper: Runner, name: str, dtype: DType) -> None:
    """All steps one after the other."""
    plan, feeds, want = planned(name, dtype)
    (got,) = execute(hopper, plan, feeds).values()
    assert np.linalg.norm(got - want) <= (5e-3 if dtype is F16 else 4e-2) * np.linalg.norm(want)


def planned(name: str, dtype: DType) -> tuple[Plan, dict[str, np.ndarray], np.ndarray]:
    """The plan of a fixture, what it is fed, and its result in float64."""
    graph = passes.run(frontend.read(FIXTURES / f"{name}.onnx"), replace(traits_of(SM_90A), storage_type=dtype))
    data = np.load(FIXTURES / f"{name}.npz")
    feeds = {value.name: data[f"in_{value.name}"] for value in graph.inputs}
    plan = build(graph, bind_sizes(graph, feeds), CudaCapabilities(), Constants())
    return plan, feeds, data["out_0"].astype(np.float64)


def test_what_is_not_finite_stays_in_its_rows(hopper: Runner) -> None:
    divided, found = divided_step(200, 200, 136, "bias"), factors_step(200, 200, 136, "bias")
    for step, tile in ((divided, STAGED_TILES[0]), (found, STAGED_TILES[3]), (divided, PRODUCT_TILES[1])):
        x = np.random.default_rng(0).standard_normal((200, 136)).astype(np.float16)
        launches = launched(step, tile, hopper.context)
        assert all(hopper.prepare(one.kernel) is None for one in launches)

        def results(x: np.ndarray, step: Step = step, launches: list[Launch] = launches) -> list[np.ndarray]:
            others = [content(tensor) if is_constant(tensor) else factors_of(x) for tensor in step.inputs[1:]]
            return [array.copy() for array in hopper.run(step, launches, [x, *others])]

        clean = results(x)
        for row, value in ((3, np.nan), (70, np.inf), (199, -np.inf)):
            x[row, row % 136] = value
        others = np.delete(np.arange(200), [3, 70, 199])
        for result, before in zip(results(x), clean, strict=True):
            if step is found and result.shape[1] > 1:
                assert not np.isfinite(result[[3, 70, 199]]).any()
            else:
                assert np.isnan(result[[3, 70, 199]]).all()
            assert np.array_equal(result[others], before[others])


def test_divided_rows_are_no_reason_for_another_kernel() -> None:
    """But for split tiles without registers for it, what plain products take is taken, and estimated alike."""
    for m, n, k in ((1, 2304, 768), (8, 3072, 768), (17, 768, 3072), (8192, 768, 768), (9000, 64, 32)):
        (product, epilogue), (whole, plain) = parts(divided_step(m, n, k, "bias")), parts(plain_step(m, n, k))
        best, other = estimated_best(product, epilogue, HOPPER), estimated_best(whole, plain, HOPPER)
        assert best.tile == other.tile
        assert best.estimate.us == pytest.approx(other.estimate.us, rel=0.02)
        assert tile_of(choice_of(best.tile, 1.0), product, Operands.HALF) == best.tile
        operands = operands_of(product, HOPPER)
        assert key_of(product, operands, epilogue) != key_of(replace(product, divisors=None), operands, epilogue)
    product, _ = parts(divided_step(256, 768, 3072, "bias"))
    full = WgmmaTile(128, 256, 4, cooperative=True, splits=2)
    assert tile_of(choice_of(full, 1.0), product, Operands.HALF) is None
    assert full not in [ranked.tile for ranked in ranked_tiles(product, HOPPER)]
    assert full in [ranked.tile for ranked in ranked_tiles(replace(product, divisors=None), HOPPER)]


def plain_step(m: int, n: int, k: int) -> Step:
    """The same product of rows as they are."""
    store = cv.stored(cv.add(ACC, cv.arg(2)))
    return make_step(Gemm((store,)), [(F16, (m, k)), weight(k, n), weight(n)])


def parts(step: Step) -> tuple[Product, Functor]:
    found = parts_of(step, HOPPER)
    assert found is not None
    return found


@pytest.mark.parametrize("sizes", [(8192, 768, 768), (2048, 768, 768), (256, 768, 768), (8, 768, 3072), (300, 36, 64)])
def test_factors_are_found_where_that_should_be_the_fastest(sizes: tuple[int, int, int]) -> None:
    """By the best tile that finds moments, or by a launch behind the best of all; whatever is timed counts both."""
    step = factors_step(*sizes, "residual")
    product, epilogue = parts(step)
    ranked = [one for way in CHOSEN_BY_MODEL for one in ranked_in(way, product, epilogue, HOPPER)]
    finding = [one.estimate.us for one in ranked if not found_apart(product, one.tile)]
    whole = estimated_best(replace(product, factors=None), epilogue, HOPPER)
    apart = whole.estimate.us + 2.0 + sizes[0] * sizes[1] * 2 / 2.86e6
    best = estimated_best(product, epilogue, HOPPER)
    assert (found_apart(product, best.tile) is None) == (min(finding, default=inf) < apart) == (sizes in FOUND_BESIDE)
    assert best.estimate.us == pytest.approx(min([apart, *finding]), rel=0.01)
    one = tunable(step, HOPPER)
    assert one is not None
    for i, candidate in enumerate(one.candidates):
        assert len(one.launches(i, HOPPER)) == 1 + candidate.text.endswith(", then factors of rows")
    assert len(lower(step, HOPPER)) == (1 if sizes in FOUND_BESIDE else 2)


def test_what_has_no_kernel_is_refused() -> None:
    for dtype, b in ((F16, (F16, (64, 32))), (F32, weight(64, 32, dtype=F32))):
        with pytest.raises(UnsupportedOp, match="divided rows"):
            make_step(Gemm((ACC,), divided=True), [(dtype, (9, 64)), b, (F32, (9, 1))])
    with pytest.raises(UnsupportedOp, match="registers do not hold both"):
        make_step(
            Gemm((cv.stored(ACC),), divided=True, factors=EPSILON), [(F16, (9, 64)), weight(64, 32), (F32, (9, 1))]
        )
    with pytest.raises(UnsupportedOp, match="RowFactors of f32"):
        make_step(RowFactors(EPSILON), [(F32, (9, 64))])
