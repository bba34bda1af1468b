"""Patterns over point-wise expressions, so that a rewrite of one is data: a pattern, and what to write instead.

    Rule("double negation", op(NEG, op(NEG, x)), lambda m: m["x"])

`op` tries the operands of commutative operations in both orders; a name captured twice must match equal expressions.
Rules are applied by `simplify.py` and `activations.py`; the combinators also read single expressions in other passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from engine.ir import expr as ex
from engine.ir.expr import PointOp

COMMUTATIVE = frozenset(
    {
        PointOp.ADD, PointOp.MUL, PointOp.MIN, PointOp.MAX, PointOp.AND, PointOp.OR, PointOp.XOR, PointOp.EQ,
        PointOp.BITAND, PointOp.BITOR, PointOp.BITXOR,
    }
)  # fmt: skip

Captures: TypeAlias = Mapping[str, ex.Expr]
Matcher: TypeAlias = Callable[[ex.Expr, Captures], Iterator[Captures]]


@dataclass(frozen=True)
class Pattern:
    """`matches` yields the captures of each way in which an expression fits. `root`: the operation at the top."""

    matches: Matcher
    root: PointOp | None = None


def anything(name: str, test: Callable[[ex.Expr], bool] | None = None) -> Pattern:
    """Any expression (for which `test` holds), captured as `name`."""

    def matches(e: ex.Expr, captures: Captures) -> Iterator[Captures]:
        known = captures.get(name)
        if known is not None:
            if known == e:
                yield captures
        elif test is None or test(e):
            yield {**captures, name: e}

    return Pattern(matches)


def literal(name: str, test: Callable[[float], bool] | None = None) -> Pattern:
    """A constant (for whose value `test` holds), captured as `name`."""
    return anything(name, lambda e: isinstance(e, ex.Const) and (test is None or test(e.value)))


def number(value: float) -> Pattern:
    """The constant `value`, of any type."""

    def matches(e: ex.Expr, captures: Captures) -> Iterator[Captures]:
        if isinstance(e, ex.Const) and e.value == value:
            yield captures

    return Pattern(matches)


def op(kind: PointOp, *operands: Pattern) -> Pattern:
    """`kind(*operands)`; the two operands of a commutative operation in either order."""

    def matches(e: ex.Expr, captures: Captures) -> Iterator[Captures]:
        if not isinstance(e, ex.Apply) or e.op is not kind or len(e.args) != len(operands):
            return
        orders = [e.args, e.args[::-1]] if kind in COMMUTATIVE else [e.args]
        for args in orders:
            yield from _all(operands, args, captures)

    return Pattern(matches, kind)


def _all(patterns: tuple[Pattern, ...], args: tuple[ex.Expr, ...], captures: Captures) -> Iterator[Captures]:
    if not patterns:
        yield captures
        return
    for found in patterns[0].matches(args[0], captures):
        yield from _all(patterns[1:], args[1:], found)


def match(pattern: Pattern, e: ex.Expr) -> Captures | None:
    """The captures of the first way in which `e` fits `pattern`, or None."""
    return next(pattern.matches(e, {}), None)


@dataclass(frozen=True)
class Rule:
    """Where `pattern` matches, write `build(captures)`; None from `build`: the rule does not apply after all."""

    name: str
    pattern: Pattern
    build: Callable[[Captures], ex.Expr | None]


class RuleSet:
    """Rules, found by the operation at their root and applied from the leaves up until none applies."""

    def __init__(self, rules: Iterable[Rule], extra: Callable[[ex.Apply], ex.Expr | None] | None = None) -> None:
        self._by_root: dict[PointOp | None, list[Rule]] = {}
        for rule in rules:
            self._by_root.setdefault(rule.pattern.root, []).append(rule)
        self._extra = extra
        # Layers of a model repeat the same few expressions: a small cache makes rewriting them all but free.
        self._cached = lru_cache(maxsize=4096)(self._rewrite)

    def rewrite(self, root: ex.Expr) -> ex.Expr:
        """`root` with every rule applied wherever it can be."""
        return self._cached(root)

    def _rewrite(self, root: ex.Expr) -> ex.Expr:
        done: dict[ex.Expr, ex.Expr] = {}
        for node in ex.walk(root):
            if isinstance(node, ex.Apply):
                args = tuple(done[arg] for arg in node.args)
                done[node] = self._settle(node if args == node.args else ex.Apply(node.op, args, node.dtype))
            else:
                done[node] = node
        return done[root]

    def _settle(self, e: ex.Expr) -> ex.Expr:
        changed = self._step(e)
        # What a rule builds can hold new operations below its root, so all of it is rewritten again.
        return e if changed is None else self._rewrite(changed)

    def _step(self, e: ex.Expr) -> ex.Expr | None:
        if not isinstance(e, ex.Apply):
            return None
        changed: ex.Expr | None = self._extra(e) if self._extra is not None else None
        if changed is not None and changed != e:
            return changed
        for rule in (*self._by_root.get(e.op, ()), *self._by_root.get(None, ())):
            found = match(rule.pattern, e)
            if found is not None:
                changed = rule.build(found)
                if changed is not None and changed != e:
                    return changed
        return None
