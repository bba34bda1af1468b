"""Where `Resize` reads, and with what weights: computed on the host, once per plan, for every target (formulas: ONNX
operator Resize)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engine.errors import ShapeError, UnsupportedOp
from engine.ir.ops import Resize, ResizeMode

_ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}
Tables = dict[int, tuple[np.ndarray, np.ndarray]]
MOST_TAPS = 64
"""Source elements for each result, along one axis, that kernels are made for."""

_REACH = {ResizeMode.LINEAR: 1, ResizeMode.CUBIC: 2}


def tables_of(op: Resize, before: Sequence[int], after: Sequence[int]) -> Tables:
    """(source indices, weights) of shape [taps, size] for each axis that is not copied as it is, the taps as many for
    every axis.

    Raises UnsupportedOp for a mode that is not known and a filter that is too long, ShapeError where there is nothing
    to read.
    """
    if 0 in before and 0 not in after:
        raise ShapeError(f"Resize: nothing of shape {list(before)} makes {list(after)}")
    tables: Tables = {}
    for axis, (size, result) in enumerate(zip(before, after, strict=True)):
        index, weights = taps_of(op, op.scales[axis] or result / size, size, result)
        if not (size == result and _is_identity(index, weights)):
            tables[axis] = (index, weights)
    taps = max((len(index) for index, _ in tables.values()), default=0)
    return {axis: (_lengthened(index, taps), _lengthened(weights, taps)) for axis, (index, weights) in tables.items()}


def count_taps(tables: Tables, op: Resize) -> int:
    """Source elements for each result, along an axis that has a table."""
    alone = 1 if op.mode is ResizeMode.NEAREST else 2  # only 1 says that nothing is weighted
    return next((len(index) for index, _ in tables.values()), alone)


def _lengthened(rows: np.ndarray, taps: int) -> np.ndarray:
    """More rows, of zeros."""
    return np.pad(rows, ((0, taps - len(rows)), (0, 0)))


def _is_identity(index: np.ndarray, weights: np.ndarray) -> bool:
    """Whether every result is the source element of its own index."""
    alone = np.array_equal(np.sort(weights, axis=0)[:-1], np.zeros((len(weights) - 1, weights.shape[1])))
    return alone and np.array_equal((index * (weights == 1)).sum(axis=0), np.arange(weights.shape[1]))


def coordinates(op: Resize, scale: float, size: int, result: int) -> np.ndarray:
    """The source coordinate of each output index along one axis (ONNX coordinate_transformation_mode)."""
    i = np.arange(result, dtype=np.float64)
    half = (i + 0.5) / scale - 0.5
    if op.coordinates == "half_pixel":
        return half
    if op.coordinates == "half_pixel_symmetric":
        return size / 2 * (1 - result / (size * scale)) + (i + 0.5) / scale - 0.5
    if op.coordinates == "pytorch_half_pixel":
        return half if result > 1 else np.zeros(1)
    if op.coordinates == "align_corners":
        length = size * scale  # with scales, ONNX means the length before it is rounded down
        return i * (size - 1) / (length - 1) if result > 1 else np.zeros(1)
    if op.coordinates == "asymmetric":
        return i / scale
    if op.coordinates == "tf_half_pixel_for_nn":
        return half + 0.5
    raise UnsupportedOp(f"Resize: coordinate_transformation_mode {op.coordinates!r}")


def taps_of(op: Resize, scale: float, size: int, result: int) -> tuple[np.ndarray, np.ndarray]:
    """(source indices, weights) of shape [taps, result] along one axis."""
    x = coordinates(op, scale, size, result)
    if op.mode is ResizeMode.NEAREST:
        if op.rounding not in _ROUNDINGS:
            raise UnsupportedOp(f"Resize: nearest_mode {op.rounding!r}")
        index = _ROUNDINGS[op.rounding](x)[None]
        weights = np.ones_like(index)
    else:
        index, weights = _weighted(op, x, scale, size)
    return np.clip(index, 0, max(0, size - 1)).astype(np.int64), weights.astype(np.float32)


def _weighted(op: Resize, x: np.ndarray, scale: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The elements around each coordinate, also beyond the edge, and their weights."""
    shrunk = min(scale, 1.0) if op.antialias else 1.0
    first = int(np.floor(-_REACH[op.mode] / shrunk)) + 1
    if 2 - 2 * first > MOST_TAPS:
        raise UnsupportedOp(f"Resize: antialias with a scale of {scale:g}; a result may be of {MOST_TAPS} elements")
    offsets = np.arange(first, 2 - first)[:, None]
    floor = np.floor(x)
    distance = np.abs(offsets - (x - floor)) * shrunk
    if op.mode is ResizeMode.LINEAR:
        weights = np.maximum(1 - distance, 0)
    else:
        # Keys, "Cubic convolution interpolation for digital image processing", 1981.
        a, d = op.cubic_coefficient, distance
        inner, outer = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        weights = np.where(d <= 1, inner, np.where(d < 2, outer, 0))
    index = floor + offsets
    if op.exclude_outside:
        weights = np.where((index >= 0) & (index < size), weights, 0)
    if op.antialias or op.exclude_outside:
        weights = weights / weights.sum(axis=0)
    return index, weights
