"""Operators and shapes with the symbols replaced by sizes. Called by the plan builder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from engine.ir import dim as dims
from engine.ir.dim import Dim, Sym
from engine.ir.ops import Op


def concrete_shape(shape: tuple[Dim, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """`shape` with every dimension evaluated."""
    return tuple(dims.evaluate(dim, sizes) for dim in shape)


def concrete_op(op: Op, sizes: Mapping[str, int]) -> Op:
    """`op` with every symbolic attribute evaluated (itself where it has none)."""
    changes = {}
    for item in fields(op):
        value = getattr(op, item.name)
        if _has_symbol(value):
            changes[item.name] = _evaluate(value, sizes)
    return replace(op, **changes) if changes else op


def _has_symbol(value: Any) -> bool:
    return isinstance(value, Sym) or (isinstance(value, tuple) and any(map(_has_symbol, value)))


def _evaluate(value: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(value, Sym):
        return dims.evaluate(value, sizes)
    if isinstance(value, tuple):
        return tuple(_evaluate(item, sizes) for item in value)
    return value
