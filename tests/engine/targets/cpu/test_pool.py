"""Pools against a direct evaluation in float64, checked once against ONNX's reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Pool, PoolKind
from tests.engine.targets.cpu.steps import ISAS, Layout, place, run_step

CASES = [
    ((2, 5, 9, 9), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1)),
    ((1, 37, 8, 7), (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    ((1, 64, 7, 7), (3, 2), (1, 3), ((0, 1), (1, 0)), (1, 1)),
    ((1, 130, 12, 12), (3, 3), (2, 2), ((1, 1), (2, 2)), (2, 2)),
    ((2, 3, 17), (4,), (3,), ((2, 1),), (1,)),
    ((1, 4, 6, 7, 8), (2, 3, 2), (2, 2, 2), ((0, 1), (1, 1), (0, 0)), (1, 1, 1)),
]


def _reference(x: np.ndarray, op: Pool, shape: tuple[int, ...]) -> np.ndarray:
    result = np.empty(shape)
    sizes = x.shape[2:]
    for place_ in np.ndindex(*shape[2:]):
        values, counted = [], 0
        for taps in np.ndindex(*op.kernel):
            at = [
                o * s - p[0] + t * d
                for o, s, p, t, d in zip(place_, op.strides, op.pads, taps, op.dilations, strict=True)
            ]
            inside = all(0 <= i < n for i, n in zip(at, sizes, strict=True))
            padded = all(-p[0] <= i < n + p[1] for i, n, p in zip(at, sizes, op.pads, strict=True))
            counted += padded if op.count_include_pad else inside
            if inside:
                values.append(x[(slice(None), slice(None), *at)].astype(np.float64))
        total = np.max(values, axis=0) if op.kind is PoolKind.MAX else np.sum(values, axis=0) / counted
        result[(slice(None), slice(None), *place_)] = total
    return result


def _order(rank: int) -> tuple[int, ...]:
    return (0, *range(2, rank), 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("ceil", "include"), list(itertools.product((False, True), (False, True))))
@pytest.mark.parametrize("kind", PoolKind)
@pytest.mark.parametrize(("shape", "kernel", "strides", "pads", "dilations"), CASES)
def test_pool_matches_float64(
    shape: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, ...], pads: tuple[tuple[int, int], ...],
    dilations: tuple[int, ...], kind: PoolKind, ceil: bool, include: bool, isa: str,
) -> None:  # fmt: skip
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    op = Pool(kind, kernel, strides, pads, dilations, ceil, include)
    order = _order(len(shape))
    result = run_step(op, [place(x, Layout(order))], isa, [Layout(order)]).outputs[0]
    np.testing.assert_allclose(result, _reference(x, op, result.shape), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", PoolKind)
def test_pool_matches_the_onnx_reference(kind: PoolKind) -> None:
    helper = pytest.importorskip("onnx.helper")
    reference = pytest.importorskip("onnx.reference")
    x = np.random.default_rng(0).standard_normal((1, 3, 9, 10)).astype(np.float32)
    name = "MaxPool" if kind is PoolKind.MAX else "AveragePool"
    node = helper.make_node(name, ["x"], ["y"], kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1], ceil_mode=1)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", 1, x.shape)], [helper.make_tensor_value_info("y", 1, None)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    expected = reference.ReferenceEvaluator(model).run(None, {"x": x})[0]
    op = Pool(kind, (3, 2), (2, 2), ((1, 1), (0, 1)), (1, 1), True)
    np.testing.assert_allclose(run_step(op, [place(x, Layout((0, 2, 3, 1)))]).outputs[0], expected, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [DType.I8, DType.U8, DType.F64, DType.F16], ids=lambda d: d.value)
def test_maximum_of_other_dtypes(dtype: DType, isa: str) -> None:
    x = (np.random.default_rng(0).standard_normal((2, 33, 6, 6)) * 50).astype(np.int8).astype(dtype.numpy)
    op = Pool(PoolKind.MAX, (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1), stores=(ex.Acc(dtype),))
    result = run_step(op, [place(x, Layout((0, 2, 3, 1)))], isa).outputs[0]
    np.testing.assert_array_equal(result, x.reshape(2, 33, 3, 2, 3, 2).max((3, 5)))


def test_infinities_and_nan_pass_through_a_maximum() -> None:
    x = np.full((1, 2, 4, 4), -np.inf, np.float32)
    x[0, 1, 1, 1] = np.nan
    op = Pool(PoolKind.MAX, (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1))
    result = run_step(op, [place(x, Layout((0, 2, 3, 1)))]).outputs[0]
    assert np.isnan(result[0, 1, 0, 0])
    assert (result[0, 0] == -np.inf).all()


def test_epilogue_reads_a_scale_per_channel() -> None:
    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal((2, 5, 4, 4)).astype(np.float32), rng.standard_normal((5, 1, 1)).astype(np.float32)
    store = ex.apply(PointOp.MUL, ex.Acc(), ex.Arg(1, DType.F32))
    op = Pool(PoolKind.AVERAGE, (4, 4), (1, 1), ((0, 0), (0, 0)), (1, 1), stores=(store,))
    result = run_step(op, [place(x, Layout((0, 2, 3, 1))), scale]).outputs[0]
    np.testing.assert_allclose(result, x.mean((2, 3), keepdims=True) * scale, atol=1e-6)
