"""Norms against float64: every kind, any axes and layouts, prologues with gathered embeddings, epilogues."""

from __future__ import annotations

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Norm, NormKind
from tests.engine.targets.cpu.steps import ISAS, Layout, place, run_step

NHWC = (0, 2, 3, 1)
CASES = [
    ((64, 384), (1,), None),
    ((2, 7, 5), (2,), None),
    ((2, 7, 5), (0, 2), None),
    ((3, 130), (0,), None),
    ((2, 37, 9, 11), (2, 3), NHWC),
    ((2, 37, 9, 11), (1,), None),
    ((2, 37, 9, 11), (1, 2, 3), NHWC),
    ((1, 1), (1,), None),
    ((5, 1), (0, 1), None),
    ((4, 100, 70), (1,), (2, 1, 0)),
    ((1, 40_000), (1,), None),
]


def _reference(x: np.ndarray, kind: NormKind, axes: tuple[int, ...], epsilon: float) -> np.ndarray:
    x = x.astype(np.float64)
    if kind is NormKind.LAYER:
        return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)
    if kind is NormKind.RMS:
        return x / np.sqrt((x * x).mean(axes, keepdims=True) + epsilon)
    return x / np.maximum(np.sqrt((x * x).sum(axes, keepdims=True)), epsilon)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", NormKind)
@pytest.mark.parametrize(("shape", "axes", "order"), CASES)
def test_norm_matches_float64(
    shape: tuple[int, ...], axes: tuple[int, ...], order: tuple[int, ...] | None, kind: NormKind, isa: str
) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) * 3 + 5).astype(np.float32)
    scale = rng.standard_normal(shape[-1:]).astype(np.float32)
    op = Norm(kind, axes, 1e-5, stores=(ex.apply(PointOp.MUL, ex.Acc(), ex.Arg(1, DType.F32)),))
    result = run_step(op, [place(x, Layout(order, gap=3)), scale], isa, [Layout(order)])
    # The mean is 5: its rounding, relative to the deviation of 3, is a few units of 6e-8.
    np.testing.assert_allclose(result.outputs[0], _reference(x, kind, axes, 1e-5) * scale, atol=3e-6)


def test_variance_survives_a_large_mean() -> None:
    x = (np.random.default_rng(0).standard_normal((4, 1000)) + 1000).astype(np.float32)
    result = run_step(Norm(NormKind.LAYER, (1,), 1e-12), [x]).outputs[0]
    np.testing.assert_allclose(result, _reference(x, NormKind.LAYER, (1,), 1e-12), atol=2e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_embedding_sum_is_normalised_in_one_pass(isa: str) -> None:
    rng = np.random.default_rng(1)
    words, types, positions = (rng.standard_normal((n, 50)).astype(np.float32) for n in (100, 2, 9))
    ids, kinds = rng.integers(0, 100, (2, 9)), rng.integers(0, 2, (2, 9))
    args = [ex.Arg(i, DType.F32) for i in range(3)]
    source = ex.apply(PointOp.ADD, ex.apply(PointOp.ADD, args[0], args[1]), args[2])
    op = Norm(NormKind.LAYER, (2,), 1e-12, source, ((0, 3), (1, 4)))
    result = run_step(op, [words, types, positions, ids, kinds], isa)
    expected = _reference(words[ids] + types[kinds] + positions, NormKind.LAYER, (2,), 1e-12)
    np.testing.assert_allclose(result.outputs[0], expected, atol=2e-6)
    assert result.status == 0
    ids[1, 8] = 100
    assert run_step(op, [words, types, positions, ids, kinds], isa).status == 1


def test_float64_is_normalised_in_float64() -> None:
    x = np.random.default_rng(2).standard_normal((3, 50))
    op = Norm(NormKind.LAYER, (1,), 1e-5, ex.Arg(0, DType.F64), stores=(ex.Acc(DType.F64),))
    # epsilon is a float32
    np.testing.assert_allclose(run_step(op, [x]).outputs[0], _reference(x, NormKind.LAYER, (1,), 1e-5), atol=1e-11)


def test_float16_is_normalised_in_float32() -> None:
    x = np.random.default_rng(2).standard_normal((3, 50)).astype(np.float16)
    store = ex.cast(ex.Acc(), DType.F16)
    op = Norm(NormKind.LAYER, (1,), 1e-5, ex.cast(ex.Arg(0, DType.F16), DType.F32), stores=(store,))
    np.testing.assert_allclose(run_step(op, [x]).outputs[0], _reference(x, NormKind.LAYER, (1,), 1e-5), atol=2e-3)


def test_empty_batch_needs_no_launch() -> None:
    assert not run_step(Norm(NormKind.LAYER, (1,), 1e-5), [np.zeros((0, 8), np.float32)]).launches
