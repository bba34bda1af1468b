"""Checking what a caller hands in, and making up inputs that a model accepts. Called by `engine.model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.errors import ShapeError
from engine.ir.dim import Sym, is_symbol, limits_within
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Value
from engine.ir.ops import Gather, Norm, Pointwise, View


def check_feeds(inputs: Sequence[Value], feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The feeds as C-contiguous arrays, in the order of `inputs`. Raises ShapeError naming what is wrong and what to
    do.

    Missing and unknown names, dtypes and ranks are wrong, and fixed sizes that differ.
    """
    names = [value.name for value in inputs]
    if unknown := sorted(set(feeds).difference(names)):
        raise ShapeError(f"the model has no input {unknown[0]!r}; its inputs are {', '.join(map(repr, names))}")
    return {value.name: _check_one(value, feeds) for value in inputs}


def _check_one(value: Value, feeds: Mapping[str, Any]) -> np.ndarray:
    if value.name not in feeds:
        raise ShapeError(f"input {value.name!r} is missing; it is {describe(value)}")
    given = feeds[value.name]
    array = np.asarray(given.get() if hasattr(given, "__cuda_array_interface__") else given)
    expected = value.dtype.numpy
    if array.dtype != expected:
        raise ShapeError(
            f"input {value.name!r} has dtype {array.dtype}, the model wants {expected}; convert it with .astype"
        )
    if array.ndim != value.rank:
        raise ShapeError(f"input {value.name!r} has shape {list(array.shape)}, the model wants {describe(value)}")
    for axis, (size, dim) in enumerate(zip(array.shape, value.shape, strict=True)):
        if isinstance(dim, int) and size != dim:
            raise ShapeError(
                f"input {value.name!r} has {size} elements on axis {axis}, the model wants {dim} ({describe(value)})"
            )
    if value.dtype is DType.STRING:
        _check_strings(value, array)
    return np.asarray(array, order="C")


def _check_strings(value: Value, array: np.ndarray) -> None:
    for index, element in np.ndenumerate(array):
        if not isinstance(element, str):
            hint = "; decode bytes first" if isinstance(element, bytes) else ""
            raise ShapeError(
                f"input {value.name!r} holds {type(element).__name__} at {list(index)}, the model wants str{hint}"
            )


def sizes_of(inputs: Sequence[Value], arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The size of every symbol in the input shapes. Raises ShapeError where two inputs disagree."""
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for value in inputs:
        for axis, (dim, size) in enumerate(zip(value.shape, arrays[value.name].shape, strict=True)):
            if isinstance(dim, int):
                continue
            name = str(dim)
            if sizes.setdefault(name, size) != size:
                raise ShapeError(
                    f"{name!r} is {size} on axis {axis} of input {value.name!r} but {sizes[name]} in {owner[name]!r}"
                )
            owner.setdefault(name, value.name)
    return sizes


def describe(value: Value) -> str:
    """Such as ``float32[batch, 3, 224, 224]``."""
    return f"{value.dtype.numpy}[{', '.join(map(str, value.shape))}]"


def sample_feeds(graph: Graph, sizes: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs that the model accepts: standard normal floats; integers that index a table within its rows; other
    integers (masks, segment ids) 1; strings of digits, which a Cast can read too. Symbols without a size in `sizes`
    are 1."""
    rng = np.random.default_rng(seed)
    limits = _index_limits(graph)
    feeds = {}
    for value in graph.inputs:
        shape = tuple(dim if isinstance(dim, int) else sizes.get(str(dim), 1) for dim in value.shape)
        dtype = value.dtype.numpy
        if value.dtype.is_float:
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
        elif value.dtype.is_int:
            limit = limits.get(value)
            drawn = np.ones(shape) if limit is None else rng.integers(0, limit, shape)
            feeds[value.name] = drawn.astype(dtype)
        elif value.dtype is DType.STRING:
            feeds[value.name] = rng.integers(0, 10, shape).astype(str).astype(object)
        else:
            feeds[value.name] = np.ones(shape, dtype)
    return feeds


def index_out_of_range(graph: Graph, arrays: Mapping[str, np.ndarray]) -> str | None:
    """Which input holds an index outside the table it looks up, in words; None where none does."""
    limits = _index_limits(graph)
    for value in graph.inputs:
        rows, array = limits.get(value), arrays.get(value.name)
        if rows is None or array is None or not array.size:
            continue
        wrong = (array < -rows) | (array >= rows)
        if wrong.any():
            where = tuple(int(i) for i in np.argwhere(wrong)[0])
            return (
                f"input {value.name!r} holds {array[where]} at {list(where)}, out of range for a table of {rows} rows: "
                f"use 0 to {rows - 1}"
            )
    return None


def size_out_of_range(graph: Graph, sizes: Mapping[str, int]) -> str | None:
    """Which size is beyond a fixed limit of the model (such as its position table), in words; None where none is."""
    for node in graph.nodes:
        for value in node.outputs:
            for name, limit in limits_within(*value.shape):
                if sizes.get(name, 0) > limit:
                    return f"size {name!r} is {sizes[name]}, the model takes at most {limit} (node {node.origin!r})"
    return None


def size_limits(graph: Graph) -> dict[str, int]:
    """The most that a size may be, of those that something fixed in the model (such as its position table) limits."""
    limits: dict[str, int] = {}
    for node in graph.nodes:
        for value in node.outputs:
            for name, limit in limits_within(*value.shape):
                limits[name] = min(limit, limits.get(name, limit))
    return limits


def _index_limits(graph: Graph) -> dict[Value, int]:
    """For every value used to look up a table: the number of rows (the smallest, where it looks up several)."""
    limits: dict[Value, int] = {}
    for node in reversed(graph.nodes):
        pairs: list[tuple[Value, Value, int]] = []
        match node.op:
            case Pointwise() | Norm():
                pairs = [(node.inputs[t], node.inputs[i], 0) for t, i in node.op.gathers]
            case Gather():
                pairs = [(node.inputs[0], node.inputs[1], node.op.axis)]
            case View():
                if node.output in limits:
                    limits.setdefault(node.inputs[0], limits[node.output])
        for table, index, axis in pairs:
            rows = table.shape[axis]
            if isinstance(rows, int):
                limits[index] = min(rows, limits.get(index, rows))
    return limits


def free_symbols(inputs: Sequence[Value]) -> tuple[str, ...]:
    """The names of the sizes that vary, in order of appearance."""
    dims = (dim for value in inputs for dim in value.shape if isinstance(dim, Sym))
    found = dict.fromkeys(str(dim) for dim in dims)
    assert all(is_symbol(dim) for value in inputs for dim in value.shape if isinstance(dim, Sym))
    return tuple(found)
