"""Attention against float64: lengths, head sizes, strided views, every shape of bias, masks, grouped heads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Attention
from engine.plan.tensor import Tensor
from engine.targets.cpu.attention import query_blocks, requirements
from engine.targets.cpu.codegen.isa import host_isas
from tests.engine.targets.cpu.attention_cases import ATOL, ROWS, SCALE, qkv, reference
from tests.engine.targets.cpu.steps import ISAS, Layout, place, run_step

FINFO_MIN = float(np.finfo(np.float32).min)


def _check(
    tensors: list[np.ndarray], isa: str = "", bias: np.ndarray | None = None, causal: bool = False, zero: bool = False
) -> None:
    q, k, v = tensors
    inputs: list[np.ndarray | Tensor] = [place(q, ROWS), place(k, replace(ROWS, gap=5)), place(v, replace(ROWS, gap=1))]
    op = Attention(SCALE, causal, bias is not None, zero)
    result = run_step(op, [*inputs, *([] if bias is None else [bias])], isa, [ROWS]).outputs[0]
    expected = reference(q, k, v, bias, causal, zero)
    np.testing.assert_array_equal(np.isnan(result), np.isnan(expected))
    np.testing.assert_allclose(result, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("isa", host_isas())
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "value_dim"),
    [
        (1, 1, 1, 1),
        (7, 7, 3, 5),
        (17, 17, 33, 31),
        (64, 64, 32, 32),
        (1, 2000, 32, 48),
        (65, 130, 80, 8),
        (300, 97, 64, 64),
    ],
)
def test_any_lengths_and_head_sizes(queries: int, keys: int, head_dim: int, value_dim: int, isa: str) -> None:
    _check(qkv(2, 4, 2, queries, keys, head_dim, value_dim), isa)


@pytest.mark.parametrize("length", [512, 2000])
def test_long_sequences(length: int) -> None:
    _check(qkv(1, 2, 1, length, length, 64, 64))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (70, 70), (130, 200), (200, 130)])
def test_causal_mask_is_aligned_at_the_first_position(queries: int, keys: int, isa: str) -> None:
    _check(qkv(1, 2, 1, queries, keys, 16, 16), isa, causal=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 100), (70, 1), (70, 100)])
def test_bias_of_every_broadcast_shape(size: tuple[int, int], batch: int, heads: int, isa: str) -> None:
    bias = np.random.default_rng(0).standard_normal((batch, heads, *size)).astype(np.float32)
    _check(qkv(3, 2, 2, 70, 100, 24, 24), isa, bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("rows", [1, 70])
def test_fully_masked_rows_are_nan_or_zero(rows: int, zero: bool, isa: str) -> None:
    bias = np.zeros((2, 1, rows, 200), np.float32)
    bias[0, ..., :110] = -np.inf  # the first block of keys is masked altogether
    bias[1, :, rows // 2] = -np.inf
    _check(qkv(2, 2, 2, 70, 200, 24, 24), isa, bias, zero=zero)


@pytest.mark.parametrize("isa", ISAS)
def test_lowest_finite_bias_masks_unless_all_keys_have_it(isa: str) -> None:
    bias = np.zeros((2, 1, 1, 200), np.float32)
    bias[0, ..., :110] = FINFO_MIN
    bias[1] = FINFO_MIN
    tensors = qkv(2, 2, 2, 70, 200, 24, 24)
    q, k, v = tensors
    result = run_step(Attention(SCALE, has_bias=True), [*tensors, bias], isa).outputs[0]
    np.testing.assert_allclose(result[0], reference(q, k, v, bias)[0], rtol=0, atol=ATOL)
    # In float32 every score of the second row is the same number: the plain mean of the values.
    mean = np.broadcast_to(v[1].astype(np.float64).mean(1, keepdims=True), result[1].shape)
    np.testing.assert_allclose(result[1], mean, rtol=0, atol=ATOL)


@pytest.mark.parametrize("isa", ISAS)
def test_slices_of_one_buffer_are_read_in_place(isa: str) -> None:
    batch, length, heads, features = 2, 37, 3, 16
    packed = np.random.default_rng(1).standard_normal((batch, length, 3, heads, features)).astype(np.float32)
    whole = place(packed)
    shape, strides = (batch, heads, length, features), tuple(whole.strides[i] for i in (0, 3, 1, 4))
    views = [replace(whole, shape=shape, strides=strides, offset=whole.offset + i * whole.strides[2]) for i in range(3)]
    result = run_step(Attention(SCALE), views, isa, [ROWS]).outputs[0]
    q, k, v = (packed[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    np.testing.assert_allclose(result, reference(q, k, v), rtol=0, atol=ATOL)


def test_rank_three_has_one_head() -> None:
    q, k, v = (x[:, 0] for x in qkv(2, 1, 1, 20, 30, 8, 12))
    bias = np.random.default_rng(0).standard_normal((2, 20, 30)).astype(np.float32)
    result = run_step(Attention(SCALE, has_bias=True), [q, k, v, bias]).outputs[0]
    expected = reference(q[:, None], k[:, None], v[:, None], bias[:, None])[:, 0]
    np.testing.assert_allclose(result, expected, rtol=0, atol=ATOL)


def test_epilogue_reads_a_residual_and_writes_two_layouts() -> None:
    q, k, v = qkv(2, 3, 3, 20, 30, 8, 12)
    residual = np.random.default_rng(0).standard_normal((2, 3, 20, 12)).astype(np.float32)
    op = Attention(SCALE, stores=(ex.apply(PointOp.ADD, ex.Acc(), ex.Arg(3, DType.F32)), ex.cast(ex.Acc(), DType.F16)))
    result = run_step(op, [q, k, v, residual], layouts=[ROWS, Layout((3, 2, 1, 0))])
    np.testing.assert_allclose(result.outputs[0], reference(q, k, v) + residual, rtol=0, atol=ATOL)
    np.testing.assert_allclose(result.outputs[1], reference(q, k, v), rtol=0, atol=2e-3)


def test_no_keys_is_a_fully_masked_row() -> None:
    for zero in (False, True):
        result = run_step(Attention(SCALE, masked_rows_zero=zero), qkv(1, 2, 2, 5, 0, 8, 8)).outputs[0]
        np.testing.assert_array_equal(result, np.full(result.shape, 0.0 if zero else np.nan))


def test_scratch_does_not_grow_with_the_sequence() -> None:
    short, long = (run_step(Attention(SCALE), qkv(1, 1, 1, n, n, 8, 8)).launches[0] for n in (64, 1024))
    assert short.scratch_bytes == long.scratch_bytes
    assert short.spec == long.spec


def test_blocks_cover_every_query_once() -> None:
    for queries in range(1, 300):
        blocks = sorted(query_blocks(queries, 16, 4))
        assert [start for start, _ in blocks] == [0, *np.cumsum([16 * n for _, n in blocks])[:-1]]
        assert 0 <= sum(16 * n for _, n in blocks) - queries < 16


def test_other_dtypes_are_refused() -> None:
    tensors = tuple(place(x.astype(np.float16)) for x in qkv(1, 1, 1, 4, 4, 4, 4))
    with pytest.raises(UnsupportedOp, match="float32"):
        requirements(Attention(SCALE), tensors)


def test_a_window_stays_a_bias() -> None:
    q, k, v = (place(x, ROWS) for x in qkv(1, 2, 1, 8, 8, 4, 4))
    with pytest.raises(UnsupportedOp, match="window"):
        requirements(Attention(SCALE, window=3), (q, k, v))
