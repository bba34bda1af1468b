"""Products that normalise the residual which they add, against float64: in every kernel, beside moments of their own
rows, and layer after layer as in Transformers whose norms come after the residuals."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest

from engine import frontend, passes
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Attention, Gemm, Norm, RowFactors
from engine.plan.build import Constants, build
from engine.plan.plan import Step
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.choices import choice_of
from engine.targets.cuda.covering import ACC, F16, F32, Given, make_step, weight
from engine.targets.cuda.families import traits_of
from engine.targets.cuda.gemm import (
    estimated_best,
    found_apart,
    key_of,
    needs_staged,
    operands_of,
    parts_of,
    pick_tile,
    ranked_in,
)
from engine.targets.cuda.gemm_rows import MOST_ROWS, ROWS_TILES, AnyTile, RowsTile
from engine.targets.cuda.gemm_stream import stream_tiles
from engine.targets.cuda.kernel import Functor
from engine.targets.cuda.product import Product
from engine.targets.cuda.product_cost import Way
from engine.targets.cuda.tiles import CLUSTER_TILES, MMA_TILES, PRODUCT_TILES, STAGED_TILES, Operands, WgmmaTile
from tests.engine.targets.cuda.cases import check, check_late, ragged, rng_of, wiped
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.planning import CudaCapabilities, copies
from tests.engine.targets.cuda.test_gemm_divided import (
    BF16,
    EPSILON,
    FIXTURES,
    HOPPER,
    ROUNDED,
    launched,
    planned,
    rows_far_from_zero,
)
from tests.engine.targets.cuda.test_packed_models import execute

EXECUTED = [
    ("bert_legacy", F16), ("distilbert-sdpa-optimum-14", BF16), ("roberta-eager-legacy-13", F16),
    ("albert-sdpa-legacy-14", BF16), ("torch_encoder-eager-dynamo-18", F16),
]  # fmt: skip
"""Post-norm Transformers of two layers, so that three norms in turn are part of products."""


def normalising_step(
    m: int, n: int, k: int, dtype: DType = F16, *, bias: bool = True, finds: bool = False, batch: tuple[int, ...] = ()
) -> Step:
    """A product that adds rows, normalised by their factors and offsets and scaled, to its own, as the pass
    `divide_rows` makes it; with `finds` it leaves the factors and offsets of its result."""
    centred = ex.apply(PointOp.SUB, cv.mul(cv.arg(2, dtype), ex.Arg(3, F32)), ex.Arg(4, F32))
    total = cv.add(ACC, ex.Arg(6, F32)) if bias else ACC
    store = cv.stored(cv.add(total, cv.mul(ex.Arg(5, F32), centred)), dtype)
    rows = (*batch, m, 1)
    inputs: list[Given] = [(dtype, (*batch, m, k)), weight(k, n, dtype=dtype), (dtype, (*batch, m, n)), (F32, rows),
                           (F32, rows), weight(n, dtype=F32) * 20]  # fmt: skip
    # Offsets are found to what rounding moves means by, in deviations: so these lie far from zero.
    inputs += [weight(n, dtype=F32) * 20 + np.float32(4)] if bias else []
    return make_step(Gemm((store,), factors=EPSILON if finds else None, offsets=finds), inputs)


def fed_rows(rng: np.random.Generator, step: Step) -> dict[int, np.ndarray]:
    """What such a product is fed: rows to normalise, some far from zero, and their factors and offsets."""
    x = step.inputs[2]
    rows = rows_far_from_zero(rng, prod(x.shape[:-1]), x.shape[-1], x.dtype).reshape(x.shape)
    wide = rows.astype(np.float64)
    factors = 1 / np.sqrt(wide.var(axis=-1, keepdims=True) + EPSILON)
    offsets = factors * wide.mean(axis=-1, keepdims=True)
    return {2: rows, 3: factors.astype(np.float32), 4: offsets.astype(np.float32)}


def case(runner: Runner, rng: np.random.Generator, tile: AnyTile, step: Step) -> Case:
    """Run twice with the factors wiped in between, where it finds some."""
    (*_, k), dtype = step.inputs[0].shape, step.inputs[0].dtype
    launches = launched(step, tile, runner.context)
    if len(step.outputs) > 1:
        wipes = [launch for tensor in step.outputs[1:] for launch in wiped(tensor, runner.context)]
        launches = [*launches, *wipes, *launches]
    label = f"{dtype.value} {step.inputs[0].shape} x {step.inputs[1].shape[-1]} {len(step.outputs)} results {tile}"
    return Case(label, step, k, fed_rows(rng, step), launches, ROUNDED[dtype])


def test_products_normalise_what_they_add(hopper: Runner, count: int) -> None:
    """In tiles of every form, ragged, with and without a bias."""
    rng, cases = rng_of("normalising"), []
    forms = [*PRODUCT_TILES, *STAGED_TILES, *CLUSTER_TILES]
    for i in range(3 * count):
        tile, dtype = forms[(7 * i) % len(forms)], (F16, BF16)[int(rng.integers(0, 2))]
        tile = replace(tile, splits=2) if tile.most_splits > 1 and i % 2 else tile
        # A single row is staged by no tile: what it reads is the same in every row. Of few columns the deviation can be
        # so small beside the mean that fp32, in which the reference rounds x · r, leaves little of x · r − o.
        m, n, k = 1 + ragged(rng, 300), 8 + ragged(rng, 300, 8 if needs_staged(tile) else 1), ragged(rng, 600, 8)
        cases.append(case(hopper, rng, tile, normalising_step(m, n, k, dtype, bias=i % 4 > 0)))
    check(hopper, cases)


def test_other_kernels_normalise_in_their_epilogue(hopper: Runner, count: int) -> None:
    """Tiles of mma.sync, those for few rows and slices of rows; whole and split, rows of several matrices."""
    rng, cases = rng_of("elsewhere"), []
    tiles = [MMA_TILES[3], replace(MMA_TILES[4], splits=3), ROWS_TILES[0], replace(ROWS_TILES[2], splits=2)]
    for i in range(2 * count):
        tile, dtype = tiles[i % len(tiles)], (F16, BF16)[int(rng.integers(0, 2))]
        most, batch = (MOST_ROWS // 2 if isinstance(tile, RowsTile) else 100), (2,) * (i // len(tiles) % 2)
        m, n, k = ragged(rng, most), 8 + ragged(rng, 200), 256 + ragged(rng, 1500, 8)
        cases.append(case(hopper, rng, tile, normalising_step(m, n, k, dtype, batch=batch, finds=i % 3 == 0)))
    step = normalising_step(400, 72, 32)
    slices = stream_tiles(parts(step)[0], Operands.HALF)[0]
    cases.append(case(hopper, rng, slices, step))
    check(hopper, cases)


def test_products_find_factors_and_offsets_beside(hopper: Runner, count: int) -> None:
    """In one launch; warps that come late."""
    rng, cases = rng_of("beside"), []
    tiles = [tile for tile in (*STAGED_TILES, *CLUSTER_TILES) if tile.finds_moments]
    for i in range(2 * count):
        tile, dtype = tiles[(5 * i) % len(tiles)], (F16, BF16)[int(rng.integers(0, 2))]
        # Factors are of rows before they are rounded: over a few columns far from zero not those of what is stored.
        m, n, k = 1 + ragged(rng, 400), max(64, ragged(rng, 400, 8)), ragged(rng, 300, 8)
        step = normalising_step(m, n, k, dtype, finds=True)
        assert len(launched(step, tile, hopper.context)) == 1
        cases.append(case(hopper, rng, tile, step))
    many = normalising_step(420, 264, 392, finds=True)  # more tiles than multiprocessors, more steps than stages
    check_late(hopper, [*cases, case(hopper, rng, STAGED_TILES[4], many)])


def test_a_node_of_its_own_has_offsets_too(runner: Runner, count: int) -> None:
    rng, cases = rng_of("offsets"), []
    for i in range(2 * count):
        dtype, rows, columns = (F16, BF16)[i % 2], ragged(rng, 400), 2 + ragged(rng, 900, 8 if i % 3 else 1)
        step = make_step(RowFactors(EPSILON, offsets=True), [(dtype, (rows, columns))])
        x = rows_far_from_zero(rng, rows, columns, dtype)
        # Offsets are as exact as rows are far from zero, in deviations: not to their own last bits where all are near
        # it. And what is far larger than the other factors would hide their errors.
        x[rows // 2] = 3 + rng.standard_normal(columns)
        cases.append(Case(f"{dtype.value} {rows}x{columns}", step, columns, {0: x}, rounding=0.0))
    check(runner, cases)


@pytest.mark.parametrize(("name", "dtype"), EXECUTED)
def test_post_norm_transformers_match_their_graphs(hopper: Runner, name: str, dtype: DType) -> None:
    """All steps one after the other, and as near to the reference as with norms of their own."""
    plan, feeds, want = planned(name, dtype)
    first = next(iter(plan.outputs))
    got = execute(hopper, plan, feeds)[first]
    assert sum(isinstance(step.op, Gemm) and step.op.offsets for step in plan.steps) == 3
    assert np.linalg.norm(got - want) <= (5e-3 if dtype is F16 else 4e-2) * np.linalg.norm(want)


@pytest.mark.parametrize("name", sorted({name for name, _ in EXECUTED} | {"bert_sentence-sdpa-dynamo-18"}))
def test_layers_of_post_norm_transformers_are_five_steps(name: str) -> None:
    """Between two attentions: out-projection, two layers of the feed-forward, and the next projection; no copies."""
    plan, _, _ = planned(name, F16)
    places = [i for i, step in enumerate(plan.steps) if isinstance(step.op, Attention)]
    layer = [step.op for step in plan.steps[places[0] + 1 : places[1]]]
    assert [type(op) for op in layer] == [Gemm] * 4
    assert [op.offsets for op in layer if isinstance(op, Gemm)] == [True, False, True, False]
    assert [op.divided for op in layer if isinstance(op, Gemm)] == [False, True, False, True]
    whole = passes.run(frontend.read(FIXTURES / f"{name}.onnx"), replace(traits_of(SM_90A), divided_rows=False))
    with_norms = build(whole, plan.sizes, CudaCapabilities(), Constants())
    kinds, before = Counter(type(step.op) for step in plan.steps), Counter(type(step.op) for step in with_norms.steps)
    assert before[Norm] - kinds[Norm] == before.total() - kinds.total() == 3
    assert copies(plan) == copies(with_norms)


def test_minilm_keeps_its_first_and_last_norm(all_minilm_l6_v2: Path) -> None:
    graph = passes.run(frontend.read(all_minilm_l6_v2 / "1" / "model.onnx"), traits_of(SM_90A))
    plan = build(graph, {"batch": 32, "sequence": 128}, CudaCapabilities(), Constants())
    kinds = Counter(type(step.op) for step in plan.steps)
    assert (kinds[Gemm], kinds[Attention], kinds[Norm], kinds[RowFactors]) == (24, 6, 2, 0)


def parts(step: Step) -> tuple[Product, Functor]:
    found = parts_of(step, HOPPER)
    assert found is not None
    return found


def test_factors_are_found_where_that_should_be_the_fastest() -> None:
    """In every staged tile there are registers for it; of few rows the best tile is none."""
    for m, n, k, beside in ((16384, 768, 768, True), (4096, 384, 1536, True), (128, 768, 768, False)):
        product, epilogue = parts(normalising_step(m, n, k, finds=True))
        ranked = ranked_in(Way.STAGED, product, epilogue, HOPPER)
        assert {one.tile for one in ranked} == set(STAGED_TILES)
        assert not any(found_apart(product, one.tile) for one in ranked)
        best = estimated_best(product, epilogue, HOPPER)
        assert (found_apart(product, best.tile) is None) == beside
        plain, _ = parts(normalising_step(m, n, k))
        assert key_of(product, Operands.HALF, epilogue) != key_of(plain, Operands.HALF, epilogue)


def test_which_epilogues_read_operands_of_rows_staged() -> None:
    """A residual and its factor and offset beside a scale and a bias; nothing longer, nor where rows are divided."""
    step = normalising_step(300, 96, 64)
    assert parts(step)[1].staged.reads_rows
    op = step.op
    assert isinstance(op, Gemm)
    (store,) = op.stores
    (total,) = store.args
    longer = make_step(Gemm((cv.stored(cv.gelu(total)),)), step.inputs)
    assert parts(longer)[1].staged is None
    alone = cv.stored(cv.add(cv.mul(ACC, ex.Arg(2, F32)), ex.Arg(3, F32)))
    rows = [(F16, (300, 64)), weight(64, 96), (F32, (300, 1)), (F32, (300, 1))]
    assert parts(make_step(Gemm((alone,)), rows))[1].staged is None
    shifted = {i: i + 1 for i in range(2, 7)}
    divided = Gemm((ex.renumber(store, shifted),), divided=True)
    inputs = [*step.inputs[:2], (F32, (300, 1)), *step.inputs[2:]]
    product, epilogue = parts(make_step(divided, inputs))
    assert epilogue.staged is None
    # A choice that was kept for such a tile is not taken.
    key, tile = key_of(product, operands_of(product, HOPPER), epilogue), STAGED_TILES[1]
    assert isinstance(tile, WgmmaTile)
    assert pick_tile(product, epilogue, replace(HOPPER, choices={key: choice_of(tile, 1.0)})) != tile
