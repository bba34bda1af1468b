"""Symbolic dimensions: exact integer arithmetic over named sizes (`batch`, `sequence`, any dim_param).

A `Dim` is an int, or a `Sym`: a polynomial with integer coefficients over atoms. An atom is a symbol's name or an
operation that no polynomial can express (floor division, minimum, maximum, remainder). Polynomials are kept in one
canonical form, so structural equality is equality of the mathematics; an expression that reduces to a constant is an
int. Shape inference and shape folding use these; `evaluate` makes them concrete when a plan is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias


class DimOp(Enum):
    FLOORDIV = "//"
    MOD = "%"
    MIN = "min"
    MAX = "max"


@dataclass(frozen=True)
class Atom:
    """A sub-expression that is not a polynomial: `op(a, b)`."""

    op: DimOp
    a: Dim
    b: Dim

    def __str__(self) -> str:
        if self.op in {DimOp.MIN, DimOp.MAX}:
            return f"{self.op.value}({self.a}, {self.b})"
        return f"({self.a} {self.op.value} {self.b})"


Factor: TypeAlias = str | Atom
Monomial: TypeAlias = tuple[tuple[Factor, int], ...]  # ((factor, power), …) sorted by text


@dataclass(frozen=True)
class Sym:
    """A non-constant polynomial: ((monomial, coefficient), …), sorted, coefficients non-zero. Build with `symbol`."""

    terms: tuple[tuple[Monomial, int], ...]

    def __add__(self, other: Dim) -> Dim:
        return _from_terms([*self.terms, *_terms(other)])

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return self * -1

    def __sub__(self, other: Dim) -> Dim:
        return self + other * -1

    def __rsub__(self, other: Dim) -> Dim:
        return self * -1 + other

    def __mul__(self, other: Dim) -> Dim:
        if len(self.terms) * len(_terms(other)) > _MAX_PRODUCT:
            raise OverflowError("a symbolic size grows without end")
        return _from_terms([(_multiply(m1, m2), c1 * c2) for m1, c1 in self.terms for m2, c2 in _terms(other)])

    __rmul__ = __mul__

    def __floordiv__(self, other: Dim) -> Dim:
        return floordiv(self, other)

    def __rfloordiv__(self, other: Dim) -> Dim:
        return floordiv(other, self)

    def __mod__(self, other: Dim) -> Dim:
        return mod(self, other)

    def __str__(self) -> str:
        parts = []
        for monomial, coefficient in self.terms:
            factors = [str(f) if power == 1 else f"{f}^{power}" for f, power in monomial]
            if coefficient != 1 or not factors:
                factors.insert(0, str(coefficient))
            parts.append("*".join(factors))
        return " + ".join(parts).replace("+ -", "- ")

    __repr__ = __str__


Dim: TypeAlias = int | Sym


def symbol(name: str) -> Sym:
    """The dimension called `name`."""
    return Sym(((((name, 1),), 1),))


def floordiv(a: Dim, b: Dim) -> Dim:
    """⌊a / b⌋, exact where `b` divides every term of `a`. Raises ZeroDivisionError for b = 0."""
    if b == 0:
        raise ZeroDivisionError(f"{a} // 0")
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    if a == b:
        return 1
    if b == 1:
        return a
    exact = _divide_exactly(a, b)
    return exact if exact is not None else _atom(DimOp.FLOORDIV, a, b)


def ceildiv(a: Dim, b: Dim) -> Dim:
    """⌈a / b⌉ for positive b."""
    exact = None if isinstance(a, int) and isinstance(b, int) else _divide_exactly(a, b)
    return exact if exact is not None else floordiv(a + b - 1, b)


def mod(a: Dim, b: Dim) -> Dim:
    """Remainder of the floor division."""
    if isinstance(a, int) and isinstance(b, int):
        return a % b
    if b == 1 or a == b or _divide_exactly(a, b) is not None:
        return 0
    return _atom(DimOp.MOD, a, b)


def minimum(a: Dim, b: Dim) -> Dim:
    """The smaller; sizes near the largest integer (ONNX's way to say "to the end") count as infinite."""
    return _extreme(DimOp.MIN, a, b)


def maximum(a: Dim, b: Dim) -> Dim:
    return _extreme(DimOp.MAX, a, b)


def product(dims: Iterable[Dim]) -> Dim:
    result: Dim = 1
    for dim in dims:
        result = result * dim
    return result


def evaluate(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The value of `dim` where every symbol has the size given. Raises KeyError for a symbol without one."""
    if isinstance(dim, int):
        return dim
    total = 0
    for monomial, coefficient in dim.terms:
        value = coefficient
        for factor, power in monomial:
            value *= (sizes[factor] if isinstance(factor, str) else _evaluate_atom(factor, sizes)) ** power
        total += value
    return total


def substitute(dim: Dim, replacements: Mapping[str, Dim]) -> Dim:
    """`dim` with symbols replaced by other dimensions."""
    if isinstance(dim, int):
        return dim
    total: Dim = 0
    for monomial, coefficient in dim.terms:
        value: Dim = coefficient
        for factor, power in monomial:
            if isinstance(factor, str):
                base: Dim = replacements.get(factor, symbol(factor))
            else:
                base = _APPLY[factor.op](substitute(factor.a, replacements), substitute(factor.b, replacements))
            for _ in range(power):
                value = value * base
        total = total + value
    return total


def symbols(*dims: Dim) -> frozenset[str]:
    """The names of all symbols in `dims`."""
    found: set[str] = set()
    for dim in dims:
        if isinstance(dim, Sym):
            for monomial, _ in dim.terms:
                for factor, _power in monomial:
                    found |= {factor} if isinstance(factor, str) else symbols(factor.a, factor.b)
    return frozenset(found)


def limits_within(*dims: Dim) -> Iterator[tuple[str, int]]:
    """(symbol, number) for every ``min(number, symbol)`` in `dims`: where a model cuts a size off."""
    for dim in dims:
        for monomial, _ in dim.terms if isinstance(dim, Sym) else ():
            for factor, _power in monomial:
                if isinstance(factor, Atom):
                    pair = (factor.a, factor.b)
                    number = next((d for d in pair if isinstance(d, int)), None)
                    name = next((str(d) for d in pair if is_symbol(d)), None)
                    if factor.op is DimOp.MIN and number is not None and name is not None:
                        yield name, number
                    yield from limits_within(*pair)


def is_symbol(dim: Dim) -> bool:
    """Whether `dim` is a bare symbol such as ``batch``."""
    return isinstance(dim, Sym) and symbols(dim) == {str(dim)}


_MAX_PRODUCT = 4096  # terms of a product: real models have a few, hostile ones multiply without end
_INFINITE = 2**31 - 1  # exporters write INT32_MAX or INT64_MAX for "to the end"


def _extreme(op: DimOp, a: Dim, b: Dim) -> Dim:
    pick = min if op is DimOp.MIN else max
    if isinstance(a, int) and isinstance(b, int):
        return pick(a, b)
    difference = a - b
    if isinstance(difference, int):
        return a if (difference < 0) == (op is DimOp.MIN) else b
    for x, y in ((a, b), (b, a)):
        if isinstance(x, int) and x >= _INFINITE:
            return y if op is DimOp.MIN else x
        # A polynomial with no negative coefficient is at least 0, every symbol being a size.
        if isinstance(x, int) and x <= 0 and isinstance(y, Sym) and all(c > 0 for _, c in y.terms):
            return x if op is DimOp.MIN else y
    first, second = sorted((a, b), key=str)
    return _atom(op, first, second)


def _atom(op: DimOp, a: Dim, b: Dim) -> Sym:
    return Sym(((((Atom(op, a, b), 1),), 1),))


def _evaluate_atom(atom: Atom, sizes: Mapping[str, int]) -> int:
    a, b = evaluate(atom.a, sizes), evaluate(atom.b, sizes)
    value = _APPLY[atom.op](a, b)
    assert isinstance(value, int)
    return value


_APPLY = {DimOp.FLOORDIV: floordiv, DimOp.MOD: mod, DimOp.MIN: minimum, DimOp.MAX: maximum}


def _terms(dim: Dim) -> tuple[tuple[Monomial, int], ...]:
    return dim.terms if isinstance(dim, Sym) else (((), dim),)


def _from_terms(terms: Iterable[tuple[Monomial, int]]) -> Dim:
    collected: dict[Monomial, int] = {}
    for monomial, coefficient in terms:
        collected[monomial] = collected.get(monomial, 0) + coefficient
    kept = {m: c for m, c in collected.items() if c}
    if not kept.keys() - {()}:
        return kept.get((), 0)
    return Sym(tuple(sorted(kept.items(), key=lambda item: (-len(item[0]), _text(item[0])))))


def _text(monomial: Monomial) -> str:
    return "*".join(f"{factor}^{power}" for factor, power in monomial)


def _multiply(a: Monomial, b: Monomial) -> Monomial:
    powers: dict[Factor, int] = {}
    for factor, power in (*a, *b):
        powers[factor] = powers.get(factor, 0) + power
    return tuple(sorted(((f, p) for f, p in powers.items() if p), key=lambda item: str(item[0])))


def _divide_exactly(a: Dim, b: Dim) -> Dim | None:
    """a / b where that is a polynomial (b a single term, or a an integer multiple of b), else None."""
    divisor = _terms(b)
    if len(divisor) != 1:
        ratio = _terms(a)[0][1] / divisor[0][1]
        return int(ratio) if ratio == int(ratio) and b * int(ratio) == a else None
    (monomial, coefficient) = divisor[0]
    inverse = tuple((factor, -power) for factor, power in monomial)
    quotient = []
    for term, c in _terms(a):
        reduced = _multiply(term, inverse)
        if c % coefficient or any(power < 0 for _, power in reduced):
            return None
        quotient.append((reduced, c // coefficient))
    return _from_terms(quotient)
