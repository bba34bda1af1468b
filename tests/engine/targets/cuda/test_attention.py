"""Attention against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

import numpy as np

from engine.ir.dtype import DType
from engine.ir.ops import Attention
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda import covering as cv
from engine.targets.cuda.covering import ACC, F16, F32, make_step
from tests.engine.targets.cuda.cases import check, ragged, rng_of
from tests.engine.targets.cuda.harness import Case, Runner


def test_attention_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("attention"), []
    for i in range(count):
        head, value = int(rng.choice([8, 16, 32, 40, 64, 96, 128])), int(rng.choice([16, 32, 64, 128]))
        batch, kv_heads = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        heads = kv_heads * int(rng.choice([1, 1, 2]))
        queries, keys = ragged(rng, 300), ragged(rng, 300)
        bias = [None, (batch, 1, 1, keys), (1, heads, queries, keys), (queries, keys)][i % 4]
        op = Attention(head**-0.5, bool(rng.random() < 0.3), bias is not None, stores=(cv.stored(ACC),))
        inputs: list[cv.Given] = [
            (F16, (batch, heads, queries, head)), (F16, (batch, kv_heads, keys, head)),
            (F16, (batch, kv_heads, keys, value)),
        ]  # fmt: skip
        feeds: dict[int, np.ndarray] = {}
        if bias is not None:
            dtype = F32 if i % 8 < 4 else F16
            inputs.append((dtype, bias))
            lowest = -np.inf if rng.random() < 0.3 else float(np.finfo(dtype.numpy).min)
            masked = np.where(rng.random(bias) < 0.3, lowest, rng.standard_normal(bias))
            masked[..., 0] = 0.0  # no row is empty: a separate test has those
            feeds[3] = masked.astype(dtype.numpy)
        cases.append(Case(f"{inputs} causal={op.causal}", make_step(op, inputs), keys, feeds))
    check(runner, cases)


def test_attention_rows_without_keys(runner: Runner, count: int) -> None:
    heads: tuple[DType, tuple[int, ...]] = (F16, (2, 2, 70, 32))
    cases = []
    for zero in (False, True):
        op = Attention(0.2, False, True, zero, (cv.stored(ACC),))
        for lowest in (-np.inf, float(np.finfo(np.float32).min)):
            bias = np.zeros((2, 1, 1, 70), np.float32)
            bias[1] = lowest
            cases.append(
                Case(f"{zero} {lowest}", make_step(op, [heads, heads, heads, (F32, bias.shape)]), 70, {3: bias})
            )
    check(runner, cases)


def test_attention_reads_a_fused_projection_in_place(runner: Runner, count: int) -> None:
    batch, sequence, heads, head = 3, 45, 4, 32
    step = fused_attention(batch, sequence, heads, head)
    check(runner, [Case("fused", step, sequence)])


def fused_attention(batch: int, sequence: int, heads: int, head: int):
    """Attention on slices of [batch, sequence, 3, heads, head], writing [batch, sequence, heads, head]."""
    features = heads * head
    buffers = [Buffer(f"input{i}", BufferKind.INPUT, 2 * batch * sequence * 3 * features) for i in range(3)]
    shape, strides = (batch, heads, sequence, head), (sequence * 3 * features, head, 3 * features, 1)
    tensors = [Tensor(buffer, F16, shape, strides, i * features) for i, buffer in enumerate(buffers)]
    step = make_step(Attention(head**-0.5, stores=(cv.stored(ACC),)), tensors)
    out = Buffer("output0", BufferKind.OUTPUT, 2 * batch * sequence * features)
    result = Tensor(out, F16, shape, (sequence * features, head, features, 1))
    return type(step)(step.name, step.op, step.inputs, (result,), step.cost)
