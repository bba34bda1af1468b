"""Operators and shapes with the symbols replaced by sizes. Called by the plan builder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

from engine.ir import dim as dims
from engine.ir.dim import Dim, Sym
from engine.ir.ops import Op


def concrete_shape(shape: tuple[Dim, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """`shape` with every dimension evaluated."""
    return tuple(dims.evaluate(dim, sizes) for dim in shape)


def concrete_op(op: Op, sizes: Mapping[str, int]) -> Op:
    """`op` with every symbolic attribute evaluated (itself where it has none)."""
    names = _symbolic_attributes(op)
    return replace(op, **{name: _evaluate(getattr(op, name), sizes) for name in names}) if names else op


@lru_cache(maxsize=4096)
def _symbolic_attributes(op: Op) -> tuple[str, ...]:
    return tuple(item.name for item in fields(op) if _has_symbol(getattr(op, item.name)))


def _has_symbol(value: Any) -> bool:
    return isinstance(value, Sym) or (isinstance(value, tuple) and any(map(_has_symbol, value)))


def _evaluate(value: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(value, Sym):
        return dims.evaluate(value, sizes)
    if isinstance(value, tuple):
        return tuple(_evaluate(item, sizes) for item in value)
    return value
