"""Concrete tensors: a window with strides on a buffer. What steps read and write once all sizes are known."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod

import numpy as np

from engine.ir.dtype import DType


class BufferKind(Enum):
    INPUT = "input"  # handed in by the caller of run()
    OUTPUT = "output"  # handed out to the caller
    CONSTANT = "constant"  # a weight of the model, shared by all plans
    PLAN = "plan"  # computed once when the plan is built (tensors of sizes)
    ARENA = "arena"  # an intermediate, placed in the arena by lifetime
    WORKSPACE = "workspace"  # scratch memory of one step, which a target adds to a plan; nothing outlives the step


@dataclass(eq=False)
class Buffer:
    """A piece of memory. `offset` is its place in the arena, for ARENA buffers, once memory has been planned."""

    name: str
    kind: BufferKind
    nbytes: int
    data: np.ndarray | None = None  # CONSTANT and PLAN: the content, C-contiguous
    offset: int = 0


@dataclass(frozen=True, eq=False)
class Tensor:
    """`shape` elements of `dtype`, at `offset` + Σ index·stride elements from the start of `buffer`.

    Strides count elements; 0 repeats an element (broadcast), negative ones walk backwards.
    """

    buffer: Buffer
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct elements (repeated ones count once)."""
        distinct = prod(size for size, stride in zip(self.shape, self.strides, strict=True) if stride)
        return (distinct if self.elements else 0) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        return _same_strides(self.shape, self.strides, row_major(self.shape))

    def is_contiguous_in(self, order: tuple[int, ...]) -> bool:
        """Whether the elements lie without gaps with axis `order[0]` outermost and `order[-1]` innermost."""
        return _same_strides(self.shape, self.strides, row_major(self.shape, order))

    def is_at(self, other: Tensor) -> bool:
        """Whether the elements are those of `other`, which has the same shape. Strides of axes of one element, which
        views of one memory may give differently, say nothing."""
        same = self.buffer is other.buffer and self.offset == other.offset
        return same and _same_strides(self.shape, self.strides, other.strides)


def row_major(shape: tuple[int, ...], order: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Strides (in elements) of a tensor without gaps; `order` lists its axes from the outermost to the innermost."""
    strides = [0] * len(shape)
    step = 1
    for axis in reversed(order if order is not None else range(len(shape))):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


def _same_strides(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(size <= 1 or x == y for size, x, y in zip(shape, a, b, strict=True))


def broadcast_to(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`tensor` seen in the broadcast `shape`: repeated axes get stride 0. Raises ValueError where it does not
    broadcast."""
    missing = len(shape) - len(tensor.shape)
    if missing < 0:
        raise ValueError(f"a tensor of shape {tensor.shape} does not broadcast to {shape}")
    strides = [0] * missing
    for size, stride, wanted in zip(tensor.shape, tensor.strides, shape[missing:], strict=True):
        if size not in (1, wanted):
            raise ValueError(f"a tensor of shape {tensor.shape} does not broadcast to {shape}")
        strides.append(stride if size == wanted and size != 1 else 0)
    return Tensor(tensor.buffer, tensor.dtype, shape, tuple(strides), tensor.offset)
