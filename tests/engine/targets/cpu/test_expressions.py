"""Every operation of an expression on every dtype it has a meaning for, against `engine.ir.expr.evaluate`."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Pointwise
from engine.targets.cpu.codegen.isa import host_isas
from tests.engine.targets.cpu.steps import ISAS, run_step

FLOATS = [DType.F64, DType.F32, DType.F16, DType.BF16]
INTS = [d for d in DType if d.is_int]
SIGNED = [d for d in INTS if d.is_signed]
ARITHMETIC = [PointOp.ADD, PointOp.SUB, PointOp.MUL, PointOp.DIV, PointOp.MIN, PointOp.MAX, PointOp.MOD, PointOp.FMOD]
UNARY = [PointOp.NEG, PointOp.ABS, PointOp.SIGN]
FLOAT_UNARY = [PointOp.FLOOR, PointOp.CEIL, PointOp.ROUND, *sorted(ex.UNARY_FLOAT, key=lambda op: op.value)]
BITWISE = [PointOp.BITAND, PointOp.BITOR, PointOp.BITXOR, PointOp.SHL, PointOp.SHR]
LOGIC = [PointOp.AND, PointOp.OR, PointOp.XOR]
COMPARE = [PointOp.EQ, PointOp.LT, PointOp.LE]
# A few roundings of the dtype: the operations are exact or within 3 units in the last place.
RTOL = {DType.F64: 1e-14, DType.F32: 4e-7, DType.F16: 1e-3, DType.BF16: 8e-3}

CASES = [
    *itertools.product(ARITHMETIC, FLOATS + INTS),
    *itertools.product(UNARY, FLOATS + INTS),
    *itertools.product(FLOAT_UNARY, FLOATS),
    *itertools.product([*BITWISE, PointOp.BITNOT], INTS),
    *itertools.product([*LOGIC, PointOp.NOT], [DType.BOOL]),
    *itertools.product(COMPARE, FLOATS + INTS + [DType.BOOL]),
    *itertools.product([PointOp.ISNAN, PointOp.ISINF], FLOATS),
    *itertools.product([PointOp.POW], FLOATS),
    *itertools.product([PointOp.WHERE], [DType.F32, DType.I64, DType.BOOL, DType.F16]),
]


def _values(dtype: DType, seed: int, size: int = 203) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype is DType.BOOL:
        return rng.integers(0, 2, size).astype(bool)
    if dtype.is_int:
        info = np.iinfo(dtype.numpy)
        small = rng.integers(max(info.min, -9), 10, size)
        small[: size // 4] = rng.integers(max(info.min, -(2**31)), min(info.max, 2**31 - 1), size // 4)
        small[:2] = [max(info.min, -(2**62)), min(info.max, 2**62)]
        return small.astype(dtype.numpy)
    values = rng.standard_normal(size) * 3
    values[:8] = [0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 0.5]
    return values.astype(dtype.numpy)


def _expression(op: PointOp, dtype: DType) -> tuple[ex.Expr, list[np.ndarray]]:
    if op is PointOp.WHERE:
        inputs = [_values(DType.BOOL, 0), _values(dtype, 1), _values(dtype, 2)]
    elif op in {*ARITHMETIC, *BITWISE, *LOGIC, *COMPARE, PointOp.POW}:
        inputs = [_values(dtype, 1), np.roll(_values(dtype, 2), 3)]
    else:
        inputs = [_values(dtype, 1)]
    if op is PointOp.DIV and dtype.is_signed and dtype.is_int:
        for x in inputs:
            x[x == np.iinfo(dtype.numpy).min] = 5  # of this one the reference has no absolute value
    if op in (PointOp.SHL, PointOp.SHR):
        inputs[1] = (np.abs(inputs[1].astype(np.float64)) % (8 * dtype.itemsize + 2)).astype(dtype.numpy)
    return ex.apply(op, *(ex.Arg(i, DType.of(x.dtype)) for i, x in enumerate(inputs))), inputs


def _check(expression: ex.Expr, inputs: list[np.ndarray], isa: str, rtol: float = 0) -> None:
    # 16-bit floats are computed wider, so the reference is too.
    wide = [x.astype(np.float64) if DType.of(x.dtype).is_float else x for x in inputs]
    leaves = {i: ex.Arg(i, DType.of(x.dtype)) for i, x in enumerate(wide)}
    reference = expression
    if isinstance(expression, ex.Apply) and expression.op is not PointOp.CAST:
        arguments = [ex.substitute(arg, leaves) for arg in expression.args]
        reference = ex.apply(expression.op, *arguments)
    with np.errstate(all="ignore"):
        expected = ex.evaluate(reference, wide).astype(expression.dtype.numpy)
        result = run_step(Pointwise((expression,)), inputs, isa).outputs[0]
        if expression.dtype.is_float:
            np.testing.assert_allclose(result.astype(np.float64), expected.astype(np.float64), rtol=rtol, atol=rtol)
        else:
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("op", "dtype"), CASES, ids=lambda v: v.value)
def test_operation_matches_the_reference(op: PointOp, dtype: DType, isa: str) -> None:
    expression, inputs = _expression(op, dtype)
    _check(expression, inputs, isa, RTOL.get(dtype, 0))


@pytest.mark.parametrize("isa", host_isas())
@pytest.mark.parametrize("target", [d for d in DType if d is not DType.STRING], ids=lambda d: d.value)
@pytest.mark.parametrize("source", [d for d in DType if d is not DType.STRING], ids=lambda d: d.value)
def test_cast_matches_numpy(source: DType, target: DType, isa: str) -> None:
    x = _values(source, 5)
    if source.is_float and not target.is_float and target is not DType.BOOL:
        x = np.abs(np.where(np.isfinite(x), x, x.dtype.type(0)))  # beyond the range, no result is promised
    if source.is_int and target in (DType.F16, DType.BF16):
        x = x % 100
    _check(ex.cast(ex.Arg(0, source), target), [x], isa)


def test_float_to_narrow_integer_wraps_like_numpy() -> None:
    x = np.array([-1.9, -1.0, 255.5, 256.0, 300.7], np.float32)
    result = run_step(Pointwise((ex.cast(ex.Arg(0, DType.F32), DType.U8),)), [x]).outputs[0]
    np.testing.assert_array_equal(result, [255, 255, 255, 0, 44])


@pytest.mark.parametrize("exponent", [-4, -2, -1, 0, 1, 2, 3, 4, 0.5, 2.5, 7])
def test_constant_power_matches_float64(exponent: float) -> None:
    x = np.abs(_values(DType.F32, 3))
    power = ex.apply(PointOp.POW, ex.Arg(0, DType.F32), ex.const(exponent))
    with np.errstate(all="ignore"):
        expected = x.astype(np.float64) ** exponent
    np.testing.assert_allclose(run_step(Pointwise((power,)), [x]).outputs[0], expected, rtol=1e-6)


def test_integer_power_wraps() -> None:
    base, exponent = np.array([2, -3, 0, 7, 10], np.int32), np.array([10, 3, 0, 15, 1], np.int32)
    power = ex.apply(PointOp.POW, ex.Arg(0, DType.I32), ex.Arg(1, DType.I32))
    result = run_step(Pointwise((power,)), [base, exponent]).outputs[0]
    np.testing.assert_array_equal(result, np.power(base, exponent))


def test_shared_subexpression_is_computed_once() -> None:
    x = ex.Arg(0, DType.F32)
    shared = ex.apply(PointOp.EXP, x)
    store = ex.apply(PointOp.MUL, shared, ex.apply(PointOp.ADD, shared, shared))
    result = run_step(Pointwise((store,)), [np.float32([0, 1, 2])])
    np.testing.assert_allclose(result.outputs[0], 2 * np.exp(2 * np.float64([0, 1, 2])), rtol=1e-6)
    # One exponential, written once for whole vectors and once for the rest of a row.
    assert result.launches[0].spec.ir().count("ashr") == 2


def test_operation_without_meaning_is_refused() -> None:
    with pytest.raises(UnsupportedOp, match="bitand on f32"):
        run_step(Pointwise((ex.apply(PointOp.BITAND, ex.Arg(0, DType.F32), ex.Arg(0, DType.F32)),)), [np.ones(3, "f")])


def test_smallest_integer_by_minus_one_and_by_zero_does_not_trap() -> None:
    x = np.array([-(2**31), -(2**31), 7], np.int32)
    by = np.array([-1, 0, 0], np.int32)
    stores = tuple(ex.apply(op, ex.Arg(0, DType.I32), ex.Arg(1, DType.I32)) for op in (PointOp.DIV, PointOp.MOD))
    result = run_step(Pointwise(stores), [x, by])
    np.testing.assert_array_equal(result.outputs[0], [-(2**31), 0, 0])
    np.testing.assert_array_equal(result.outputs[1], [0, 0, 0])


def test_deep_chain_of_shared_subexpressions_stays_linear() -> None:
    value: ex.Expr = ex.Arg(0, DType.F32)
    for _ in range(60):  # written out as a tree, this has 2⁶⁰ leaves
        value = ex.apply(PointOp.MUL, value, ex.apply(PointOp.SIGMOID, value))
    result = run_step(Pointwise((value,)), [np.float32([3, 40])])
    np.testing.assert_allclose(result.outputs[0], ex.evaluate(value, [np.float64([3, 40])]), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("isa", host_isas())
def test_8_bit_floats_are_read_exactly_and_rounded_to_nearest(isa: str) -> None:
    """Every number, the middles between two (which go to the even one), their neighbours, and what saturates."""
    every = np.arange(256, dtype=np.uint8).view(DType.F8E4M3.numpy)
    read = run_step(Pointwise((ex.cast(ex.Arg(0, DType.F8E4M3), DType.F32),)), [every], isa).outputs[0]
    np.testing.assert_array_equal(read, every.astype(np.float32))
    known = every[:127].astype(np.float32)
    middles = (known[1:] + known[:-1]) / 2
    beside = [np.nextafter(middles, np.float32(to), dtype=np.float32) for to in (-np.inf, np.inf)]
    far = np.array([449, 464, 465, 480, 3e38, np.inf, np.nan, 1e-9, 1e-40], np.float32)
    x = np.concatenate([known, middles, *beside, far])
    x = np.concatenate([x, -x])
    written = run_step(Pointwise((ex.cast(ex.Arg(0, DType.F32), DType.F8E4M3),)), [x], isa).outputs[0]
    expected = np.clip(x, -448, 448).astype(DType.F8E4M3.numpy)
    missing = np.isnan(x)
    np.testing.assert_array_equal(np.isnan(written.astype(np.float32)), missing)
    np.testing.assert_array_equal(written.view(np.uint8)[~missing], expected.view(np.uint8)[~missing])
