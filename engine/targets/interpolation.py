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
TAPS = {ResizeMode.NEAREST: 1, ResizeMode.LINEAR: 2, ResizeMode.CUBIC: 4}
"""Source elements for each result, along one axis."""


def tables_of(op: Resize, before: Sequence[int], after: Sequence[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """(source indices, weights) of shape [taps, size] for each axis that is not copied as it is.

    Raises UnsupportedOp for a mode that is not known, ShapeError where there is nothing to read.
    """
    if 0 in before and 0 not in after:
        raise ShapeError(f"Resize: nothing of shape {list(before)} makes {list(after)}")
    tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for axis, (size, result) in enumerate(zip(before, after, strict=True)):
        index, weights = taps_of(op, op.scales[axis] or result / size, size, result)
        if not (size == result and _is_identity(index, weights)):
            tables[axis] = (index, weights)
    return tables


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
        floor = np.floor(x)
        f = x - floor
        if op.mode is ResizeMode.LINEAR:
            index, weights = np.stack([floor, floor + 1]), np.stack([1 - f, f])
        else:
            # Keys, "Cubic convolution interpolation for digital image processing", 1981.
            a = op.cubic_coefficient
            index = np.stack([floor - 1, floor, floor + 1, floor + 2])
            inner = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (f, 1 - f)]
            outer = [((a * d - 5 * a) * d + 8 * a) * d - 4 * a for d in (1 + f, 2 - f)]
            weights = np.stack([outer[0], *inner, outer[1]])
    return np.clip(index, 0, max(0, size - 1)).astype(np.int64), weights.astype(np.float32)
