"""Norms and softmax against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Norm, NormKind, Op, Softmax
from engine.plan.tensor import Tensor, row_major
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import SM_80
from engine.targets.cuda.covering import ACC, F16, F32, I64, make_step, weight
from engine.targets.cuda.families import family_of
from engine.targets.cuda.normalize import lower
from tests.engine.targets.cuda.cases import (
    FLOATS,
    check,
    fed,
    narrowed,
    placed,
    ragged,
    reordered,
    rng_of,
    wide,
    wide_arg,
)
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner


def norm_op(kind: int, axes: tuple[int, ...], dtype: DType) -> Op:
    """Layer, RMS and L2 norm, softmax and log-softmax, by number."""
    source, stores = wide_arg(0, dtype), (narrowed(dtype),)
    if kind < 3:
        return Norm(list(NormKind)[kind], axes, 1e-5, source, stores=stores)
    return Softmax(axes[0], kind == 4, source, stores)


def test_norms_match_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("norm"), []
    for i in range(count):
        rows, columns = ragged(rng, 200), ragged(rng, 5000, 8 if rng.random() < 0.6 else 1)
        kind = list(NormKind)[i % 3]
        residual = i % 2 == 0
        source = cv.add(cv.arg(0), cv.arg(3)) if residual else cv.arg(0)
        inputs: list[cv.Given] = [(F16, (rows, columns)), weight(columns), weight(columns)]
        inputs += [(F16, (rows, columns))] if residual else []
        stores = (cv.SCALE_SHIFT, source) if i % 5 == 0 else (cv.SCALE_SHIFT,)
        step = make_step(Norm(kind, (1,), 1e-5, source, stores=stores), inputs)
        cases.append(Case(f"{kind} {rows}x{columns}", step, columns, computed=F32))
    check(runner, cases)


def test_norms_over_any_axes_in_every_type(runner: Runner, count: int) -> None:
    rng, cases = rng_of("axes"), []
    for i in range(2 * count):
        rank = int(rng.integers(1, 6))
        shape = tuple(ragged(rng, 40 if rank < 4 else 9) for _ in range(rank))
        axes = tuple(axis for axis in range(rank) if rng.random() < 0.5) or (int(rng.integers(rank)),)
        dtype = FLOATS[i % 4]
        kind = int(rng.integers(5))
        axes = axes if kind < 3 else axes[:1]
        op = norm_op(kind, axes, dtype)
        step = make_step(op, [placed(rng, dtype, shape) if i % 3 else (dtype, shape)])
        step = reordered(step, rng) if i % 2 else step
        cases.append(Case(f"{op} {shape} {step.inputs[0].strides}", step, int(np.prod(shape)), computed=wide(dtype)))
    check(runner, cases)


def test_group_and_instance_norms_match_float64(runner: Runner, count: int) -> None:
    """On images with their channels inner and outer; scale and shift a channel."""
    rng, cases = rng_of("group"), []
    for i in range(count):
        n, groups, per_group = int(rng.integers(1, 4)), int(rng.integers(1, 5)), ragged(rng, 32, 8 if i % 3 else 1)
        shape = (n, groups, per_group, ragged(rng, 30), ragged(rng, 30))
        axes = [(2, 3, 4), (3, 4), (0, 3, 4)][i % 3]  # group, instance and batch norm
        dtype = FLOATS[i % 2]
        value = ex.apply(ex.PointOp.MUL, ACC, wide_arg(1, dtype))
        stores = (ex.cast(ex.apply(ex.PointOp.ADD, value, wide_arg(2, dtype)), dtype),)
        op = Norm(NormKind.LAYER, axes, 1e-5, wide_arg(0, dtype), stores=stores)
        channel = weight(groups, per_group, 1, 1, dtype=dtype)
        image: cv.Given = (dtype, shape)
        step = make_step(op, [image, channel, channel])
        if i % 4 > 1:
            inner = (0, 3, 4, 1, 2)
            image_inner, *rest = step.inputs
            step = replace(
                step, inputs=(_ordered(image_inner, inner), *rest), outputs=(_ordered(step.outputs[0], inner),)
            )
        cases.append(Case(f"{shape} {axes} {i % 4 > 1}", step, int(np.prod(shape)), computed=F32))
    check(runner, cases)


def _ordered(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    return replace(tensor, strides=row_major(tensor.shape, order))


def test_long_rows_match_float64(runner: Runner, count: int) -> None:
    """Longer than registers hold: many rows, and few ones split over blocks; along the innermost axis and across it."""
    rng, cases = rng_of("long"), []
    longest = 60_000 if isinstance(runner, EmulatedRunner) else 3_000_000
    for i in range(count if isinstance(runner, EmulatedRunner) else count // 5):
        length = int(rng.integers(16_385, longest)) // (8 if i % 2 else 1) * (8 if i % 2 else 1)
        other = int(rng.integers(1, 4)) if i % 4 else int(rng.integers(4, 20))
        dtype = FLOATS[i % 4]
        shape, axis = ((other, length), 1) if i % 3 else ((length // 4, other), 0)
        op = norm_op(i % 5, (axis,), dtype)
        given: cv.Given = fed(dtype, shape, 1, 0) if i % 6 else fed(dtype, shape, 0, 0)
        cases.append(Case(f"{op} {shape}", make_step(op, [given]), length, computed=wide(dtype)))
    check(runner, cases)


SPECIAL_SHAPES = {"resident": (8, 40), "small": (8, 5), "long": (8, 20_000), "columns": (400, 8)}


@pytest.mark.parametrize("where", SPECIAL_SHAPES)
def test_infinities_and_nans_go_where_the_reference_has_them(runner: Runner, where: str) -> None:
    shape = SPECIAL_SHAPES[where]
    axis = 0 if where == "columns" else 1
    content = rng_of(where).standard_normal(shape).astype(np.float32)
    rows = content if axis else content.T
    rows[0] = -np.inf
    rows[1, ::3] = -np.inf
    rows[2, 3] = np.inf
    rows[3, 4] = np.nan
    rows[4] = 0.0
    rows[5] = np.inf
    rows[6, -1], rows[6, 0] = np.nan, np.inf
    cases = []
    for dtype in (F16, DType.F64):
        for kind in range(5):
            step = make_step(norm_op(kind, (axis,), dtype), [(dtype, shape)])
            feeds = {0: content.astype(dtype.numpy)}
            cases.append(Case(f"{where} {kind} {dtype}", step, shape[axis], feeds, computed=wide(dtype)))
    check(runner, cases)


def test_a_mean_far_from_zero_costs_little(runner: Runner) -> None:
    """The squares are those around the mean, in every kernel: a thousand times the deviation is 2⁻²² · 10³ at most."""
    rng, cases = rng_of("mean"), []
    for shape, axis in (((6, 300), 1), ((3, 40_000), 1), ((5_000, 24), 0)):
        content = (1000.0 + rng.standard_normal(shape)).astype(np.float32)
        step = make_step(norm_op(0, (axis,), F32), [(F32, shape)])
        # `length` widens the bound: the deviations are known to 1000 · 2⁻²⁴ each.
        cases.append(Case(f"{shape}", step, 1000**2, {0: content}, computed=F32))
    check(runner, cases)


def test_embedding_norm_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("embedding"), []
    for _ in range(40):
        batch, sequence, features = int(rng.integers(1, 5)), ragged(rng, 100), ragged(rng, 800, 8)
        step = cv.embedding_norm(batch, sequence, features)
        ids = rng.integers(-1000, 1000, (batch, sequence))
        cases.append(Case(f"{batch}x{sequence}x{features}", step, features, {3: ids}))
    check(runner, cases)


def test_softmax_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("softmax"), []
    for i in range(count):
        shape = (int(rng.integers(1, 4)), ragged(rng, 40), ragged(rng, 5000, 8 if i % 3 else 1))
        step = make_step(Softmax(2, i % 2 == 1, cv.arg(0), (ACC,)), [(F16, shape)])
        cases.append(Case(f"{shape} log={i % 2}", step, shape[2], computed=F32))
    check(runner, cases)


def test_no_rows_need_no_launch(runner: Runner) -> None:
    for kind in range(5):
        step = make_step(norm_op(kind, (1,), F16), [(F16, (0, 7))])
        assert lower(step, runner.context) == []


def test_an_empty_table_has_no_rows_to_select() -> None:
    op = Norm(NormKind.LAYER, (2,), 1e-5, cv.arg(0), ((0, 1),), (cv.stored(ACC),))
    step = make_step(op, [(F16, (0, 8)), (I64, (2, 3))])
    with pytest.raises(ShapeError, match="size 0"):
        family_of(op).lower(step, EmulatedRunner(SM_80).context)
