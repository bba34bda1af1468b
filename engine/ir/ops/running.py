"""Running sums and products along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from engine.errors import ShapeError
from engine.ir.dtype import DType
from engine.ir.ops.base import ConcreteShape, Op, OperandTypes, ResultTypes


class RunningKind(Enum):
    SUM = "sum"
    PROD = "prod"


@dataclass(frozen=True)
class Running(Op):
    """ONNX CumSum and CumProd: element i along `axis` is the sum (product) of the elements 0 … i of the input.

    `exclusive`: of the elements before i. `reverse`: of the elements from i on (behind i). Floats accumulate in fp32
    or wider and are rounded when stored, integers wrap.
    """

    kind: RunningKind
    axis: int
    exclusive: bool = False
    reverse: bool = False

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        if self.axis >= len(inputs[0].shape):
            raise ShapeError(f"Running: axis {self.axis} of a tensor of rank {len(inputs[0].shape)}")
        return ((inputs[0].dtype, inputs[0].shape),)

    def apply(self, x: np.ndarray) -> np.ndarray:
        """The result for an array of numbers."""
        combine: np.ufunc = np.add if self.kind is RunningKind.SUM else np.multiply
        lines = np.moveaxis(np.flip(x, self.axis) if self.reverse else x, self.axis, 0)
        wide = lines.astype(np.float64) if DType.of(x.dtype).is_float else lines
        result = np.full_like(wide, combine.identity)
        first = int(self.exclusive)
        result[first:] = combine.accumulate(wide[: len(wide) - first], axis=0, dtype=wide.dtype)
        result = np.moveaxis(result, 0, self.axis)
        return (np.flip(result, self.axis) if self.reverse else result).astype(x.dtype)

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        return outputs[0].elements
