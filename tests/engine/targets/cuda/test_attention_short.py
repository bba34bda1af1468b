"""Attention of packed sequences in small blocks (attention_short.cuh) against float64 (conftest.py says on what)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from engine.ir.dtype import DType
from engine.ir.ops import Attention
from engine.plan.plan import Step
from engine.targets.cuda import covering as cv
from engine.targets.cuda.attention_short import MAX_SEQUENCES, candidates, launch_attention, suits
from engine.targets.cuda.covering import ACC, F16, F32, make_step
from engine.targets.cuda.kernel import Context
from tests.engine.targets.cuda.attention_cases import ROUNDING, operand
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
HEADS = (8, 16, 24, 32, 48, 64, 72, 96, 104, 128)


def random_case(rng: np.random.Generator, kind: str, context: Context, i: int) -> Case:
    dtype = KINDS[kind]
    head, value = (int(rng.choice(HEADS)) for _ in range(2))
    value = head if rng.random() < 0.5 else value
    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(rng.choice([1, 1, 2]))
    lengths = [ragged(rng, 200) if rng.random() < 0.9 else 0 for _ in range(int(rng.integers(2, 9)))]
    if i % 4 == 1:  # more than a block has threads
        lengths = [int(rng.integers(0, 5)) for _ in range(int(rng.integers(120, MAX_SEQUENCES)))]
    if i % 8 == 2:  # more tiles than there are classes
        lengths[0] = int(rng.integers(400, 700))
    tokens = max(1, sum(lengths) + int(rng.choice([0, 0, 1, 70, 300])))
    shapes = [(1, heads, tokens, head), (1, kv_heads, tokens, head), (1, kv_heads, tokens, value)]
    inputs: list[cv.Given] = [operand(rng, n, dtype, shape) for n, shape in enumerate(shapes)]
    inputs.append((DType.I32, (len(lengths) + 1,)))
    op = Attention(head**-0.5, bool(rng.random() < 0.4), stores=(cv.stored(ACC, dtype),), packed=True)
    step = make_step(op, inputs)
    if i % 2:
        step = cv.results_in(step, (0, 2, 1, 3))
    assert suits(step)
    tiles = candidates(step)
    tile = tiles[i % len(tiles)]
    few = replace(context, multiprocessors=int(rng.integers(1, 12)))
    label = f"{kind} {shapes} {lengths} {op.causal=} {tile}"
    launches = [launch_attention(step, tile, few)]
    return Case(label, step, 400 + head, {3: starts_of(lengths)}, launches, ROUNDING[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_short_attention_matches_float64(hopper: Runner, count: int, kind: str) -> None:
    rng = rng_of(f"short {kind}")
    check(hopper, [random_case(rng, kind, hopper.context, i) for i in range(count)])


def test_blocks_take_many_pieces(hopper: Runner) -> None:
    """More than are looked up at once, of sequences whose lengths differ by two orders of magnitude."""
    lengths = [3, 300, 64, 0, 129, 17, 65, 1, 90] + [5] * 30
    cases = []
    for head, causal in ((64, False), (32, True), (96, False), (128, True)):
        step = packed(F16, sum(lengths) + 40, 2, head, len(lengths), causal)
        for tile in candidates(step):
            launches = [launch_attention(step, tile, replace(hopper.context, multiprocessors=1))]
            few = [replace(launch, grid=(2, 1, 1)) for launch in launches]
            cases.append(Case(f"{head} {causal=} {tile}", step, 300, {3: starts_of(lengths)}, few))
    check(hopper, cases)


def test_a_launch_serves_other_lengths(hopper: Runner) -> None:
    check_other_lengths(hopper, lambda step: [launch_attention(step, candidates(step)[0], hopper.context)])


def test_no_sequence_reaches_another(hopper: Runner) -> None:
    def lowerings(step: Step) -> Iterator[Lowering]:
        for tile in candidates(step):
            yield lambda step, tile=tile: [launch_attention(step, tile, replace(hopper.context, multiprocessors=1))]

    check_sequences_apart(hopper, [100, 60, 77, 3], lowerings)


def test_starts_that_make_no_sense_reach_no_foreign_memory(hopper: Runner) -> None:
    run_senseless_starts(hopper, lambda step: [launch_attention(step, candidates(step)[0], hopper.context)])


def test_what_it_takes() -> None:
    assert suits(packed(F16, 100, 2, 64, 3))
    others: list[Step] = [
        packed(F32, 100, 2, 64, 3),
        packed(F16, 100, 2, 60, 3),
        packed(F16, 100, 2, 136, 3),
        packed(F16, 100, 2, 64, 1),
        packed(F16, 5000, 2, 64, MAX_SEQUENCES + 1),
    ]
    assert not any(map(suits, others))
    shape = (F16, (1, 2, 100, 64))
    fused = Attention(0.125, stores=(cv.stored(cv.gelu(ACC)),), packed=True)
    assert not suits(make_step(fused, [shape, shape, shape, (DType.I32, (4,))]))
