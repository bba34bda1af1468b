"""Attention on warpgroups against float64: every tile, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from engine.ir.dtype import DType
from engine.ir.ops import Attention
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.attention import lower
from engine.targets.cuda.attention_wgmma import launch_attention, pick, suits, work_of
from engine.targets.cuda.attention_wgmma_tiles import candidates, cycles
from engine.targets.cuda.covering import ACC, F16, F32, make_step
from engine.targets.cuda.kernel import Context, Instruction, WeightStore, workspace
from tests.engine.targets.cuda.attention_cases import ROUNDING, operand, result
from tests.engine.targets.cuda.cases import check, ragged, rng_of, thinned
from tests.engine.targets.cuda.harness import Case, Runner

KINDS = {"f16": F16, "bf16": DType.BF16}
HEADS = (8, 32, 40, 48, 64, 72, 80, 96, 104, 128, 144, 192, 200, 256)


def random_case(rng: np.random.Generator, kind: str, context: Context, i: int) -> Case:
    dtype = KINDS[kind]
    head, value = (int(rng.choice(HEADS)) for _ in range(2))
    value = head if rng.random() < 0.5 else value
    queries, keys = ragged(rng, 400), ragged(rng, 600)
    batch, kv_heads = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    lead = [[batch], [batch], [batch]]
    if i % 4 == 1:
        lead[int(rng.integers(0, 3))] = [1]  # broadcast over the batch
    heads = kv_heads * int(rng.choice([1, 1, 2, 3]))
    if i % 5:
        lead = [[*lead[0], heads], [*lead[1], kv_heads], [*lead[2], kv_heads]]
    shapes = [(*lead[0], queries, head), (*lead[1], keys, head), (*lead[2], keys, value)]
    inputs: list[cv.Given] = [operand(rng, n, dtype, shape) for n, shape in enumerate(shapes)]
    out = (max(part[0] for part in lead), *lead[0][1:], queries, value)
    feeds: dict[int, np.ndarray] = {}
    if i % 2:
        # Of every row some keys stay, as far as the causal mask lets them.
        shape = (*(size if rng.random() < 0.5 else 1 for size in out[:-2]), 1, keys)
        bias = np.where(rng.random(shape) < 0.4, -np.inf if i % 3 else -1e4, rng.standard_normal(shape))
        bias[..., 0] = 0.0
        feeds[3] = bias.astype((F16 if i % 4 < 2 else F32).numpy)
        inputs.append((DType.of(feeds[3].dtype), shape))
    op = Attention(head**-0.5, bool(rng.random() < 0.4), i % 2 == 1, bool(rng.random() < 0.3), (cv.stored(ACC, dtype),))
    step = result(rng, make_step(op, inputs))
    tiles = candidates(work_of(step))
    launches = [launch_attention(step, tiles[i % len(tiles)], context)]
    return Case(
        f"{kind} {shapes} {op.causal=} {tiles[i % len(tiles)]}", step, keys + head, feeds, launches, ROUNDING[kind]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_attention_on_warpgroups_matches_float64(hopper: Runner, count: int, kind: str) -> None:
    rng = rng_of(f"wgmma {kind}")
    check(hopper, [random_case(rng, kind, hopper.context, i) for i in range(count)])


def test_rings_wrap_around(hopper: Runner, count: int) -> None:
    """More tiles of queries than blocks, more tiles of keys than a ring has, and warpgroups without queries."""
    context = replace(hopper.context, multiprocessors=3)
    cases = []
    for head, causal in ((32, False), (64, True), (64, False), (80, False), (128, True), (192, False), (256, True)):
        heads: tuple[DType, tuple[int, ...]] = (F16, (1, 2, 450, head))
        step = make_step(Attention(head**-0.5, causal, stores=(cv.stored(ACC),)), [heads, heads, heads])
        for tile in thinned(hopper, candidates(work_of(step)), first=len(cases)):
            case = Case(f"{head} {causal=} {tile}", step, 450, lowered=[launch_attention(step, tile, context)])
            cases.append(case)
    check(hopper, cases)


def test_maxima_that_grow_from_tile_to_tile(hopper: Runner) -> None:
    """Scores that rise or fall along the keys, by tens or by hundreds, so that a maximum is replaced in every tile, in
    some or in none; rows whose first tiles are hidden altogether."""
    cases = []
    rng = rng_of("growth")
    for head, dtype in thinned(hopper, ((64, F16), (128, F16), (128, DType.BF16), (256, F16))):
        shape = (1, 2, 530, head)
        for i, (rises, most, biased) in enumerate(product((False, True), (30.0, 300.0), (False, True))):
            slope = np.linspace(0.0, most, 530)[:: 1 if rises else -1]
            queries = np.abs(rng.standard_normal((1, 2, 70, head))) + 0.5
            keys = 0.1 * rng.standard_normal(shape) + slope[:, None] / head
            feeds = {0: dtype.convert(queries), 1: dtype.convert(keys)}
            inputs: list[cv.Given] = [(dtype, queries.shape), (dtype, shape), (dtype, shape)]
            if biased:
                bias = np.where(rng.random((1, 2, 1, 530)) < 0.3, -np.inf, 0.0).astype(np.float32)
                bias[..., 300:] = -np.inf
                bias[..., 0] = 0.0
                feeds[3] = bias
                inputs.append((F32, bias.shape))
            step = make_step(Attention(1.0, False, biased, stores=(cv.stored(ACC, dtype),)), inputs)
            tiles = candidates(work_of(step))
            launches = [launch_attention(step, tiles[i % len(tiles)], hopper.context)]
            label = f"{head} {dtype} {rises=} {most=} {biased=} {tiles[i % len(tiles)]}"
            cases.append(Case(label, step, 530, feeds, launches, ROUNDING[dtype.value]))
    check(hopper, cases)


def test_a_launch_leaves_its_counters_as_it_found_them(hopper: Runner) -> None:
    """A second launch with the same ones, into other memory, computes every item again."""
    heads: tuple[DType, tuple[int, ...]] = (F16, (3, hopper.context.multiprocessors, 200, 32))
    op = Attention(0.2, True, stores=(cv.stored(ACC),))
    step = make_step(op, [heads, heads, heads])
    elsewhere = replace(step.outputs[0], buffer=workspace(step.outputs[0].buffer.nbytes))
    other = replace(step, outputs=(elsewhere,))
    tile = candidates(work_of(step))[0]
    first, second = (launch_attention(one, tile, hopper.context) for one in (other, step))
    assert "counters" in dict(first.arguments)
    shared = tuple((name, dict(first.arguments)[name] if name == "counters" else a) for name, a in second.arguments)
    check(hopper, [Case("again", step, 200, lowered=[first, replace(second, arguments=shared)])])


def test_tiles_without_visible_keys_are_skipped(hopper: Runner, count: int) -> None:
    """Masks with holes of whole tiles, by −∞ and by the exporters' finite minima; and what must not be skipped."""
    rng = rng_of("holes")
    keys = 520  # the last tile is short
    heads: tuple[DType, tuple[int, ...]] = (F16, (6, 2, 70, 32))
    wide: tuple[DType, tuple[int, ...]] = (F16, (6, 2, keys, 32))
    op = Attention(0.2, False, True, stores=(cv.stored(ACC),))
    cases = []
    for i, lowest in enumerate((-np.inf, float(np.finfo(np.float32).min), -65504.0, -1e4, 0.0)):
        bias = rng.standard_normal((6, 1, 1, keys)).astype(np.float32)
        position = np.arange(keys)
        bias[0, ..., position >= 130] = lowest  # a prefix
        bias[1, ..., position < 257] = lowest  # keys at the end only
        bias[2, ..., (position >= 64) & (position < 512)] = lowest  # both ends
        bias[3, ..., position != 300] = lowest  # one key
        bias[4] = (
            0.0 if lowest == -65504.0 else lowest
        )  # none, or all alike (beside −65504 fp32 rounds a score to 2^-8)
        bias[5, ..., position < 256] -= 50.0  # small beside the others, but not nothing
        step = make_step(op, [heads, wide, wide, (F32, bias.shape)])
        tiles = candidates(work_of(step))
        launches = [launch_attention(step, tiles[i % len(tiles)], hopper.context)]
        cases.append(Case(f"{lowest} {tiles[i % len(tiles)]}", step, keys, {3: bias}, launches))
    check(hopper, cases)


