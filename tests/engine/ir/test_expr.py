"""Expressions: structure, substitution, evaluation against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp

X, Y = ex.Arg(0, DType.F32), ex.Arg(1, DType.F32)


def test_structurally_equal_expressions_are_equal_and_hash_alike() -> None:
    a = ex.apply(PointOp.ADD, X, ex.const(1.0))
    b = ex.apply(PointOp.ADD, ex.Arg(0, DType.F32), ex.const(1.0))
    assert a == b and hash(a) == hash(b)
    assert a != ex.apply(PointOp.ADD, X, ex.const(2.0))


def test_constants_tell_zeros_apart_and_equal_themselves() -> None:
    assert ex.const(0.0) != ex.const(-0.0)
    assert ex.const(math.nan) == ex.const(math.nan)


def test_constants_are_rounded_to_their_type() -> None:
    assert ex.const(0.1).value == float(np.float32(0.1))
    assert ex.const(3.9, DType.I32).value == 3


def test_casts_to_8_bit_floats_round_to_nearest_and_saturate() -> None:
    x = np.array([1.0625, 1.1875, -3.3, 448, 464, 465, -1e30, np.inf, np.nan, 2.0**-10, 1.1 * 2.0**-10], np.float64)
    got = ex.evaluate(ex.cast(ex.Arg(0, DType.F64), DType.F8E4M3), [x])
    assert got.dtype == DType.F8E4M3.numpy
    expected = [1, 1.25, -3.25, 448, 448, 448, -448, 448, np.nan, 0, 2.0**-9]
    np.testing.assert_array_equal(got.astype(np.float64), expected)
    assert ex.const(500.0, DType.F8E4M3).value == 448
    assert ex.cast(ex.const(-1e9), DType.F8E4M3) == ex.const(-448.0, DType.F8E4M3)


def test_walk_gives_each_shared_node_once_operands_first() -> None:
    shared = ex.apply(PointOp.MUL, X, Y)
    root = ex.apply(PointOp.ADD, shared, shared)
    assert list(ex.walk(root)) == [X, Y, shared, root]
    assert ex.flops(root) == 2


def test_a_deep_shared_chain_stays_linear() -> None:
    root: ex.Expr = X
    for _ in range(2000):
        root = ex.apply(PointOp.ADD, root, root)
    assert sum(1 for _ in ex.walk(root)) == 2001
    assert ex.arguments(ex.substitute(root, {0: Y})) == (1,)


def test_deep_shared_chains_compare_and_print_quickly() -> None:
    a: ex.Expr = X
    b: ex.Expr = ex.Arg(0, DType.F32)
    for _ in range(2000):
        a, b = ex.apply(PointOp.ADD, a, a), ex.apply(PointOp.ADD, b, b)
    assert a == b
    assert a != ex.apply(PointOp.ADD, b, b)
    assert len(ex.to_text(a)) < 10_000


def test_comparisons_are_bool_and_where_takes_its_branches_type() -> None:
    condition = ex.apply(PointOp.LT, X, Y)
    assert condition.dtype is DType.BOOL
    assert ex.apply(PointOp.WHERE, condition, X, Y).dtype is DType.F32


def test_casts_of_constants_fold_and_of_the_same_type_vanish() -> None:
    assert ex.cast(X, DType.F32) is X
    assert ex.cast(ex.const(2.7), DType.I64) == ex.Const(2, DType.I64)


@pytest.mark.parametrize(("a", "b", "expected"), [(7, 2, 3), (-7, 2, -3), (7, -2, -3), (-7, -2, 3), (0, 5, 0)])
def test_integer_division_truncates(a: int, b: int, expected: int) -> None:
    root = ex.apply(PointOp.DIV, ex.Arg(0, DType.I64), ex.Arg(1, DType.I64))
    assert ex.evaluate(root, [np.int64(a), np.int64(b)]) == expected


def test_evaluate_broadcasts_and_keeps_the_type() -> None:
    root = ex.apply(PointOp.MAX, ex.apply(PointOp.ADD, ex.Acc(), X), ex.const(0.0))
    acc = np.float32([[1, -5], [2, 3]])
    result = ex.evaluate(root, [np.float32([1, 2])], acc)
    np.testing.assert_array_equal(result, np.float32([[2, 0], [3, 5]]))
    assert result.dtype == np.float32


def test_text_is_readable() -> None:
    root = ex.apply(PointOp.MIN, ex.apply(PointOp.MAX, ex.apply(PointOp.ADD, ex.Acc(), Y), ex.const(0)), ex.const(6))
    assert ex.to_text(root) == "min(max((acc + %1), 0), 6)"
