"""Operators whose indices are data: writing where an index says, and finding the largest or smallest elements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from engine.errors import ShapeError
from engine.ir.dim import Dim
from engine.ir.dtype import DType
from engine.ir.ops.base import ConcreteShape, Op, OperandTypes, ResultTypes


class ScatterKind(Enum):
    """What becomes of an element that an update meets."""

    REPLACE = "replace"
    ADD = "add"
    MUL = "mul"
    MAX = "max"
    MIN = "min"


_COMBINE: dict[ScatterKind, np.ufunc] = {
    ScatterKind.ADD: np.add,
    ScatterKind.MUL: np.multiply,
    ScatterKind.MAX: np.maximum,
    ScatterKind.MIN: np.minimum,
}


@dataclass(frozen=True)
class Scatter(Op):
    """`data` with `updates` put, or added, … where `indices` say; its inputs in that order are data, indices, updates.

    With an `axis` (ONNX ScatterElements) `updates[i, j, k]` goes to `data[i, indices[i, j, k], k]`, for axis 1 of 3.
    Without (ONNX ScatterND) the last axis of `indices` holds the first coordinates of where a slice of `updates` goes.
    Negative indices count from the end. Where the same place is named twice, REPLACE takes any of the updates.
    """

    axis: int | None
    kind: ScatterKind = ScatterKind.REPLACE

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        data, indices, updates = (t.shape for t in inputs)
        depth = self.depth(inputs)
        expected = (*indices[:-1], *data[depth:]) if self.axis is None else indices
        fits = len(updates) == len(expected) and not any(map(_differ, updates, expected))
        if self.axis is not None:
            fits = fits and self.axis < len(data) == len(indices) and not any(self._beyond(indices, data))
        if not fits:
            raise ShapeError(f"Scatter: {_text(updates)} at {_text(indices)} into {_text(data)}")
        return ((inputs[0].dtype, data),)

    def _beyond(self, indices: Sequence[Dim], data: Sequence[Dim]) -> Iterator[bool]:
        """Whether updates go on where the data ends, for each axis along which they are not placed."""
        for axis, (size, whole) in enumerate(zip(indices, data, strict=True)):
            yield axis != self.axis and isinstance(size, int) and isinstance(whole, int) and size > whole

    def depth(self, inputs: OperandTypes) -> int:
        """How many axes of the data an index selects from."""
        if self.axis is not None:
            return 1
        indices, rank = inputs[1].shape, len(inputs[0].shape)
        depth = indices[-1] if indices else 0
        if not isinstance(depth, int) or not 0 < depth <= rank:
            raise ShapeError(f"Scatter: indices of shape {_text(indices)} for data of rank {rank}")
        return depth

    def apply(self, data: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray | None:
        """The result for arrays, of numbers or of sizes; None where an index is out of range."""
        axes = [self.axis] if self.axis is not None else list(range(indices.shape[-1]))
        sizes = np.array([data.shape[axis] for axis in axes])
        if self.axis is not None:
            sizes = sizes.reshape(())
        if not np.all((-sizes <= indices) & (indices < sizes)):
            return None
        if self.axis is None:
            place: tuple[Any, ...] = tuple(np.moveaxis(indices, -1, 0))
        else:
            own = enumerate(np.indices(indices.shape))
            place = tuple(indices if axis == self.axis else position for axis, position in own)
        result = data.copy()
        if self.kind is ScatterKind.REPLACE:
            result[place] = updates
        else:
            _COMBINE[self.kind].at(result, place, updates)
        return result

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        return 0 if self.kind is ScatterKind.REPLACE else inputs[2].elements


@dataclass(frozen=True)
class TopK(Op):
    """The `k` largest (or smallest) elements along `axis`, best first, and their positions (int64).

    Of equal elements the one at the lower position comes first; NaN counts as larger than every number.
    """

    axis: int
    k: Dim
    largest: bool = True

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        shape = inputs[0].shape
        if self.axis >= len(shape):
            raise ShapeError(f"TopK: axis {self.axis} of a tensor of rank {len(shape)}")
        size = shape[self.axis]
        if isinstance(self.k, int) and (self.k < 0 or (isinstance(size, int) and self.k > size)):
            raise ShapeError(f"TopK: {self.k} of {size} elements")
        result = (*shape[: self.axis], self.k, *shape[self.axis + 1 :])
        return ((inputs[0].dtype, result), (DType.I64, result))


def _differ(a: Dim, b: Dim) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a != b


def _text(shape: Sequence[Dim]) -> str:
    return f"[{', '.join(map(str, shape))}]"
