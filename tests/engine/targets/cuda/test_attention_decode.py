"""Attention of few queries over many keys against float64, undivided and in parts (conftest.py says on what)."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Attention
from engine.plan.plan import Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.attention import lower
from engine.targets.cuda.attention_decode import bias_of, heads_together, launch_attention, suits, work_of
from engine.targets.cuda.attention_decode_tiles import MOST_SPLITS, cycles, pick_splits, tile_of
from engine.targets.cuda.attention_operands import BiasKind
from engine.targets.cuda.covering import ACC, F16, F32, make_step
from engine.targets.cuda.kernel import Context, Launch, WeightStore, ceildiv
from tests.engine.targets.cuda.attention_cases import ROUNDING, operand, result
from tests.engine.targets.cuda.cases import check, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner

KINDS = {"f16": F16, "bf16": DType.BF16}
HEADS = (8, 32, 40, 64, 80, 96, 128, 136, 192, 256)
BF16 = DType.BF16


def launches(step: Step, context: Context, splits: int | None = None) -> list[Launch]:
    work = work_of(step)
    tile = tile_of(work)
    most = min(MOST_SPLITS, ceildiv(work.keys, tile.keys))
    chosen = pick_splits(tile, work, context.multiprocessors) if splits is None else min(splits, most)
    return launch_attention(step, tile, chosen)


def random_bias(rng: np.random.Generator, scores: tuple[int, ...]) -> np.ndarray:
    """Of any shape that broadcasts to the scores; it may hide whole tiles at an end of the keys, or amid them."""
    shape = tuple(size if rng.random() < 0.6 else 1 for size in scores[:-1]) + scores[-1:]
    lowest = (-np.inf, -1e4, -65504.0)[int(rng.integers(0, 3))]
    bias = np.where(rng.random(shape) < 0.3, lowest, rng.standard_normal(shape))
    keys, kept = scores[-1], int(rng.integers(0, scores[-1]))
    position = np.arange(keys)
    hidden = (position < kept, position > kept, np.abs(position - kept) > keys // 5)[int(rng.integers(0, 3))]
    if rng.random() < 0.7:
        bias[..., hidden] = lowest
    bias[..., kept] = 0.0  # no row is empty: a separate test has those
    return bias.astype((F16 if rng.random() < 0.5 else F32).numpy)


def random_case(rng: np.random.Generator, kind: str, context: Context, i: int) -> Case:
    dtype = KINDS[kind]
    head, value = (int(rng.choice(HEADS)) for _ in range(2))
    value = head if rng.random() < 0.5 else value
    keys, queries = ragged(rng, 900), int(rng.choice([1, 1, 2, 4, 5, 16, 64]))
    batch, kv_heads = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    lead = [[batch], [batch], [batch]]
    if i % 4 == 1:
        lead[int(rng.integers(0, 3))] = [1]  # broadcast over the batch
    heads = kv_heads * int(rng.choice([1, 2, 4, 6]))
    if i % 5:
        lead = [[*lead[0], heads], [*lead[1], kv_heads], [*lead[2], kv_heads]]
    shapes = [(*lead[0], queries, head), (*lead[1], keys, head), (*lead[2], keys, value)]
    inputs: list[cv.Given] = [operand(rng, n, dtype, shape) for n, shape in enumerate(shapes)]
    out = (max(part[0] for part in lead), *lead[0][1:], queries, value)
    causal = rng.random() < 0.2
    feeds: dict[int, np.ndarray] = {}
    if i % 3:
        feeds[3] = random_bias(rng, (*out[:-1], keys))
        if causal:
            feeds[3][..., 0] = 0.0
        inputs.append((DType.of(feeds[3].dtype), feeds[3].shape))
    stores: tuple[ex.Expr, ...] = (cv.stored(ACC, dtype),)
    if i % 7 == 3:  # an epilogue that reads, and two results
        inputs.append((F32, out))
        stores = (cv.stored(cv.add(ACC, cv.arg(len(inputs) - 1, F32)), dtype), ACC)
    op = Attention(head**-0.5, causal, 3 in feeds, bool(rng.random() < 0.3), stores)
    step = result(rng, make_step(op, inputs))
    assert suits(step)
    splits = (1, 2, 3, 64)[i % 4]
    label = f"{kind} {shapes} bias={feeds[3].shape if 3 in feeds else None} {causal=} {splits=}"
    return Case(label, step, keys + head, feeds, launches(step, context, splits), ROUNDING[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_few_queries_match_float64(hopper: Runner, count: int, kind: str) -> None:
    rng = rng_of(f"decode {kind}")
    check(hopper, [random_case(rng, kind, hopper.context, i) for i in range(2 * count)])


def test_rings_wrap_around_and_heads_share_tiles(hopper: Runner) -> None:
    """More tiles of keys than a ring has, for every width; the heads that share keys are one tile, or several."""
    cases = []
    for head, heads, kv_heads, queries in (
        (32, 4, 1, 1),
        (64, 3, 3, 2),
        (80, 6, 1, 16),
        (128, 8, 2, 4),
        (256, 2, 2, 1),
    ):
        q: tuple[DType, tuple[int, ...]] = (F16, (2, heads, queries, head))
        k: tuple[DType, tuple[int, ...]] = (F16, (2, kv_heads, 2000 if head < 128 else 1000, head))
        step = make_step(Attention(head**-0.5, stores=(cv.stored(ACC),)), [q, k, k])
        cases += [
            Case(f"{head} {splits}", step, 2000, lowered=launches(step, hopper.context, splits))
            for splits in (1, 3, None)
        ]
    check(hopper, cases)


def test_rows_without_keys_in_parts(hopper: Runner) -> None:
    """NaN or zeros by −∞; uniform by an exporter's finite minimum. Of one row, and of all rows of a head."""
    cases = []
    for zero, lowest, splits, rows in product(
        (False, True), (-np.inf, float(np.finfo(np.float32).min)), (1, 3), (1, 4)
    ):
        q: tuple[DType, tuple[int, ...]] = (F16, (2, 4, 4, 64))
        k: tuple[DType, tuple[int, ...]] = (F16, (2, 2, 700, 64))
        bias = np.zeros((2, 1, rows, 700), np.float32)
        bias[1, :, rows // 2 :] = lowest
        op = Attention(0.2, False, True, zero, (cv.stored(ACC),))
        step = make_step(op, [q, k, k, (F32, bias.shape)])
        lowered = launches(step, hopper.context, splits)
        cases.append(Case(f"{zero} {lowest} {splits} {rows}", step, 700, {3: bias}, lowered))
    check(hopper, cases)


def test_hidden_tiles_are_not_read(hopper: Runner) -> None:
    """Padding before and behind the keys, by −∞ and by finite minima: not even NaN in it reaches the result."""
    q: tuple[DType, tuple[int, ...]] = (F16, (2, 2, 1, 64))
    k: tuple[DType, tuple[int, ...]] = (F16, (2, 2, 1200, 64))
    op = Attention(0.2, False, True, stores=(cv.stored(ACC),))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float16) for shape in (q[1], k[1], k[1])]
    for lowest, splits in product((-np.inf, -1e4, float(np.finfo(np.float32).min)), (1, 4)):
        bias = np.zeros((2, 1, 1, 1200), np.float32)
        bias[0, ..., 300:], bias[1, ..., :900] = lowest, lowest
        step = make_step(op, [q, k, k, (F32, bias.shape)])
        lowered = launches(step, hopper.context, splits)
        (want,) = hopper.run(step, lowered, [*arrays, bias])
        dirty = [array.copy() for array in arrays]
        for array in dirty[1:]:
            array[0, :, 384:], array[1, :, :896] = np.nan, np.nan  # tiles of 128 keys
        (got,) = hopper.run(step, lowered, [*dirty, bias])
        assert np.isfinite(want).all() and np.array_equal(got, want), (lowest, splits)


