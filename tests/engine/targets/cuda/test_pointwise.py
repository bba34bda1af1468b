"""Point-wise chains and copies against float64, on random ragged shapes (conftest.py says on what)."""

from __future__ import annotations

from dataclasses import replace
from math import erfc, sqrt

import numpy as np
import pytest

from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Pointwise
from engine.plan.tensor import row_major
from engine.targets.cuda import covering as cv
from engine.targets.cuda.codegen import bounds_of
from engine.targets.cuda.covering import F16, F32, I64, make_step
from engine.targets.cuda.pointwise import lower
from tests.engine.targets.cuda.cases import (
    FLOATS,
    INTEGERS,
    SIGNED,
    check,
    fed,
    placed,
    ragged,
    reordered,
    rng_of,
    wide,
)
from tests.engine.targets.cuda.harness import Case, Runner

EVERY = (*FLOATS, *INTEGERS, DType.BOOL)


def test_pointwise_matches_float64(runner: Runner, count: int) -> None:
    rng, cases = rng_of("pointwise"), []
    for i in range(count):
        rank = int(rng.integers(1, 5))
        shape = tuple(ragged(rng, 40, 8 if axis == rank - 1 and i % 2 else 1) for axis in range(rank))
        other = tuple(size if rng.random() < 0.6 else 1 for size in shape)[int(rng.integers(0, rank)) :]
        value = cv.add(cv.mul(cv.arg(0), cv.arg(1, F32)), cv.constant(0.5))
        stores = (cv.stored(cv.gelu(value)), value) if i % 4 == 0 else (cv.stored(cv.relu6(value)),)
        given: cv.Given = fed(F16, shape, int(rng.integers(0, rank)), 0) if i % 3 == 0 else (F16, shape)
        cases.append(Case(f"{shape} {other}", make_step(Pointwise(stores), [given, (F32, other)]), 1, computed=F32))
    check(runner, cases)


@pytest.mark.parametrize("dtype", [F16, DType.BF16])
def test_gelu_of_16_bits_is_good_to_its_rounding(runner: Runner, dtype: DType) -> None:
    """Of every number: half a unit in the last place, and the bound of `gelu_narrow` in kernels/epilogue/math.cuh."""
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(dtype.numpy)
    step = make_step(Pointwise((cv.stored(cv.gelu(cv.arg(0, dtype)), dtype),)), [(dtype, bits.shape)])
    (launch,) = lower(step, runner.context)
    assert "= gelu_narrow(" in launch.kernel.source.text
    with np.errstate(invalid="ignore"):  # NaNs that signal
        got, x = runner.run(step, [launch], [bits])[0].astype(np.float64), bits.astype(np.float64)
    assert np.array_equal(np.isnan(got), np.isnan(x))
    assert got[x == np.inf] == np.inf
    assert abs(got[x == -np.inf]) <= 2.0**-37, "−∞ gives its limit, 0"
    finite = np.isfinite(x)
    got, x = got[finite], x[finite]
    want = np.array([0.5 * value * erfc(-value * sqrt(0.5)) for value in x])
    digits, smallest = (11, 2.0**-24) if dtype is F16 else (8, 2.0**-126)
    half_unit = np.maximum(2.0 ** (np.floor(np.log2(np.maximum(np.abs(want), 1e-300))) - digits), smallest / 2)
    bound = half_unit * (1 + 2.0**-10) + np.where(x > -5.7, 2.0**-14 * np.abs(want), 2.0**-37)
    assert np.all(np.abs(got - want) <= bound)


def clamped(low: float | None, high: float | None, dtype: DType) -> ex.Expr:
    value: ex.Expr = ex.Arg(0, F32)
    value = value if low is None else ex.apply(PointOp.MAX, value, ex.const(low, F32))
    value = value if high is None else ex.apply(PointOp.MIN, ex.const(high, F32), value)
    return cv.stored(value, dtype)


@pytest.mark.parametrize("dtype", [F16, DType.BF16])
def test_what_has_been_rounded_is_bounded(runner: Runner, dtype: DType) -> None:
    """Exactly what is rounded after the bounds: numbers around them that round to them or past them, NaN, infinity."""
    rng = rng_of("bounded")
    special = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-9, -1e-9, 6.0, 1e30, -1e30, 65519.9, 65520.0, 3e38]
    around = [edge * (1 + step * 2.0**-13) for edge in (0.5, 5.0, 6.0, 96.0) for step in range(-40, 41)]
    values = np.concatenate([special, around, rng.standard_normal(3006) * 5]).astype(np.float32)
    for low, high, most in ((0.0, None, 0), (0.0, 6.0, 6), (0.0, 0.5, 0.5), (0.0, 96.0, 96)):
        store = clamped(low, high, dtype)
        bits = int(np.array(most, dtype.numpy).view(np.uint16))
        found = bounds_of(store)
        assert found is not None and found.most == bits
        step = make_step(Pointwise((store,)), [(F32, values.shape)])
        (launch,) = lower(step, runner.context)
        assert f"store_bounded<{'half' if dtype is F16 else 'bfloat16'}, {bits:#x}>" in launch.kernel.source.text
        (got,) = runner.run(step, [launch], [values])
        with np.errstate(over="ignore"):
            want = np.clip(values, low, high).astype(dtype.numpy)
        assert np.array_equal(got.astype(np.float32), want.astype(np.float32), equal_nan=True), (low, high)


