"""What every operator of the IR offers: type inference, FLOPs, bytes, and the fused-operator contract.

The contract of fused operators (one for all targets):
- an operator has `arity` fixed operands; further inputs of its node are read only by its expressions;
- `source` (of the lighter families) is an expression over the node's inputs, computed on the way in: the prologue;
- `stores` holds one expression per output of the node, over `Acc()` (what the heavy part computed for the element) and
  over any input of the node, broadcast against the output: the epilogue. The expression's dtype is the output's dtype.
Layouts are not part of an operator: they belong to values (`Value.order`) and, once sizes are known, to the plan's
tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

from engine.errors import ShapeError
from engine.ir.dim import Dim
from engine.ir.dtype import DType


class TypedShape(Protocol):
    """Anything with an element type and a shape: a symbolic `Value` or a concrete `Tensor` of a plan."""

    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[Dim, ...]: ...


OperandTypes: TypeAlias = Sequence[TypedShape]
ResultTypes: TypeAlias = tuple[tuple[DType, tuple[Dim, ...]], ...]


@dataclass(frozen=True)
class Cost:
    """`flops`: floating-point operations of the mathematics. `bytes`: unique bytes read and written, at the dtypes in
    use."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Op(ABC):
    """Base of all operators: immutable, hashable attributes only; tensors are the node's inputs."""

    arity: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """The operator's name, as printed and as used in metrics."""
        return type(self).__name__

    @abstractmethod
    def infer(self, inputs: OperandTypes) -> ResultTypes:
        """dtype and shape of each output. Raises ShapeError where the operands do not fit each other."""

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        """FLOPs of the mathematics for concrete shapes: a multiply-add is 2, one per point-wise operation and
        element."""
        return 0

    def bytes(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        """Unique bytes touched: each operand and each result once, unless the operator reads only part of an
        operand."""
        return sum(t.nbytes for t in (*inputs, *outputs))

    def cost(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> Cost:
        return Cost(self.flops(inputs, outputs), self.bytes(inputs, outputs))


class ConcreteShape(Protocol):
    """A tensor whose sizes are known. `nbytes` counts distinct elements only (a broadcast view is small)."""

    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def elements(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


def broadcast_shapes(what: str, *shapes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The NumPy broadcast of symbolic shapes. Two different symbols are taken to be equal (checked when a plan is
    built), and a symbol beside a number above 1 to be that number. Raises ShapeError for numbers that differ; `what`
    names the node.
    """
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Dim] = [1] * rank
    for shape in shapes:
        for i, dim in enumerate(shape, start=rank - len(shape)):
            present = result[i]
            if dim == present or dim == 1:
                continue
            if present == 1:
                result[i] = dim
            elif isinstance(dim, int) and isinstance(present, int):
                raise ShapeError(f"{what}: shapes {', '.join(map(_text, shapes))} do not broadcast (axis {i})")
            elif isinstance(dim, int) or (not isinstance(present, int) and len(str(dim)) < len(str(present))):
                result[i] = dim
    return tuple(result)


def _text(shape: tuple[Dim, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
