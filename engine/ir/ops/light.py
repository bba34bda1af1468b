"""Point-wise chains, norms, softmax, reductions and pools: bound by memory, fused on both sides.

`source` is the prologue, an expression over the node's inputs; `stores` the epilogue. `gathers` lets an input be read
through an index tensor: (table, index) means that `Arg(table)` reads `table[index[…]]`, of logical shape
`index.shape + table.shape[1:]`, so that an embedding sum is one node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod

from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir.dim import Dim, ceildiv, floordiv
from engine.ir.dtype import DType
from engine.ir.ops.base import ConcreteShape, Op, OperandTypes, ResultTypes, broadcast_shapes

ACC = (ex.Acc(),)
ARG0 = ex.Arg(0, DType.F32)
Gathers = tuple[tuple[int, int], ...]


def operand_shape(index: int, inputs: OperandTypes, gathers: Gathers) -> tuple[Dim, ...]:
    """The logical shape in which an expression sees input `index`: gathered tables have their index's shape in
    front."""
    for table, by in gathers:
        if table == index:
            return (*inputs[by].shape, *inputs[table].shape[1:])
    return inputs[index].shape


def iteration_shape(what: str, roots: Sequence[ex.Expr], inputs: OperandTypes, gathers: Gathers) -> tuple[Dim, ...]:
    """The broadcast shape of all the inputs that the expressions read."""
    return broadcast_shapes(what, *(operand_shape(i, inputs, gathers) for i in ex.arguments(*roots)))


def _bytes(inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape], gathers: Gathers) -> int:
    """Each operand and result once, but of a gathered table only the rows looked up."""
    total = sum(t.nbytes for t in (*inputs, *outputs))
    for table, by in gathers:
        row = prod(inputs[table].shape[1:]) * inputs[table].dtype.itemsize
        total += min(0, inputs[by].elements * row - inputs[table].nbytes)
    return total


@dataclass(frozen=True)
class Pointwise(Op):
    """One expression per output over broadcast inputs. Expressions of constants only need `shape`-giving inputs."""

    stores: tuple[ex.Expr, ...]
    gathers: Gathers = ()

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        shape = iteration_shape("Pointwise", self.stores, inputs, self.gathers)
        return tuple((store.dtype, shape) for store in self.stores)

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        return outputs[0].elements * ex.flops(*self.stores)

    def bytes(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        return _bytes(inputs, outputs, self.gathers)


class NormKind(Enum):
    LAYER = "layer"  # (x − mean) / sqrt(variance + epsilon) over `axes`
    RMS = "rms"  # x / sqrt(mean(x²) + epsilon) over `axes`
    L2 = "l2"  # x / max(‖x‖₂, epsilon) over `axes`


@dataclass(frozen=True)
class Norm(Op):
    """Normalisation of `source` over `axes` (non-negative, ascending); statistics in fp32, biased variance.

    The normalised value is `Acc()` in `stores`, where scale and shift belong. Layer norm has trailing axes, instance
    norm the spatial ones; group norm is written on a reshaped view.
    """

    kind: NormKind
    axes: tuple[int, ...]
    epsilon: float
    source: ex.Expr = ARG0
    gathers: Gathers = ()
    stores: tuple[ex.Expr, ...] = ACC

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        shape = iteration_shape("Norm", (self.source,), inputs, self.gathers)
        if any(axis >= len(shape) for axis in self.axes):
            raise ShapeError(f"Norm: axes {self.axes} of a tensor of rank {len(shape)}")
        return tuple((store.dtype, shape) for store in self.stores)

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        # Per element: sum; subtract, square, sum; scale.
        per_element = (5 if self.kind is NormKind.LAYER else 3) + ex.flops(self.source, *self.stores)
        return outputs[0].elements * per_element

    def bytes(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        return _bytes(inputs, outputs, self.gathers)


def factors_shape(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The shape of the factors of rows along the last axis of `shape`."""
    return (*shape[:-1], 1)


