"""Packed attention, sequences of any lengths side by side, against float64 (conftest.py says on what)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Attention
from engine.plan.plan import Step
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.attention import lower
from engine.targets.cuda.attention_wgmma import MAX_SEQUENCES, launch_attention, pick, suits, work_of
from engine.targets.cuda.attention_wgmma_tiles import candidates
from engine.targets.cuda.covering import ACC, F16, F32, make_step
from engine.targets.cuda.kernel import Context, Instruction, WeightStore, workspace
from tests.engine.targets.cuda.attention_cases import ROUNDING, operand, result
from tests.engine.targets.cuda.cases import check, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.packed_cases import (
    Lowering,
    check_other_lengths,
    check_sequences_apart,
    packed,
    run_senseless_starts,
    starts_of,
)

KINDS = {"f16": F16, "bf16": DType.BF16}
HEADS = (16, 32, 64, 80, 128, 192, 256)


def random_case(rng: np.random.Generator, kind: str, context: Context, i: int) -> Case:
    dtype = KINDS[kind]
    head, value = (int(rng.choice(HEADS)) for _ in range(2))
    value = head if rng.random() < 0.5 else value
    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(rng.choice([1, 1, 2]))
    lengths = [ragged(rng, 400) if rng.random() < 0.9 else 0 for _ in range(int(rng.integers(1, 7)))]
    if i % 4 == 1:  # more than a warp's
        lengths = [int(rng.integers(0, 5)) for _ in range(int(rng.integers(33, 100)))]
    tokens = max(1, sum(lengths) + int(rng.choice([0, 0, 1, 70, 300])))
    shapes = [(1, heads, tokens, head), (1, kv_heads, tokens, head), (1, kv_heads, tokens, value)]
    inputs: list[cv.Given] = [operand(rng, n, dtype, shape) for n, shape in enumerate(shapes)]
    inputs.append((DType.I32, (len(lengths) + 1,)))
    op = Attention(head**-0.5, bool(rng.random() < 0.4), stores=(cv.stored(ACC, dtype),), packed=True)
    step = result(rng, make_step(op, inputs))
    tiles = candidates(work_of(step))
    launches = [launch_attention(step, tiles[i % len(tiles)], context)]
    label = f"{kind} {shapes} {lengths} {op.causal=} {tiles[i % len(tiles)]}"
    return Case(label, step, 400 + head, {3: starts_of(lengths)}, launches, ROUNDING[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_attention_matches_float64(hopper: Runner, count: int, kind: str) -> None:
    rng = rng_of(f"packed {kind}")
    check(hopper, [random_case(rng, kind, hopper.context, i) for i in range(count)])


def test_blocks_take_many_packed_items(hopper: Runner) -> None:
    """More items than blocks, in every tile, of sequences whose lengths differ by two orders of magnitude."""
    lengths = [3, 500, 64, 0, 129, 17, 256, 90]
    cases = []
    for head, causal in ((64, False), (80, True), (256, False)):
        step = packed(F16, sum(lengths) + 40, 3, head, len(lengths), causal)
        for tile in candidates(work_of(step)):
            launches = [launch_attention(step, tile, replace(hopper.context, multiprocessors=5))]
            cases.append(Case(f"{head} {causal=} {tile}", step, 500, {3: starts_of(lengths)}, launches))
    check(hopper, cases)


def test_one_sequence_of_any_length(hopper: Runner) -> None:
    """A launch for one sequence, a block an item and several, whatever of the tokens belongs to it."""
    cases = []
    for head, causal, multiprocessors in (
        (32, False, 3),
        (64, True, 3),
        (64, False, 40),
        (128, True, 40),
        (256, False, 3),
    ):
        step = packed(F16, 300, 3, head, 1, causal)
        tiles = candidates(work_of(step))
        for i, length in enumerate((300, 299, 257, 256, 129, 64, 1, 0)):
            context = replace(hopper.context, multiprocessors=multiprocessors)
            launches = [launch_attention(step, tiles[i % len(tiles)], context)]
            cases.append(Case(f"{head} {causal=} {length}", step, 300, {3: starts_of([length])}, launches))
    check(hopper, cases)


def test_a_single_sequence_reads_nothing_behind_it(hopper: Runner) -> None:
    """Not even NaN in the tokens that belong to none reaches the result."""
    rng = np.random.default_rng(5)
    arrays = [rng.standard_normal((1, 2, 290, 64)).astype(np.float16) for _ in range(3)]
    for causal in (False, True):
        step = packed(F16, 290, 2, 64, 1, causal)
        for tile in candidates(work_of(step)):
            launches = [launch_attention(step, tile, hopper.context)]
            (want,) = hopper.run(step, launches, [*arrays, starts_of([203])])
            dirty = [array.copy() for array in arrays]
            for array in dirty:
                array[:, :, 203:] = np.nan
            (got,) = hopper.run(step, launches, [*dirty, starts_of([203])])
            assert np.isfinite(want).all() and np.array_equal(got, want), (causal, tile)
            assert not got[:, :, 203:].any()


def test_one_sequence_takes_the_tile_of_as_many_padded_tokens() -> None:
    context = Context(SM_90A, 132, WeightStore())
    for tokens, heads, head in ((128, 12, 64), (512, 12, 64), (4096, 16, 128)):
        shape = (F16, (1, heads, tokens, head))
        padded = make_step(Attention(head**-0.5, stores=(cv.stored(ACC),)), [shape] * 3)
        assert pick(packed(F16, tokens, heads, head, 1), context) == pick(padded, context)


def test_a_packed_launch_serves_other_lengths(hopper: Runner) -> None:
    check_other_lengths(hopper, lambda step: lower(step, hopper.context))


def test_tokens_of_no_sequence_give_zeros(hopper: Runner) -> None:
    step = packed(F16, 70, 2, 64, 0)
    check(hopper, [Case("no sequence", step, 1, {3: starts_of([])})])


def test_no_sequence_reaches_another(hopper: Runner) -> None:
    def lowerings(step: Step) -> Iterator[Lowering]:
        for tile in candidates(work_of(step)):
            yield lambda step, tile=tile: [launch_attention(step, tile, hopper.context)]

    check_sequences_apart(hopper, [100, 60, 77], lowerings)


def test_starts_that_make_no_sense_reach_no_foreign_memory(hopper: Runner) -> None:
    run_senseless_starts(hopper, lambda step: lower(step, hopper.context))


def test_a_packed_launch_leaves_its_counters_as_it_found_them(hopper: Runner) -> None:
    lengths = [64] * hopper.context.multiprocessors
    step = packed(F16, sum(lengths), 2, 32, len(lengths))
    elsewhere = replace(step.outputs[0], buffer=workspace(step.outputs[0].buffer.nbytes))
    tile = candidates(work_of(step))[0]
    first, second = (launch_attention(one, tile, hopper.context) for one in (replace(step, outputs=(elsewhere,)), step))
    assert "counters" in dict(first.arguments)
    shared = tuple((name, dict(first.arguments)[name] if name == "counters" else a) for name, a in second.arguments)
    launches = [first, replace(second, arguments=shared)]
    check(hopper, [Case("again", step, 200, {3: starts_of(lengths)}, launches)])


def test_packed_attention_without_a_kernel_is_refused() -> None:
    context = Context(SM_90A, 132, WeightStore())
    step = packed(F16, 100, 2, 64, 3)
    (launch,) = lower(step, context)
    assert launch.kernel.instruction is Instruction.WGMMA and suits(step)
    for refused, on in (
        (step, Context(SM_80, 108, WeightStore())),
        (packed(F32, 100, 2, 64, 3), context),
        (packed(F16, 100, 2, 63, 3), context),
        (packed(F16, 5000, 2, 64, MAX_SEQUENCES + 1), context),
    ):
        with pytest.raises(UnsupportedOp, match="packed"):
            lower(refused, on)