def test_threads_in_any_order(hopper: Runner) -> None:
    if not hasattr(hopper, "in_reverse"):
        pytest.skip("a GPU has an order of its own")
    rng = rng_of("reverse")
    with hopper.in_reverse():
        check(hopper, [random_case(rng, "f16", hopper.context, i) for i in range(4)])


def decoder(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, head: int, bias: tuple[int, ...] = ()
) -> Step:
    q: tuple[DType, tuple[int, ...]] = (F16, (batch, heads, queries, head))
    k: tuple[DType, tuple[int, ...]] = (F16, (batch, kv_heads, keys, head))
    op = Attention(head**-0.5, has_bias=bool(bias), stores=(cv.stored(ACC),))
    return make_step(op, [q, k, k, *([(F32, bias)] if bias else [])])


HOPPER = Context(SM_90A, 132, WeightStore())


def body_of(step: Step) -> str:
    source = lower(step, HOPPER)[0].kernel.source.text
    bodies = ("attention_decode", "attention_wgmma", "attention_mma")
    return next(body for body in bodies if f'"{body}.cuh"' in source)


def test_heads_that_share_keys_fill_a_tile() -> None:
    assert heads_together(decoder(1, 32, 8, 1, 100, 128)) == 4
    assert heads_together(decoder(1, 32, 1, 16, 100, 128)) == 4
    assert heads_together(decoder(1, 12, 1, 9, 100, 128)) == 6
    assert heads_together(decoder(1, 32, 1, 64, 100, 128)) == 1
    work = work_of(decoder(2, 32, 1, 4, 100, 128))
    assert (work.tiles, work.rows, work.shared_by) == (2 * 2, 64, 2)


