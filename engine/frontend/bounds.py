"""What is certain about sizes of which only names are known: every symbol is a size of at least 1.

Used wherever reading a model has to decide between sizes: `elements`, the operators that slice, `grid`.
"""

from __future__ import annotations

from engine.ir import dim as dims
from engine.ir.dim import Dim, DimOp


def lower_bound(dim: Dim) -> int | None:
    """A number that `dim` is never below, every symbol being a size of at least 1; None where there is none."""
    if isinstance(dim, int):
        return dim
    total = 0
    for monomial, coefficient in dim.terms:
        least = coefficient
        for factor, power in monomial:
            if coefficient < 0:
                return None
            # A position (see `grid`) starts at 0, a size at 1.
            bound = (0 if factor.startswith("@") else 1) if isinstance(factor, str) else _atom_bound(factor)
            if bound is None or bound < 0:
                return None
            least *= bound**power
        total += least
    return total


def _atom_bound(atom: dims.Atom) -> int | None:
    a, b = lower_bound(atom.a), lower_bound(atom.b)
    if atom.op is DimOp.MAX:
        return max((bound for bound in (a, b) if bound is not None), default=None)
    if a is None or b is None:
        return None
    return min(a, b) if atom.op is DimOp.MIN else 0 if a >= 0 and b > 0 else None


def at_least(a: Dim, b: Dim) -> bool:
    """Whether a ≥ b for certain."""
    bound = lower_bound(a - b)
    return bound is not None and bound >= 0


def smaller(a: Dim, b: Dim) -> Dim:
    """min(a, b), simplified where the bounds of the sizes decide it."""
    return b if at_least(a, b) else a if at_least(b, a) else dims.minimum(a, b)


def larger(a: Dim, b: Dim) -> Dim:
    return a if at_least(a, b) else b if at_least(b, a) else dims.maximum(a, b)


def complexity(dim: Dim) -> int:
    """The number of terms in `dim`, counting those inside its atoms."""
    if isinstance(dim, int):
        return 1
    count = len(dim.terms)
    for monomial, _ in dim.terms:
        for factor, power in monomial:
            count += abs(power) - 1 if isinstance(factor, str) else complexity(factor.a) + complexity(factor.b)
    return count
