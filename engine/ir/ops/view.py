"""Operators that only look at a tensor differently. The plan turns them into strides wherever strides can say it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ShapeError
from engine.ir.dim import Dim, product
from engine.ir.ops.base import Op, OperandTypes, ResultTypes


@dataclass(frozen=True)
class View(Op):
    """Base of the view operators: one input, one output, the same elements or a part of them."""


@dataclass(frozen=True)
class Reshape(View):
    """The same elements in row-major order, in another shape."""

    shape: tuple[Dim, ...]

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        before, after = product(inputs[0].shape), product(self.shape)
        if isinstance(before, int) and isinstance(after, int) and before != after:
            raise ShapeError(f"Reshape: {before} elements into shape {list(self.shape)} of {after}")
        return ((inputs[0].dtype, self.shape),)


@dataclass(frozen=True)
class Transpose(View):
    """Output axis i is input axis `perm[i]`."""

    perm: tuple[int, ...]

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        shape = inputs[0].shape
        if sorted(self.perm) != list(range(len(shape))):
            raise ShapeError(f"Transpose: {self.perm} is no permutation of {len(shape)} axes")
        return ((inputs[0].dtype, tuple(shape[axis] for axis in self.perm)),)


@dataclass(frozen=True)
class Slice(View):
    """`sizes[i]` elements of axis i from `starts[i]` in steps of `steps[i]` (negative: backwards). All axes are
    listed."""

    starts: tuple[Dim, ...]
    sizes: tuple[Dim, ...]
    steps: tuple[int, ...]

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        shape = inputs[0].shape
        if not len(shape) == len(self.starts) == len(self.sizes) == len(self.steps):
            raise ShapeError(f"Slice: {len(self.starts)} ranges for a tensor of rank {len(shape)}")
        return ((inputs[0].dtype, self.sizes),)


@dataclass(frozen=True)
class Expand(View):
    """NumPy broadcast to `shape` (axes of size 1 repeated, axes added in front)."""

    shape: tuple[Dim, ...]

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        if len(self.shape) < len(inputs[0].shape):
            raise ShapeError(f"Expand: a tensor of rank {len(inputs[0].shape)} to rank {len(self.shape)}")
        return ((inputs[0].dtype, self.shape),)
