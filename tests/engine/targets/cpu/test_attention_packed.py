"""Attention over sequences that lie one after the other, against each sequence by itself in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.graph import Graph, Value
from engine.ir.ops import Attention
from engine.plan.build import Constants, build
from engine.plan.tensor import Tensor
from engine.targets.cpu.attention import requirements
from engine.targets.cpu.codegen.isa import host_isas
from engine.targets.cpu.codegen.packed import WINDOW
from engine.targets.cpu.target import CpuTarget
from tests.engine.targets.cpu.attention_cases import ATOL, ROWS, SCALE, reference
from tests.engine.targets.cpu.steps import ISAS, Layout, place, run_step

PACKED = Attention(SCALE, packed=True)
# A case of every kind of mixture; what is drawn at random comes on top.
MIXTURES = ([], [0], [1], [0, 0, 3, 0], [1] * 70, [WINDOW] * 3, [200, 1, 1, 0, 130], [15, 16, 17, 63, 64, 65])


def starts_of(lengths: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int32)


def fused(
    rng: np.random.Generator, tokens: int, heads: int, kv_heads: int, head_dim: int, value_dim: int
) -> tuple[list[np.ndarray], list[Tensor]]:
    """q, k and v, and the same as views of one product of [tokens, features], in which they lie side by side."""
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * value_dim]
    product = rng.standard_normal((tokens, sum(sizes))).astype(np.float32)
    whole = place(product, Layout(gap=3))
    arrays, views = [], []
    parts = zip(np.split(product, np.cumsum(sizes)[:-1], 1), (heads, kv_heads, kv_heads), strict=True)
    offset = whole.offset
    for part, count in parts:
        features = part.shape[1] // count
        arrays.append(part.reshape(1, tokens, count, features).transpose(0, 2, 1, 3))
        strides = (whole.strides[0] * tokens, features, whole.strides[0], 1)
        views.append(replace(whole, shape=arrays[-1].shape, strides=strides, offset=offset))
        offset += part.shape[1]
    return arrays, views


def expected(arrays: Sequence[np.ndarray], lengths: Sequence[int], causal: bool = False) -> np.ndarray:
    """Each sequence by itself, in float64; 0 behind the last."""
    q, k, v = arrays
    result = np.zeros((*q.shape[:-1], v.shape[-1]))
    for first, end in pairwise(starts_of(lengths)):
        if first < end:
            result[:, :, first:end] = reference(*(x[:, :, first:end] for x in (q, k, v)), causal=causal)
    return result


def mixture(rng: np.random.Generator, i: int) -> tuple[list[int], int]:
    """Lengths, and the tokens with those that belong to no sequence."""
    if i < len(MIXTURES):
        lengths = list(MIXTURES[i])
    elif i % 3 == 0:
        lengths = [int(n) for n in rng.integers(0, 6, rng.integers(20, 60))]
    else:
        lengths = [int(rng.choice([0, 1, *rng.integers(2, 190, 4)])) for _ in range(rng.integers(1, 6))]
    return lengths, max(1, sum(lengths) + int(rng.choice([0, 0, 1, 30, 150])))


def check(rng: np.random.Generator, i: int, head_dim: int, value_dim: int, causal: bool, isa: str) -> None:
    lengths, tokens = mixture(rng, i)
    kv_heads = int(rng.integers(1, 3))
    arrays, views = fused(rng, tokens, kv_heads * int(rng.integers(1, 4)), kv_heads, head_dim, value_dim)
    op = replace(PACKED, causal=causal)
    result = run_step(op, [*views, starts_of(lengths)], isa, [replace(ROWS, gap=i % 3)])
    assert result.status == 0
    want = expected(arrays, lengths, causal)
    np.testing.assert_allclose(result.outputs[0], want, rtol=0, atol=ATOL, err_msg=f"{lengths}")
    assert not result.outputs[0][:, :, sum(lengths) :].any()  # the poison is too small to show in a difference


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(8, 8), (32, 32), (64, 64), (17, 40), (80, 80)])
def test_packed_sequences_match_float64(head_dim: int, value_dim: int, causal: bool, isa: str) -> None:
    rng = np.random.default_rng(head_dim * 1000 + value_dim)
    for i in range(20):
        check(rng, i, head_dim, value_dim, causal, isa)


@pytest.mark.parametrize("isa", host_isas())
@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 1), (96, 128), (256, 256)])
def test_other_head_sizes(head_dim: int, value_dim: int, isa: str) -> None:
    rng = np.random.default_rng(head_dim)
    atol = ATOL * max(1.0, head_dim / 80)  # a score grows with the root of the features, and so does its rounding
    for i in range(len(MIXTURES)):
        lengths, tokens = mixture(rng, i)
        arrays, views = fused(rng, tokens, 2, 1, head_dim, value_dim)
        result = run_step(PACKED, [*views, starts_of(lengths)], isa).outputs[0]
        np.testing.assert_allclose(result, expected(arrays, lengths), rtol=0, atol=atol, err_msg=f"{lengths}")


@pytest.mark.parametrize("causal", [False, True])
def test_long_packed_sequences(causal: bool) -> None:
    arrays, views = fused(np.random.default_rng(5), 2100, 1, 1, 64, 64)
    lengths = [1, 1500, 20, 560]
    result = run_step(replace(PACKED, causal=causal), [*views, starts_of(lengths)]).outputs[0]
    np.testing.assert_allclose(result, expected(arrays, lengths, causal), rtol=0, atol=ATOL)


@pytest.mark.parametrize("isa", ISAS)
def test_a_packed_epilogue_reads_a_residual_and_writes_two_layouts(isa: str) -> None:
    """Of tokens without a sequence, too: their accumulator is 0."""
    rng = np.random.default_rng(6)
    lengths, tokens = [40, 0, 3, 90], 200
    arrays, views = fused(rng, tokens, 4, 2, 24, 12)
    residual = rng.standard_normal((1, 4, tokens, 12)).astype(np.float32)
    stores = (ex.apply(PointOp.ADD, ex.Acc(), ex.Arg(4, DType.F32)), ex.cast(ex.Acc(), DType.F16))
    op = replace(PACKED, stores=stores)
    result = run_step(op, [*views, starts_of(lengths), residual], isa, [ROWS, Layout((3, 2, 1, 0))])
    want = expected(arrays, lengths)
    np.testing.assert_allclose(result.outputs[0], want + residual, rtol=0, atol=ATOL)
    np.testing.assert_array_equal(result.outputs[0][:, :, sum(lengths) :], residual[:, :, sum(lengths) :])
    np.testing.assert_allclose(result.outputs[1], want, rtol=0, atol=2e-3)
    assert not result.outputs[1][:, :, sum(lengths) :].any()


@pytest.mark.parametrize("isa", ISAS)
def test_no_sequence_reaches_another(isa: str) -> None:
    """Not even infinities and NaN: neither of a neighbour nor of the tokens that belong to none."""
    lengths, tokens = [100, 60, 77], 290
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal((1, 2, tokens, 32)).astype(np.float32) for _ in range(3)]
    want = run_step(PACKED, [*arrays, starts_of(lengths)], isa).outputs[0]
    dirty = [array.copy() for array in arrays]
    for array in dirty:
        array[:, :, 100:160] = np.nan
        array[:, :, 237:] = np.inf
    got = run_step(PACKED, [*dirty, starts_of(lengths)], isa).outputs[0]
    kept = np.r_[0:100, 160:290]
    assert np.isfinite(want).all()
    assert np.isnan(got[:, :, 100:160]).all()
    np.testing.assert_array_equal(got[:, :, kept], want[:, :, kept])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "starts", [[0, 900, 20, -5, 140], [-3, -2, -1, 0, 2**31 - 1], [150, 0, 150, 0, 7], [0, 0, -(2**31), 9, 9]]
)
def test_starts_that_make_no_sense_reach_no_foreign_memory(starts: list[int], isa: str) -> None:
    """They fall, are negative, or lie beyond the tokens: `run_step` finds stores outside of the result."""
    rng = np.random.default_rng(4)
    arrays = [rng.standard_normal((1, 2, 150, 8)).astype(np.float32) for _ in range(3)]
    run_step(PACKED, [*arrays, np.array(starts, np.int32)], isa)


def test_starts_may_be_strided() -> None:
    arrays, views = fused(np.random.default_rng(2), 50, 2, 2, 8, 8)
    result = run_step(PACKED, [*views, place(starts_of([20, 0, 25]), Layout(step=2))]).outputs[0]
    np.testing.assert_allclose(result, expected(arrays, [20, 0, 25]), rtol=0, atol=ATOL)


def test_one_kernel_serves_all_lengths_and_sizes() -> None:
    launches = []
    for tokens, lengths in ((64, [64]), (64, [1] * 64), (1024, [500, 24])):
        _, views = fused(np.random.default_rng(0), tokens, 3, 3, 8, 8)
        launches += run_step(PACKED, [*views, starts_of(lengths)]).launches
    assert len({launch.spec.symbol for launch in launches}) == 1
    assert [launch.tasks for launch in launches] == [3, 3, 48]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_share_mixed_lengths(threads: int) -> None:
    """A bound plan on the pool's threads, whose lengths change from run to run."""
    heads, tokens, features = 3, 700, 16
    names = ("q", "k", "v")
    inputs = [Value(name, DType.F32, (1, heads, tokens, features)) for name in names]
    starts = Value("starts", DType.I32, (7,))
    graph = Graph("packed", inputs=[*inputs, starts])
    graph.outputs, graph.output_names = [*graph.add(PACKED, [*inputs, starts])], ["out"]
    target = CpuTarget(threads)
    executable = target.bind(build(graph, {}, target, Constants()))
    rng = np.random.default_rng(threads)
    for lengths in ([700, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6], [300, 7, 0, 64, 128, 201], [0] * 6):
        arrays = [rng.standard_normal((1, heads, tokens, features)).astype(np.float32) for _ in names]
        result = np.full(arrays[0].shape, np.nan, np.float32)
        executable.run(dict(zip(names, arrays, strict=True)) | {"starts": starts_of(lengths)}, {"out": result})
        np.testing.assert_allclose(result, expected(arrays, lengths), rtol=0, atol=ATOL)


def test_other_dtypes_of_packed_sequences_are_refused() -> None:
    rng = np.random.default_rng(0)
    tensors = [place(rng.standard_normal((1, 1, 4, 4)).astype(np.float16)) for _ in range(3)]
    with pytest.raises(UnsupportedOp, match="float32"):
        requirements(PACKED, (*tensors, place(starts_of([4]))))