def test_values_of_skipped_tiles_are_not_read(hopper: Runner) -> None:
    """Where the mask hides whole tiles, not even NaN in them reaches the result."""
    shape = (2, 2, 300, 32)
    heads: tuple[DType, tuple[int, ...]] = (F16, shape)
    op = Attention(0.2, False, True, stores=(cv.stored(ACC),))
    bias = np.zeros((2, 1, 1, 300), np.float32)
    bias[..., 256:] = -np.inf
    step = make_step(op, [heads, heads, heads, (F32, bias.shape)])
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape).astype(np.float16) for _ in range(3))
    launches = [launch_attention(step, candidates(work_of(step))[0], hopper.context)]
    (want,) = hopper.run(step, launches, [q, k, v, bias])
    k[:, :, 256:], v[:, :, 256:] = np.nan, np.nan
    (got,) = hopper.run(step, launches, [q, k, v, bias])
    assert np.isfinite(want).all() and np.array_equal(got, want)


def full_bias(rng: np.random.Generator, scores: tuple[int, ...], dtype: DType) -> tuple[Tensor, np.ndarray]:
    """A bias for every score, the same for all of the batch or all heads or not, with gaps between rows."""
    lead = tuple(size if rng.random() < 0.5 else 1 for size in scores[:-2])
    shape = (*lead[int(rng.integers(0, len(lead) + 1)) :], *scores[-2:])
    chunk = 16 // dtype.itemsize
    wide = (*shape[:-1], (-(-shape[-1] // chunk) + int(rng.integers(0, 2))) * chunk)
    offset = chunk * int(rng.integers(0, 3))
    buffer = Buffer("input3", BufferKind.INPUT, (int(np.prod(wide)) + offset) * dtype.itemsize)
    order = (*(int(axis) for axis in rng.permutation(len(shape) - 1)), len(shape) - 1)
    lowest = -np.inf if rng.random() < 0.5 else -1e4
    content = np.where(rng.random(shape) < 0.3, lowest, rng.standard_normal(shape))
    content[..., 0] = 0.0
    return Tensor(buffer, dtype, shape, row_major(wide, order), offset), content.astype(dtype.numpy)


@pytest.mark.parametrize("dtype", [F16, DType.BF16, F32], ids=lambda dtype: dtype.value)
def test_full_biases_on_warpgroups_match_float64(hopper: Runner, count: int, dtype: DType) -> None:
    rng = rng_of(f"full {dtype.value}")
    cases = []
    for i in range(count):
        head, queries, keys = int(rng.choice(HEADS)), max(2, ragged(rng, 300)), ragged(rng, 500)
        batch, kv_heads = int(rng.integers(1, 4)), int(rng.integers(1, 3))
        heads = kv_heads * int(rng.choice([1, 2]))
        q, k = (batch, heads, queries, head), (batch, kv_heads, keys, head)
        bias, content = full_bias(rng, (batch, heads, queries, keys), dtype)
        op = Attention(head**-0.5, bool(rng.random() < 0.3), True, stores=(cv.stored(ACC),))
        step = result(rng, make_step(op, [operand(rng, n, F16, shape) for n, shape in enumerate((q, k, k))] + [bias]))
        tiles = candidates(work_of(step))
        launches = [launch_attention(step, tiles[i % len(tiles)], hopper.context)]
        label = f"{q} {k} {bias.shape} {op.causal=} {tiles[i % len(tiles)]}"
        cases.append(Case(label, step, keys + head, {3: content}, launches))
    check(hopper, cases)


def test_rings_of_full_biases_wrap_around(hopper: Runner) -> None:
    cases = []
    for head, dtype in ((32, F16), (64, F32), (80, F16), (128, F16), (192, F32), (256, F16)):
        heads: tuple[DType, tuple[int, ...]] = (F16, (1, 3, 344, head))
        bias: tuple[DType, tuple[int, ...]] = (dtype, (3, 344, 344))
        step = make_step(Attention(head**-0.5, False, True, stores=(cv.stored(ACC),)), [heads, heads, heads, bias])
        for tile in candidates(work_of(step)):
            launches = [launch_attention(step, tile, replace(hopper.context, multiprocessors=3))]
            cases.append(Case(f"{head} {tile}", step, 344, lowered=launches))
    check(hopper, cases)


def test_rows_that_a_full_bias_empties(hopper: Runner) -> None:
    """NaN or zeros, by −∞ alone: an exporter's finite minimum leaves a row uniform."""
    heads: tuple[DType, tuple[int, ...]] = (F16, (2, 2, 72, 64))
    cases = []
    for zero, dtype in product((False, True), (F16, DType.BF16, F32)):
        op = Attention(0.2, False, True, zero, (cv.stored(ACC),))
        for lowest in (-np.inf, float(np.finfo(np.float32).min)) if dtype is not F16 else (-np.inf,):
            bias = np.zeros((2, 1, 72, 72), np.float32)
            bias[1, :, 36:] = lowest
            bias[0, :, 5] = lowest
            if dtype is DType.BF16:
                bias = np.maximum(bias, -3.3e38) if np.isfinite(lowest) else bias
            step = make_step(op, [heads, heads, heads, (dtype, bias.shape)])
            launches = [launch_attention(step, pick(step, hopper.context), hopper.context)]
            cases.append(Case(f"{zero} {dtype} {lowest}", step, 72, {3: bias.astype(dtype.numpy)}, launches))
    check(hopper, cases)


def test_rows_without_keys_on_warpgroups(hopper: Runner, count: int) -> None:
    cases = []
    for zero, head in product((False, True), (32, 80, 256)):
        heads: tuple[DType, tuple[int, ...]] = (F16, (2, 2, 70, head))
        op = Attention(0.2, False, True, zero, (cv.stored(ACC),))
        for lowest in (-np.inf, float(np.finfo(np.float32).min)):
            bias = np.zeros((2, 1, 1, 70), np.float32)
            bias[1] = lowest
            step = make_step(op, [heads, heads, heads, (F32, bias.shape)])
            launches = [launch_attention(step, pick(step, hopper.context), hopper.context)]
            cases.append(Case(f"{zero} {lowest} {head}", step, 70, {3: bias}, launches))
    check(hopper, cases)


def test_what_the_copy_engine_cannot_read_is_left_to_the_portable_kernel() -> None:
    context = Context(SM_90A, 132, WeightStore())

    def instruction(inputs: list[cv.Given], scale: float = 1.0, has_bias: bool = False) -> Instruction:
        step = make_step(Attention(scale, False, has_bias, stores=(cv.stored(ACC),)), inputs)
        (launch,) = lower(step, context)
        assert (launch.kernel.instruction is Instruction.WGMMA) == suits(step)
        return launch.kernel.instruction

    heads: tuple[DType, tuple[int, ...]] = (F16, (2, 3, 100, 64))
    assert instruction([heads] * 3) is Instruction.WGMMA
    assert instruction([heads] * 3 + [(F32, (2, 1, 1, 100))], has_bias=True) is Instruction.WGMMA
    assert instruction([heads] * 3 + [(F32, (100, 100))], has_bias=True) is Instruction.WGMMA
    assert instruction([heads] * 3 + [(F16, (100, 100))], has_bias=True) is Instruction.MMA
    assert instruction([heads] * 3 + [(F32, (3, 100, 1))], has_bias=True) is Instruction.MMA
    assert instruction([(F16, (2, 3, 100, 63))] * 3) is Instruction.MMA
    assert instruction([(F16, (2, 3, 100, 256))] * 3) is Instruction.WGMMA
    assert instruction([(F16, (2, 3, 100, 264))] * 3) is Instruction.MMA
    assert instruction([(F16, (2, 3, 1, 64)), heads, heads]) is Instruction.MMA
    assert instruction([heads] * 3, scale=-1.0) is Instruction.MMA
    buffer = Buffer("input0", BufferKind.INPUT, 2 * 2 * 3 * 100 * 64 + 8)
    off = Tensor(buffer, F16, heads[1], (3 * 6400, 6400, 64, 1), 4)
    assert instruction([off, heads, heads]) is Instruction.MMA
    shared = replace(off, strides=(0, 6400, 64, 1), offset=0)  # one of the batch, repeated
    assert instruction([shared, heads, heads]) is Instruction.MMA


def windowed(rng: np.random.Generator, i: int) -> tuple[Step, dict[int, np.ndarray]]:
    """A step in a window of any size, causal or to both sides, without a bias, with one by key, or a full one."""
    head, queries, keys = int(rng.choice(HEADS)), max(17, ragged(rng, 500)), ragged(rng, 700)
    keys = keys if i % 3 == 0 else queries
    batch, kv_heads = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    heads = kv_heads * int(rng.choice([1, 2]))
    inputs: list[cv.Given] = [
        operand(rng, n, F16, shape)
        for n, shape in enumerate(((batch, heads, queries, head), *[(batch, kv_heads, keys, head)] * 2))
    ]
    feeds: dict[int, np.ndarray] = {}
    if i % 4 == 1:
        feeds[3] = rng.standard_normal((batch, 1, 1, keys)).astype(np.float32)
        inputs.append((F32, feeds[3].shape))
    elif i % 4 == 3:
        bias, feeds[3] = full_bias(rng, (batch, heads, queries, keys), F16)
        inputs.append(bias)
    window = max(1, ragged(rng, 400))
    op = Attention(head**-0.5, bool(i % 2), i % 2 == 1, True, (cv.stored(ACC),), window=window)
    return result(rng, make_step(op, inputs)), feeds


def test_windows_on_warpgroups_match_float64(hopper: Runner, count: int) -> None:
    """Also queries that see no key, where there are fewer keys."""
    rng = rng_of("windows")
    cases = []
    for i in range(2 * count):
        step, feeds = windowed(rng, i)
        tiles = candidates(work_of(step))
        launches = [launch_attention(step, tiles[i % len(tiles)], hopper.context)]
        shapes = " ".join(str(tensor.shape) for tensor in step.inputs)
        cases.append(Case(f"{shapes} {step.op} {tiles[i % len(tiles)]}", step, 700, feeds, launches))
    check(hopper, cases)


def test_rings_wrap_around_in_windows(hopper: Runner) -> None:
    """Many items a block, every tile; windows that end within a warpgroup's tile of keys and beyond the keys."""
    context = replace(hopper.context, multiprocessors=5)
    cases = []
    for head, causal, window in ((32, True, 100), (64, False, 65), (80, True, 1), (128, True, 128), (256, False, 600)):
        heads: tuple[DType, tuple[int, ...]] = (F16, (1, 4, 450, head))
        op = Attention(head**-0.5, causal, stores=(cv.stored(ACC),), window=window)
        step = make_step(op, [heads, heads, heads])
        cases += [
            Case(f"{head} {causal=} {window=} {tile}", step, 450, lowered=[launch_attention(step, tile, context)])
            for tile in thinned(hopper, candidates(work_of(step)), first=len(cases))
        ]
    check(hopper, cases)


def test_keys_outside_a_window_are_not_read(hopper: Runner) -> None:
    """Where no query of a tile sees a tile of keys, not even NaN in it reaches the result."""
    shape = (1, 2, 900, 32)
    heads: tuple[DType, tuple[int, ...]] = (F16, shape)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape).astype(np.float16) for _ in range(3))
    for causal in (False, True):
        step = make_step(Attention(0.2, causal, stores=(cv.stored(ACC),), window=60), [heads, heads, heads])
        for tile in candidates(work_of(step)):
            launches = [launch_attention(step, tile, hopper.context)]
            (want,) = hopper.run(step, launches, [q, k, v])
            dirty = [array.copy() for array in (k, v)]
            for array in dirty:
                array[:, :, :128] = np.nan
            (got,) = hopper.run(step, launches, [q, *dirty])
            first = 128 + tile.queries + 60  # of a tile whose window begins behind the first 128 keys
            assert np.array_equal(got[:, :, first:], want[:, :, first:]), (causal, tile)
            assert np.isnan(got[:, :, :100]).all()


def test_a_window_costs_what_it_shows() -> None:
    """The estimated time of a window does not grow with the keys outside it."""

    def estimated(tokens: int, window: int | None) -> float:
        heads: tuple[DType, tuple[int, ...]] = (F16, (1, 16, tokens, 128))
        step = make_step(Attention(0.1, True, stores=(cv.stored(ACC),), window=window), [heads, heads, heads])
        work = work_of(step)
        return min(cycles(tile, work, 132) for tile in candidates(work))

    assert estimated(16384, 512) < 0.2 * estimated(16384, None)
    assert 3 < estimated(16384, 512) / estimated(4096, 512) < 4.5


@pytest.mark.parametrize(
    ("batch", "tokens", "causal", "expected"),
    [
        (32, 512, True, (3, 64, 4)), (32, 512, False, (3, 64, 4)), (8, 2048, True, (3, 64, 4)),
        (64, 256, False, (2, 128, 2)), (1, 2048, False, (2, 128, 2)), (4, 512, True, (2, 128, 2)),
        (128, 128, False, (2, 128, 3)), (64, 256, True, (2, 128, 3)), (1, 512, False, (1, 128, 2)),
    ],
)  # fmt: skip
def test_tiles_of_heads_of_128_features(batch: int, tokens: int, causal: bool, expected: tuple[int, int, int]) -> None:
    """Consumers, keys and stages of what was the fastest of them on an H100."""
    heads: tuple[DType, tuple[int, ...]] = (F16, (batch, 16, tokens, 128))
    step = make_step(Attention(0.1, causal, stores=(cv.stored(ACC),)), [heads, heads, heads])
    tile = pick(step, Context(SM_90A, 132, WeightStore()))
    assert (tile.consumers, tile.keys, tile.stages) == expected
