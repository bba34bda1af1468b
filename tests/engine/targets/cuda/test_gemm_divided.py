"""Products that divide the rows of their first operand by their standard deviation, and factors of rows, against
float64."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine import frontend, passes
from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.graph import Value, make_node
from engine.ir.ops import Gemm, RowFactors
from engine.plan.build import Constants, build
from engine.plan.plan import Step
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.choices import choice_of, key_of, tile_of
from engine.targets.cuda.covering import ACC, F16, F32, make_step, weight
from engine.targets.cuda.families import family_of, traits_of
from engine.targets.cuda.gemm import launches_of, needs_staged, operands_of, parts_of, pick_tile, ranked_tiles
from engine.targets.cuda.kernel import Context, Functor, Launch, WeightStore, content, is_constant
from engine.targets.cuda.product import Product
from engine.targets.cuda.tiles import CLUSTER_TILES, MMA_TILES, PRODUCT_TILES, STAGED_TILES, Operands, Tile, WgmmaTile
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
FAR = 2.0**-16
"""What a product of fp32 sums loses of a row whose mean is 30 of its deviations: they are that much larger on the way
than what is left of them."""
HOPPER = Context(SM_90A, 132, WeightStore())


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


def divided_step(m: int, n: int, k: int, name: str, dtype: DType = F16) -> Step:
    """A product of divided rows with a weight and one of `stores_of(dtype)`, whose arguments come after the factors."""
    bias = cv.arg(3, dtype)
    store = {
        "plain": cv.stored(ACC, dtype),
        "bias": cv.stored(cv.add(ACC, bias), dtype),
        "bias gelu": cv.stored(cv.gelu(cv.add(ACC, bias)), dtype),
        "residual": cv.stored(cv.add(cv.add(ACC, bias), cv.arg(4, dtype)), dtype),
    }[name]
    inputs: list[cv.Given] = [(dtype, (m, k)), centred(k, n, dtype), (F32, (m, 1))]
    inputs += [] if name == "plain" else [weight(n, dtype=dtype)]
    inputs += [(dtype, (m, n))] if name == "residual" else []
    return make_step(Gemm((store,), divided=True), inputs)


def factors_step(m: int, n: int, k: int, name: str, dtype: DType = F16, divided: bool = False) -> Step:
    """A product that finds the factors of its rows; `divided`: it divides those of its operand, too."""
    if divided:
        step = divided_step(m, n, k, name, dtype)
        op, inputs = step.op, step.inputs
    else:
        store = cv.stored(ACC, dtype) if name == "plain" else stores_of(dtype)[name]
        given: list[cv.Given] = [(dtype, (m, k)), weight(k, n, dtype=dtype)]
        given += [] if name == "plain" else [weight(n, dtype=dtype) * 20]
        given += [(dtype, (m, n))] if name == "residual" else []
        step = make_step(Gemm((store,)), given)
        op, inputs = step.op, step.inputs
    assert isinstance(op, Gemm)
    return make_step(replace(op, factors=EPSILON), inputs)


def launched(step: Step, tile: Tile, context: Context) -> list[Launch]:
    found = parts_of(step, context)
    assert found is not None
    return launches_of(*found, tile, context)


def case(runner: Runner, rng: np.random.Generator, tile: WgmmaTile, m: int, n: int, k: int, name: str) -> Case:
    dtype = (F16, BF16)[int(rng.integers(0, 2))]
    step = divided_step(m, n, k, name, dtype)
    x = rows_far_from_zero(rng, m, k, dtype)
    launches = launched(step, tile, runner.context)
    label = f"{dtype.value} {m}x{n}x{k} {name} {tile}"
    # A row that is all alike is divided by √ε alone: what its product leaves of 0 is not compared.
    x[m // 2] = rng.standard_normal(k)
    return Case(label, step, k, {0: x, 2: factors_of(x)}, launches, FAR)


def test_products_of_divided_rows_match_float64(hopper: Runner, count: int) -> None:
    """In tiles of every form, ragged."""
    rng, cases = rng_of("divided"), []
    forms = [*PRODUCT_TILES, *STAGED_TILES, *CLUSTER_TILES]
    for i in range(4 * count):
        tile = forms[(7 * i) % len(forms)]
        if tile.most_splits > 1 and i % 3 == 0:
            tile = replace(tile, splits=2) if replace(tile, splits=2).divides_rows else tile
        granularity = 8 if needs_staged(tile) else 1
        m, n, k = ragged(rng, 300), ragged(rng, 300, granularity), ragged(rng, 600, 8)
        cases.append(case(hopper, rng, tile, m, n, k, list(stores_of(F16))[i % 4]))
    check(hopper, cases)


def test_many_steps_and_tiles(hopper: Runner) -> None:
    """A long k, and more tiles than multiprocessors; warps that come late."""
    rng = rng_of("many")
    tiles = (WgmmaTile(128, 192, 4, slots=2), WgmmaTile(128, 256, 4, cooperative=True, slots=2), PRODUCT_TILES[9])
    check_late(hopper, [case(hopper, rng, tile, 700, 392, 1104, "residual") for tile in tiles])


def test_products_find_the_factors_of_their_rows(hopper: Runner, count: int) -> None:
    """In tiles that do and with a launch behind tiles that do not; panels and tiles that end beside the result."""
    rng, cases = rng_of("found"), []
    tiles: list[Tile] = [tile for tile in (*STAGED_TILES, *CLUSTER_TILES) if tile.finds_moments]
    tiles += [PRODUCT_TILES[0], replace(PRODUCT_TILES[1], splits=2), MMA_TILES[1]]
    for i in range(4 * count):
        tile, name = tiles[i % len(tiles)], list(stores_of(F16))[int(rng.integers(0, 4))]
        dtype = (F16, BF16)[int(rng.integers(0, 2))]
        m, n, k = ragged(rng, 400), ragged(rng, 400, 8), ragged(rng, 300, 8)
        step = factors_step(m, n, k, name, dtype)
        aligns = isinstance(tile, WgmmaTile) and i % 3 == 1  # then moments share a workspace with rows of the operand
        tile = replace(tile, aligns=True) if isinstance(tile, WgmmaTile) and aligns else tile
        launches = launched(step, tile, hopper.context)
        assert len(launches) == 1 + aligns + (not isinstance(tile, WgmmaTile) or not tile.finds_moments)
        # Twice, with the factors wiped in between: the tiles of a row must leave their counters as they found them.
        launches = [*launches, *wiped(step.outputs[1], hopper.context), *launches]
        feeds = {3: rows_far_from_zero(rng, m, n, dtype)} if name == "residual" else {}
        cases.append(Case(f"{dtype.value} {m}x{n}x{k} {name} {tile}", step, k, feeds, launches, ROUNDED[dtype]))
    check_late(hopper, cases)


def test_products_that_divide_rows_and_find_factors(hopper: Runner) -> None:
    rng, cases = rng_of("both"), []
    for tile in (STAGED_TILES[0], STAGED_TILES[3], STAGED_TILES[5]):
        step = factors_step(700, 392, 1104, "residual", F16, True)
        x = rng.standard_normal((700, 1104)).astype(np.float16)
        feeds = {0: x, 2: factors_of(x), 4: rows_far_from_zero(rng, 700, 392, F16)}
        cases.append(Case(f"{tile}", step, 1104, feeds, launched(step, tile, hopper.context), ROUNDED[F16]))
    check_late(hopper, cases)


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
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_pre_norm_transformers_match_their_graphs(hopper: Runner, name: str, dtype: DType) -> None:
    """All steps one after the other; they copy no more than they would with norms."""
    path, traits = FIXTURES / f"{name}.onnx", replace(traits_of(SM_90A), storage_type=dtype)
    graph = passes.run(frontend.read(path), traits)
    whole = passes.run(frontend.read(path), replace(traits, divided_rows=False))
    data = np.load(FIXTURES / f"{name}.npz")
    feeds = {value.name: data[f"in_{value.name}"] for value in graph.inputs}
    plan = build(graph, bind_sizes(graph, feeds), CudaCapabilities(), Constants())
    assert Counter(step.op.name for step in plan.steps)["Norm"] == NORMS[name]
    assert copies(plan) == copies(build(whole, plan.sizes, CudaCapabilities(), Constants()))
    (got,) = execute(hopper, plan, feeds).values()
    want = data["out_0"].astype(np.float64)
    assert np.linalg.norm(got - want) <= (5e-3 if dtype is F16 else 4e-2) * np.linalg.norm(want)


def test_what_is_not_finite_stays_in_its_rows(hopper: Runner) -> None:
    for tile in (STAGED_TILES[0], STAGED_TILES[3], PRODUCT_TILES[1]):
        step = factors_step(200, 200, 136, "bias", F16, True)
        x = np.random.default_rng(0).standard_normal((200, 136)).astype(np.float16)
        arrays = [x, *(content(tensor) if is_constant(tensor) else None for tensor in step.inputs[1:])]
        arrays[2] = factors_of(x)
        launches = launched(step, tile, hopper.context)
        assert all(hopper.prepare(one.kernel) is None for one in launches)
        clean = hopper.run(step, launches, [array for array in arrays if array is not None])
        for row, value in ((3, np.nan), (70, np.inf), (199, -np.inf)):
            x[row, row % 136] = value
        arrays[2] = factors_of(x)
        got = hopper.run(step, launches, [array for array in arrays if array is not None])
        others = np.delete(np.arange(200), [3, 70, 199])
        for result, before in zip(got, clean, strict=True):
            assert np.isnan(result[[3, 70, 199]]).all()
            assert np.array_equal(result[others], before[others])


def test_only_tiles_of_wgmma_divide_rows() -> None:
    for m, n, k in ((1, 64, 64), (8, 2304, 768), (8192, 768, 768), (5000, 96, 32)):
        product, epilogue = parts(divided_step(m, n, k, "bias"))
        assert all(isinstance(ranked.tile, WgmmaTile) for ranked in ranked_tiles(product, HOPPER))
        assert isinstance(pick_tile(product, epilogue, HOPPER), WgmmaTile)
        assert tile_of(choice_of(MMA_TILES[0], 1.0), product, Operands.HALF) is None
        assert tile_of({"kernel": "stream", "us": 1.0}, product, Operands.HALF) is None
        whole = replace(product, divisors=None)
        operands = operands_of(product, HOPPER)
        assert key_of(product, operands, epilogue) != key_of(whole, operands, epilogue)


def parts(step: Step) -> tuple[Product, Functor]:
    found = parts_of(step, HOPPER)
    assert found is not None
    return found


def test_tiles_that_find_moments_are_preferred() -> None:
    """To a launch behind another one, where results have aligned rows."""
    for step in (factors_step(8192, 768, 768, "residual"), factors_step(500, 768, 768, "residual")):
        product, epilogue = parts(step)
        tile = pick_tile(product, epilogue, HOPPER)
        assert isinstance(tile, WgmmaTile)
        assert tile.finds_moments
    product, epilogue = parts(factors_step(300, 36, 64, "bias"))
    assert len(launches_of(product, epilogue, pick_tile(product, epilogue, HOPPER), HOPPER)) == 2


def test_computed_weights_and_fp32_are_refused() -> None:
    for dtype, b in ((F16, (F16, (64, 32))), (F32, weight(64, 32, dtype=F32))):
        with pytest.raises(UnsupportedOp, match="divided rows"):
            make_step(Gemm((ACC,), divided=True), [(dtype, (9, 64)), b, (F32, (9, 1))])
    with pytest.raises(UnsupportedOp, match="RowFactors of f32"):
        make_step(RowFactors(EPSILON), [(F32, (9, 64))])