@pytest.mark.filterwarnings("error")
def test_other_bounds_are_met_before_rounding() -> None:
    """Zero is not the lower one, the upper one is no number of the type, none of a float or infinite."""
    for low, high in (
        (-1.0, None),
        (None, 6.0),
        (0.0, 0.1),
        (0.0, -2.0),
        (0.0, 0.0),
        (0.0, np.inf),
        (0.0, 7e4),
        (0.5, 6.0),
    ):
        assert bounds_of(clamped(low, high, F16)) is None
    relu = clamped(0.0, None, F16)
    assert bounds_of(relu) is not None
    assert bounds_of(ex.cast(relu, F32)) is None
    assert bounds_of(clamped(0.0, None, F32)) is None
    assert bounds_of(cv.stored(cv.add(cv.relu6(cv.arg(0)), cv.constant(1.0)))) is None


def test_gelu_of_32_bits_is_computed_with_erf(runner: Runner) -> None:
    step = make_step(Pointwise((cv.gelu(cv.arg(0, F32)), cv.stored(cv.gelu(cv.arg(0, F32))))), [(F32, (100,))])
    assert all("= gelu_narrow(" not in launch.kernel.source.text for launch in lower(step, runner.context))
    check(runner, [Case("gelu", step, 1, computed=F32)])


def test_any_rank_and_order(runner: Runner, count: int) -> None:
    """Operands and results whose axes do not lie together: as many row levels as there are axes."""
    rng, cases = rng_of("rank"), []
    for i in range(count):
        rank = int(rng.integers(4, 9))
        shape = tuple(int(rng.integers(1, 5 if rank > 5 else 8)) for _ in range(rank))
        dtype = EVERY[i % len(EVERY)]
        step = make_step(Pointwise((ex.Arg(0, dtype),)), [placed(rng, dtype, shape)])
        if i % 2:
            other = tuple(size if rng.random() < 0.7 else 1 for size in shape)
            store = ex.cast(cv.add(cv.arg(0, F32), cv.arg(1)), F16)
            step = make_step(Pointwise((store,)), [placed(rng, F32, shape), placed(rng, F16, other, 1)])
        cases.append(Case(f"{shape} {step.inputs[0].strides}", reordered(step, rng), 1, computed=F32))
    check(runner, cases)