def test_a_bias_by_key_is_alike_for_all_rows() -> None:
    assert bias_of(decoder(2, 8, 2, 1, 100, 64, (2, 1, 1, 100))) is BiasKind.PER_KEY
    assert bias_of(decoder(2, 8, 2, 1, 100, 64, (1, 8, 1, 100))) is BiasKind.FULL
    assert bias_of(decoder(2, 8, 8, 1, 100, 64, (1, 8, 1, 100))) is BiasKind.PER_KEY
    assert bias_of(decoder(2, 8, 8, 4, 100, 64, (1, 1, 4, 100))) is BiasKind.FULL


def test_few_blocks_divide_keys_and_many_do_not() -> None:
    def splits(*sizes: int) -> int:
        work = work_of(decoder(*sizes))
        return pick_splits(tile_of(work), work, 132)

    assert splits(1, 32, 8, 1, 32768, 128) >= 16
    assert splits(1, 32, 8, 1, 64, 128) == 1
    assert splits(128, 32, 32, 1, 2048, 64) == 1


@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("queries", [1, 4, 16])
def test_long_keys_are_expected_near_the_time_of_their_bytes(queries: int, head: int) -> None:
    """Of 100 MB and more the model expects at most a quarter beside what memory takes."""
    for batch, keys in ((1, 32768), (8, 8192), (32, 2048)):
        work = work_of(decoder(batch, 32, 8 if head == 128 else 32, queries, keys, head))
        tile = tile_of(work)
        floor = batch * keys * (8 if head == 128 else 32) * work.key_bytes / (132 * 13)
        assert cycles(tile, pick_splits(tile, work, 132), work, 132) < 1.25 * floor + 5000


def test_the_kernel_is_chosen_by_its_estimated_time() -> None:
    assert body_of(decoder(1, 32, 8, 1, 8192, 128)) == "attention_decode"
    assert body_of(decoder(32, 32, 8, 16, 2048, 128)) == "attention_decode"
    assert body_of(decoder(8, 32, 32, 4, 8192, 64)) == "attention_decode"
    assert body_of(decoder(1, 16, 16, 64, 32768, 128)) == "attention_decode"
    assert body_of(decoder(1, 12, 12, 64, 64, 64)) == "attention_wgmma"
    assert body_of(decoder(1, 12, 12, 1, 64, 64)) == "attention_mma"
    assert body_of(decoder(1, 16, 16, 4096, 4096, 128)) == "attention_wgmma"


def test_what_the_kernel_cannot_read_is_left_to_others() -> None:
    def given(head: int, queries: int = 1, dtype: DType = F16, scale: float = 1.0, gap: int = 0) -> bool:
        rng = np.random.default_rng(0)
        q: Tensor = operand(rng, 0, dtype, (2, 4, queries, head), odd=gap > 0)
        inputs: list[cv.Given] = [q, (dtype, (2, 4, 100, head)), (dtype, (2, 4, 100, head))]
        return suits(make_step(Attention(scale, stores=(cv.stored(ACC, dtype),)), inputs))

    assert given(64) and given(256, queries=64) and given(64, dtype=BF16)
    assert not given(63) and not given(264) and not given(64, queries=65)
    assert not given(64, dtype=F32) and not given(64, scale=-1.0)
