"""Symbolic dimensions are exact: every identity holds for every size."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ShapeError
from engine.ir import dim as d
from engine.ir.dtype import DType
from engine.ir.graph import Value
from engine.ir.ops import Gemm, Reshape

B, S = d.symbol("b"), d.symbol("s")


def dims() -> st.SearchStrategy[d.Dim]:
    leaf: st.SearchStrategy[d.Dim] = st.one_of(st.integers(0, 9), st.just(B), st.just(S))

    def grow(children: st.SearchStrategy[d.Dim]) -> st.SearchStrategy[d.Dim]:
        pairs = st.tuples(children, children)
        return st.one_of(
            pairs.map(lambda p: p[0] + p[1]),
            pairs.map(lambda p: p[0] - p[1]),
            pairs.map(lambda p: p[0] * p[1]),
            pairs.map(lambda p: d.minimum(*p)),
            pairs.map(lambda p: d.maximum(*p)),
            st.tuples(children, st.integers(1, 7)).map(lambda p: d.floordiv(*p)),
            st.tuples(children, st.integers(1, 7)).map(lambda p: d.mod(*p)),
        )

    return st.recursive(leaf, grow, max_leaves=8)


SIZES = st.fixed_dictionaries({"b": st.integers(1, 50), "s": st.integers(1, 50)})


@given(dims(), dims(), SIZES)
def test_arithmetic_agrees_with_integers(a: d.Dim, b: d.Dim, sizes: dict[str, int]) -> None:
    x, y = d.evaluate(a, sizes), d.evaluate(b, sizes)
    assert d.evaluate(a + b, sizes) == x + y
    assert d.evaluate(a - b, sizes) == x - y
    assert d.evaluate(a * b, sizes) == x * y


@given(dims(), st.integers(1, 9), SIZES)
def test_division_agrees_with_integers(a: d.Dim, b: int, sizes: dict[str, int]) -> None:
    x = d.evaluate(a, sizes)
    assert d.evaluate(d.floordiv(a, b), sizes) == x // b
    assert d.evaluate(d.ceildiv(a, b), sizes) == -(-x // b)
    assert d.evaluate(d.mod(a, b), sizes) == x % b


@given(dims(), SIZES)
def test_substituting_the_sizes_is_evaluation(a: d.Dim, sizes: dict[str, int]) -> None:
    assert d.substitute(a, dict(sizes)) == d.evaluate(a, sizes)


def test_equal_mathematics_is_equal_structure() -> None:
    assert (B + S) * (B + S) == B * B + 2 * B * S + S * S
    assert B * S * 384 // (B * S) == 384
    assert (B * S * 384) // (S * 12) == B * 32
    assert B - B == 0 and isinstance(B - B, int)


def test_the_end_of_an_axis_is_written_as_a_huge_number() -> None:
    assert d.minimum(S, 2**63 - 1) == S
    assert d.minimum(S, 2**31 - 1) == S
    assert d.maximum(S, 0) == S


def test_sizes_that_are_missing_are_named() -> None:
    with pytest.raises(KeyError, match="s"):
        d.evaluate(B * S, {"b": 2})


def test_division_by_zero_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        d.floordiv(B, 0)


def _value(*shape: d.Dim) -> Value:
    return Value("", DType.F32, shape)


@pytest.mark.parametrize(
    ("infer", "words"),
    [
        (lambda: Reshape((7, 0)).infer([_value(2, 3)]), "Reshape: 6 elements into shape [7, 0] of 0"),
        (lambda: Gemm().infer([_value(B, 3), _value(4, 5)]), "Gemm: inner sizes differ: [b, 3] @ [4, 5]"),
    ],
    ids=["reshape", "gemm"],
)
def test_shapes_in_errors_are_numbers_and_bare_symbols(infer: Callable[[], object], words: str) -> None:
    with pytest.raises(ShapeError, match=re.escape(words)):
        infer()