@dataclass(frozen=True)
class RowFactors(Op):
    """`x[…, k]` → fp32 [..., 1]: 1 / √(variance + epsilon) of each row, by which a layer norm multiplies it; with
    `offsets` then also the mean of each row times that, which the norm subtracts: it makes x · factor − offset of x."""

    epsilon: float
    offsets: bool = False

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        return ((DType.F32, factors_shape(inputs[0].shape)),) * (1 + self.offsets)

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        return 4 * inputs[0].elements  # sum; subtract, square, sum


@dataclass(frozen=True)
class Softmax(Op):
    """Softmax (or, with `log`, its logarithm) of `source` along `axis` (non-negative), in fp32."""

    axis: int
    log: bool = False
    source: ex.Expr = ARG0
    stores: tuple[ex.Expr, ...] = ACC

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        shape = iteration_shape("Softmax", (self.source,), inputs, ())
        return tuple((store.dtype, shape) for store in self.stores)

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        return outputs[0].elements * (5 + ex.flops(self.source, *self.stores))


class ReduceKind(Enum):
    SUM = "sum"
    MEAN = "mean"
    MAX = "max"
    MIN = "min"
    PROD = "prod"


@dataclass(frozen=True)
class Reduce(Op):
    """Reduction of `source` over `axes` (non-negative, ascending). Other forms (L1, L2, log-sum, sum of squares) are
    these with an expression before or after. Float sums and products accumulate in fp32 or wider; the accumulator's
    dtype, and that of `Acc` in `stores`, is `source.dtype`."""

    kind: ReduceKind
    axes: tuple[int, ...]
    keepdims: bool
    source: ex.Expr = ARG0
    stores: tuple[ex.Expr, ...] = ACC

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        shape = iteration_shape("Reduce", (self.source,), inputs, ())
        if any(axis >= len(shape) for axis in self.axes):
            raise ShapeError(f"Reduce: axes {self.axes} of a tensor of rank {len(shape)}")
        kept = tuple(1 if i in self.axes else dim for i, dim in enumerate(shape) if self.keepdims or i not in self.axes)
        return tuple((store.dtype, kept) for store in self.stores)

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        elements = max((t.elements for t in inputs), default=0)
        return elements * (1 + ex.flops(self.source)) + outputs[0].elements * ex.flops(*self.stores)


class PoolKind(Enum):
    MAX = "max"
    AVERAGE = "average"


@dataclass(frozen=True)
class Pool(Op):
    """Max or average pooling of `x[n, c, *spatial]`. `pads` gives (begin, end) per axis.

    With `ceil_mode` a last window that starts inside the (begin-padded) input counts. `count_include_pad`: the average
    divides by the kernel size, else by the number of real elements in the window.
    """

    kind: PoolKind
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilations: tuple[int, ...]
    ceil_mode: bool = False
    count_include_pad: bool = False
    stores: tuple[ex.Expr, ...] = ACC

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        shape = inputs[0].shape
        if len(shape) != len(self.kernel) + 2:
            raise ShapeError(f"Pool: input rank {len(shape)} with a kernel of {len(self.kernel)} axes")
        spatial = tuple(self._output_size(i, shape[i + 2]) for i in range(len(self.kernel)))
        return tuple((store.dtype, (*shape[:2], *spatial)) for store in self.stores)

    def _output_size(self, i: int, size: Dim) -> Dim:
        begin, end = self.pads[i]
        extent = (self.kernel[i] - 1) * self.dilations[i] + 1
        free = size + begin + end - extent
        if not self.ceil_mode:
            return floordiv(free, self.strides[i]) + 1
        result = ceildiv(free, self.strides[i]) + 1
        if isinstance(result, int) and isinstance(size, int) and (result - 1) * self.strides[i] >= size + begin:
            result -= 1
        return result

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        return outputs[0].elements * (prod(self.kernel) + ex.flops(*self.stores))