def test_transposing_copies(runner: Runner, count: int) -> None:
    """Through tiles of shared memory: between layouts, with broadcast operands, two sources, windows, odd sizes."""
    rng, cases, tiled = rng_of("transpose"), [], 0
    for i in range(2 * count):
        dtype = EVERY[i % len(EVERY)] if i % 2 else F16
        outer, y, x = int(rng.integers(1, 4)), ragged(rng, 300, 8 if i % 3 else 1), ragged(rng, 300, 8 if i % 4 else 1)
        y, x = (max(16, y), max(16, x)) if i % 8 else (y, x)
        shape = (outer, y, x) if i % 5 else (outer, y, max(1, x // 8), 8)
        rank = len(shape)
        order = (0, *range(2, rank), 1) if i % 3 else (*range(2, rank), 0, 1)
        source = placed(rng, dtype, shape) if i % 6 == 5 else fed(dtype, shape, 1, 0)
        source = source if i % 6 == 5 else replace(source, strides=row_major(shape, order))
        match i % 4 if dtype is F16 else 0:
            case 1:
                store: ex.Expr = cv.stored(cv.relu6(cv.add(cv.arg(0), cv.arg(1))))
                step = make_step(Pointwise((store,)), [source, (F16, (shape[1], *(1,) * (rank - 2)))])
            case 2:
                both = replace(fed(F16, shape, 1, 1), strides=row_major(shape, order))
                store = cv.stored(cv.add(cv.arg(0), cv.arg(1)))
                step = make_step(Pointwise((store,)), [source, both])
            case 3:
                stores = (cv.add(cv.arg(0), cv.arg(1)), cv.stored(cv.mul(cv.arg(0), cv.arg(1))))
                step = make_step(Pointwise(stores), [source, (F16, shape)])
            case _:
                step = make_step(Pointwise((ex.Arg(0, dtype),)), [source])
        tiled += "transpose.cuh" in lower(step, runner.context)[0].kernel.source.text
        cases.append(Case(f"{shape} {order} {dtype} {i}", step, 1, computed=F32))
    assert tiled > len(cases) // 2
    check(runner, cases)


UNARY = (
    PointOp.NEG, PointOp.ABS, PointOp.SIGN, PointOp.FLOOR, PointOp.CEIL, PointOp.ROUND, PointOp.ISNAN, PointOp.ISINF,
    *sorted(ex.UNARY_FLOAT, key=lambda op: op.value),
)  # fmt: skip
BINARY = (
    PointOp.ADD, PointOp.SUB, PointOp.MUL, PointOp.DIV, PointOp.POW, PointOp.MIN, PointOp.MAX, PointOp.MOD,
    PointOp.FMOD, PointOp.EQ, PointOp.LT, PointOp.LE,
)  # fmt: skip
INTEGER = (PointOp.BITAND, PointOp.BITOR, PointOp.BITXOR, PointOp.SHL, PointOp.SHR)
LOGICAL = (PointOp.AND, PointOp.OR, PointOp.XOR)
# Where a function is defined; the others are on the line.
DOMAINS = {
    PointOp.SQRT: (0.0, 9.0), PointOp.LOG: (0.01, 9.0), PointOp.ASIN: (-1.0, 1.0), PointOp.ACOS: (-1.0, 1.0),
    PointOp.ATANH: (-0.9, 0.9), PointOp.ACOSH: (1.0, 9.0), PointOp.TAN: (-1.5, 1.5), PointOp.POW: (0.1, 3.0),
}  # fmt: skip
SIZE = 203


def operand_of(rng: np.random.Generator, op: PointOp, dtype: DType, second: bool) -> np.ndarray:
    if dtype is DType.BOOL:
        return rng.integers(0, 2, SIZE).astype(np.bool_)
    if dtype.is_int:
        limits = np.iinfo(dtype.numpy)
        if op in (PointOp.SHL, PointOp.SHR, PointOp.POW) and second:
            return rng.integers(0, 8 if op is PointOp.POW else 8 * dtype.itemsize + 3, SIZE).astype(dtype.numpy)
        values = rng.integers(limits.min, limits.max, SIZE, dtype=dtype.numpy, endpoint=True)
        small = rng.integers(max(limits.min, -3), 4, SIZE).astype(dtype.numpy)
        values = np.where(rng.random(SIZE) < 0.5, small, values).astype(dtype.numpy)
        if op in (PointOp.MOD, PointOp.FMOD) and second:
            values[values == 0] = 1  # by zero: no result is right
        values[:1] = limits.min
        return values
    low, high = DOMAINS.get(op, (-4.0, 4.0))
    values = rng.uniform(low, high, SIZE)
    if op in (PointOp.MIN, PointOp.MAX, PointOp.ISNAN, PointOp.ISINF, PointOp.EQ, PointOp.LT, PointOp.LE, PointOp.SIGN):
        values[::7], values[1::7], values[2::7] = np.nan, np.inf, -np.inf
        values[3::7] = np.round(values[3::7])
    return values.astype(dtype.numpy)


def test_every_operation_in_every_type(runner: Runner) -> None:
    rng, cases = rng_of("ops"), []
    table: list[tuple[PointOp, tuple[DType, ...]]] = [
        *((op, FLOATS) for op in (*UNARY, *BINARY)),
        *((op, INTEGERS) for op in (*UNARY[1:5], *BINARY, *INTEGER, PointOp.BITNOT)),
        (PointOp.ROUND, INTEGERS[1:4]),  # NumPy's goes through float64
        (PointOp.NEG, SIGNED),
        *((op, (DType.BOOL,)) for op in (*LOGICAL, PointOp.NOT, PointOp.EQ, PointOp.MIN, PointOp.MAX)),
    ]
    # One kernel a type, with eight operations to a launch.
    for dtype in EVERY:
        ops = [op for op, types in table if dtype in types]
        for start in range(0, len(ops), 8):
            part, stores, arrays = ops[start : start + 8], [], []
            for op in part:
                binary = op in (*BINARY, *INTEGER, *LOGICAL)
                numbers = range(len(arrays), len(arrays) + 1 + binary)
                arrays += [operand_of(rng, op, dtype, second) for second in (False, True)[: 1 + binary]]
                # 16-bit floats are computed in fp32, as the frontend writes it.
                value = ex.apply(op, *(ex.cast(ex.Arg(i, dtype), wide(dtype)) for i in numbers))
                stores.append(value if value.dtype is DType.BOOL else ex.cast(value, dtype))
            step = make_step(Pointwise(tuple(stores)), [(dtype, (SIZE,))] * len(arrays))
            label = f"{dtype} {[op.value for op in part]}"
            cases.append(Case(label, step, 1, dict(enumerate(arrays)), computed=wide(dtype) if dtype.is_float else F32))
    check(runner, cases)


def test_every_cast(runner: Runner) -> None:
    """Every type to every type: floats to integers in their range, integers wrap."""
    rng, cases = rng_of("cast"), []
    for source in EVERY:
        stores = [ex.cast(ex.Arg(0, source), to) for to in EVERY if to is not source]
        content = rng.integers(0, 120, SIZE).astype(source.numpy)
        if source in SIGNED:
            content[::2] = -content[::2]
        step = make_step(Pointwise(tuple(stores)), [(source, (SIZE,))])
        cases.append(Case(f"{source}", step, 1, {0: content}))
    negative = ex.cast(ex.Arg(0, F32), DType.U8)
    step = make_step(Pointwise((negative, ex.cast(ex.Arg(0, F32), DType.U32))), [(F32, (SIZE,))])
    cases.append(Case("negative to unsigned", step, 1, {0: -rng.integers(0, 300, SIZE).astype(np.float32)}))
    check(runner, cases)


def test_where_and_constants(runner: Runner) -> None:
    cases = []
    for dtype in EVERY:
        value = ex.const(1, dtype)
        store = ex.apply(PointOp.WHERE, ex.Arg(0, DType.BOOL), ex.Arg(1, dtype), value)
        step = make_step(Pointwise((store,)), [(DType.BOOL, (7, 1)), (dtype, (7, 30))])
        cases.append(Case(f"where {dtype}", step, 1))
    for value in (np.nan, np.inf, -np.inf, -0.0, 1e-300, 0.1):
        for dtype in (F32, DType.F64):
            store = ex.apply(PointOp.WHERE, ex.Arg(0, DType.BOOL), ex.const(value, dtype), ex.const(2.0, dtype))
            step = make_step(Pointwise((store,)), [(DType.BOOL, (90,))])
            cases.append(Case(f"{value} {dtype}", step, 1, computed=wide(dtype)))
    check(runner, cases)


def test_many_results_take_several_launches(runner: Runner) -> None:
    stores = tuple(cv.stored(cv.add(cv.arg(i), cv.constant(float(i)))) for i in range(19))
    step = make_step(Pointwise(stores), [(F16, (5, 40))] * 19)
    assert len(lower(step, runner.context)) == 3
    check(runner, [Case("19 results", step, 1, computed=F32)])


def test_no_elements_need_no_launch(runner: Runner) -> None:
    assert lower(make_step(Pointwise((ex.Arg(0, F16),)), [(F16, (3, 0, 8))]), runner.context) == []


def test_gathers_of_every_index_type(runner: Runner) -> None:
    rng, cases = rng_of("gather"), []
    for index in (I64, DType.I32):
        for dtype in (F16, F32, I64):
            op = Pointwise((ex.Arg(0, dtype),), ((0, 1),))
            step = make_step(op, [(dtype, (50, 3, 16)), (index, (7, 4))])
            feeds = {1: rng.integers(-50, 50, (7, 4)).astype(index.numpy)}
            cases.append(Case(f"{dtype} by {index}", step, 1, feeds))
    check(runner, cases)


def test_threads_have_several_looked_up_vectors_under_way(runner: Runner) -> None:
    """More of them than a launch has threads: rows where a mask says so, zeros elsewhere."""
    rng, cases = rng_of("unpacked"), []
    few = replace(runner.context, multiprocessors=1)
    for dtype in (F16, F32, DType.F64):
        for columns in (40, 37):
            real = ex.apply(PointOp.NOT, ex.apply(PointOp.EQ, ex.Arg(2, I64), ex.const(0, I64)))
            store = ex.apply(PointOp.WHERE, real, ex.Arg(0, dtype), ex.const(0.0, dtype))
            step = make_step(
                Pointwise((store,), ((0, 1),)),
                [(dtype, (50, columns)), (I64, (29, 67)), (I64, (29, 67, 1))],
            )
            feeds = {1: rng.integers(0, 50, (29, 67)), 2: rng.integers(0, 2, (29, 67, 1))}
            launches = lower(step, few)
            assert "ahead2" in launches[0].kernel.source.name
            cases.append(Case(f"{dtype} {columns}", step, 1, feeds, launches))
    check(runner, cases)


def test_an_empty_table_has_no_rows_to_select(runner: Runner) -> None:
    step = make_step(Pointwise((ex.Arg(0, F16),), ((0, 1),)), [(F16, (0, 8)), (I64, (2,))])
    with pytest.raises(ShapeError, match="size 0"):
        lower(step, runner.context)
