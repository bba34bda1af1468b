"""Attention against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Attention
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.targets.cuda import covering as cv
from engine.targets.cuda.attention import heads_of, launch_attention, lower
from engine.targets.cuda.attention_operands import Attended, BiasKind
from engine.targets.cuda.attention_tiles import candidates
from engine.targets.cuda.covering import ACC, F16, F32, make_step
from engine.targets.cuda.kernel import Context
from tests.engine.targets.cuda.attention_cases import ROUNDING, operand, result
from tests.engine.targets.cuda.cases import check, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner

BF16 = DType.BF16
HEADS = (8, 16, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256, 264)
ODD_HEADS = (1, 3, 7, 20, 33, 50, 63, 65, 100, 127, 130, 199, 255, 300)
KINDS = {"f16": (F16, False), "bf16": (BF16, False), "tf32": (F32, True), "f32": (F32, False)}


def context_of(runner: Runner, kind: str) -> Context:
    return replace(runner.context, tf32=KINDS[kind][1])


def bias_case(rng: np.random.Generator, scores: tuple[int, ...], number: int) -> tuple[Tensor, np.ndarray]:
    """A bias in one of the shapes that broadcast to `scores`, in any float type and axis order."""
    shape = tuple(size if rng.random() < 0.6 else 1 for size in scores)
    shape = shape[int(rng.integers(0, len(scores))) :]
    dtype = (F16, BF16, F32)[int(rng.integers(0, 3))]
    order = tuple(int(axis) for axis in rng.permutation(len(shape)))
    buffer = Buffer(f"input{number}", BufferKind.INPUT, int(np.prod(shape)) * dtype.itemsize)
    tensor = Tensor(buffer, dtype, shape, row_major(shape, order))
    lowest = -np.inf if rng.random() < 0.3 else -1e4
    masked = np.where(rng.random(shape) < 0.3, lowest, rng.standard_normal(shape))
    masked[..., 0] = 0.0  # no row is empty: a separate test has those
    return tensor, masked.astype(dtype.numpy)


def random_case(rng: np.random.Generator, kind: str, context: Context, i: int) -> Case:
    dtype = KINDS[kind][0]
    odd = i % 3 == 2
    head, value = (int(rng.choice(ODD_HEADS if odd else HEADS)) for _ in range(2))
    value = head if rng.random() < 0.5 else value
    queries, keys = ragged(rng, 300), ragged(rng, 300)
    batch, kv_heads = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    lead = [[batch], [batch], [batch]]
    if i % 4 == 1:
        lead[int(rng.integers(0, 3))] = [1]  # broadcast over the batch
    heads = kv_heads * int(rng.choice([1, 1, 2, 3]))
    if i % 5:
        lead = [[*lead[0], heads], [*lead[1], kv_heads], [*lead[2], kv_heads]]
    shapes = [(*lead[0], queries, head), (*lead[1], keys, head), (*lead[2], keys, value)]
    inputs: list[cv.Given] = [operand(rng, n, dtype, shape, odd) for n, shape in enumerate(shapes)]
    out = (max(part[0] for part in lead), *lead[0][1:], queries, value)
    feeds: dict[int, np.ndarray] = {}
    has_bias = rng.random() < 0.6
    if has_bias:
        tensor, feeds[3] = bias_case(rng, (*out[:-1], keys), 3)
        inputs.append(tensor)
    stores: tuple[ex.Expr, ...] = (cv.stored(ACC, dtype),)
    if i % 7 == 3:  # an epilogue that reads, and two results
        inputs.append((F32, out))
        stores = (cv.stored(cv.add(ACC, cv.arg(len(inputs) - 1, F32)), dtype), ACC)
    op = Attention(head**-0.5, bool(rng.random() < 0.4), has_bias, bool(rng.random() < 0.3), stores)
    if i % 6 == 1:  # rows that see no key are zeros, not to have a sum's error beside NaN
        op = replace(op, window=max(1, ragged(rng, 200)), masked_rows_zero=True)
        if has_bias:  # nor to see only keys at −1e4, where scores in fp32 are 1e-3 apart
            feeds[3] = np.where(feeds[3] < -1000, np.asarray(-np.inf, feeds[3].dtype), feeds[3])
    step = result(rng, make_step(op, inputs))
    sizes = heads_of(step, context)
    tiles = list(candidates(sizes, op.causal or op.window is not None, Attended(step).bias is BiasKind.FULL))
    splits = int(rng.integers(1, 6)) if i % 4 == 2 else 1
    launches = launch_attention(step, sizes, tiles[int(rng.integers(0, len(tiles)))], splits)
    label = f"{kind} {shapes} bias={inputs[3].shape if has_bias else None} {op.causal=} {op.window=} {splits=}"
    return Case(label, step, keys + head, feeds, launches, ROUNDING[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_attention_matches_float64(runner: Runner, count: int, kind: str) -> None:
    rng = rng_of(f"attention {kind}")
    check(runner, [random_case(rng, kind, context_of(runner, kind), i) for i in range(count)])


@pytest.mark.parametrize("kind", KINDS)
def test_attention_in_the_tile_chosen_matches_float64(runner: Runner, count: int, kind: str) -> None:
    """Shapes of models: ViT, BERT, windows of a Swin, one query of a decoder, cross attention, an image decoder's."""
    dtype, cases = KINDS[kind][0], []
    rng = rng_of(f"chosen {kind}")
    for batch, heads, kv_heads, queries, keys, head in (
        (2, 3, 3, 197, 197, 64), (1, 2, 2, 384, 384, 64), (9, 3, 3, 49, 49, 32), (1, 4, 2, 1, 777, 128),
        (1, 2, 1, 64, 77, 40), (1, 2, 1, 1, 32768, 64), (1, 1, 1, 40, 50, 512),
    ):  # fmt: skip
        shapes = [(batch, heads, queries, head), (batch, kv_heads, keys, head), (batch, kv_heads, keys, head)]
        inputs: list[cv.Given] = [operand(rng, n, dtype, shape) for n, shape in enumerate(shapes)]
        step = make_step(Attention(head**-0.5, stores=(cv.stored(ACC, dtype),)), inputs)
        lowered = lower(step, context_of(runner, kind))
        cases.append(Case(f"{kind} {shapes}", step, keys + head, lowered=lowered, rounding=ROUNDING[kind]))
    check(runner, cases)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_rows_without_keys(runner: Runner, count: int, kind: str) -> None:
    dtype, cases = KINDS[kind][0], []
    heads: tuple[DType, tuple[int, ...]] = (dtype, (2, 2, 70, 32))
    for zero in (False, True):
        op = Attention(0.2, False, True, zero, (cv.stored(ACC, dtype),))
        for lowest in (-np.inf, float(np.finfo(np.float32).min)):
            for rows in (1, 70):
                bias = np.zeros((2, 1, rows, 70), np.float32)
                bias[1, :, rows // 2 :] = lowest
                step = make_step(op, [heads, heads, heads, (F32, bias.shape)])
                lowered = lower(step, context_of(runner, kind))
                cases.append(Case(f"{zero} {lowest} {rows}", step, 70, {3: bias}, lowered, ROUNDING[kind]))
    check(runner, cases)


def test_attention_of_no_keys_is_zero(runner: Runner, count: int) -> None:
    step = make_step(Attention(0.2, stores=(cv.stored(ACC),)), [(F16, (2, 2, 5, 32)), *[(F16, (2, 2, 0, 32))] * 2])
    check(runner, [Case("no keys", step, 1)])


def test_attention_of_no_queries_launches_nothing(runner: Runner, count: int) -> None:
    step = make_step(Attention(0.2, stores=(cv.stored(ACC),)), [(F16, (2, 2, 0, 32)), *[(F16, (2, 2, 5, 32))] * 2])
    assert lower(step, runner.context) == []


def test_attention_reads_a_fused_projection_in_place(runner: Runner, count: int) -> None:
    batch, sequence, heads, head = 3, 45, 4, 32
    step = fused_attention(batch, sequence, heads, head)
    check(runner, [Case("fused", step, sequence)])


def fused_attention(batch: int, sequence: int, heads: int, head: int) -> Step:
    """Attention on slices of [batch, sequence, 3, heads, head], writing [batch, sequence, heads, head]."""
    features = heads * head
    buffers = [Buffer(f"input{i}", BufferKind.INPUT, 2 * batch * sequence * 3 * features) for i in range(3)]
    shape, strides = (batch, heads, sequence, head), (sequence * 3 * features, head, 3 * features, 1)
    tensors = [Tensor(buffer, F16, shape, strides, i * features) for i, buffer in enumerate(buffers)]
    step = make_step(Attention(head**-0.5, stores=(cv.stored(ACC),)), tensors)
    out = Buffer("output0", BufferKind.OUTPUT, 2 * batch * sequence * features)
    return replace(step, outputs=(Tensor(out, F16, shape, (sequence * features, head, features, 1)),))
