"""Operators that move data: concatenation, padding, gathering, resizing; tensors made of sizes; and foreign
operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod

from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir.dim import Dim, product
from engine.ir.dtype import DType
from engine.ir.ops.base import ConcreteShape, Op, OperandTypes, ResultTypes, broadcast_shapes


@dataclass(frozen=True)
class Concat(Op):
    """Concatenation of all inputs along `axis` (non-negative)."""

    axis: int

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        shapes = [t.shape for t in inputs]
        if any(len(shape) != len(shapes[0]) for shape in shapes) or self.axis >= len(shapes[0]):
            raise ShapeError(f"Concat: ranks {[len(s) for s in shapes]} along axis {self.axis}")
        total: Dim = 0
        for shape in shapes:
            total = total + shape[self.axis]
        others = [(*shape[: self.axis], 1, *shape[self.axis + 1 :]) for shape in shapes]
        merged = broadcast_shapes("Concat", *others)
        return ((inputs[0].dtype, (*merged[: self.axis], total, *merged[self.axis + 1 :])),)


class PadMode(Enum):
    CONSTANT = "constant"
    REFLECT = "reflect"
    EDGE = "edge"
    WRAP = "wrap"
    ROLL = "roll"  # not ONNX's: begin + end is 0, and what leaves at one end comes in at the other


@dataclass(frozen=True)
class Pad(Op):
    """`pads[i]` = (begin, end) elements added to axis i; negative numbers crop (before the rest is padded, where the
    mode reads elements)."""

    pads: tuple[tuple[int, int], ...]
    mode: PadMode = PadMode.CONSTANT
    value: float | int | bool = 0

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        shape = inputs[0].shape
        if len(shape) != len(self.pads):
            raise ShapeError(f"Pad: {len(self.pads)} paddings for a tensor of rank {len(shape)}")
        return ((inputs[0].dtype, tuple(d + b + e for d, (b, e) in zip(shape, self.pads, strict=True))),)


@dataclass(frozen=True)
class Gather(Op):
    """ONNX Gather: `data.take(indices, axis)`; negative indices count from the end.

    Along axis 0 of a table it is usually better written as a gathered operand (see `light.Pointwise`).
    """

    axis: int

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        data, indices = inputs[0], inputs[1]
        if self.axis >= len(data.shape):
            raise ShapeError(f"Gather: axis {self.axis} of a tensor of rank {len(data.shape)}")
        return ((data.dtype, (*data.shape[: self.axis], *indices.shape, *data.shape[self.axis + 1 :])),)

    def bytes(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        return inputs[1].nbytes + 2 * outputs[0].nbytes


class ResizeMode(Enum):
    NEAREST = "nearest"
    LINEAR = "linear"
    CUBIC = "cubic"


@dataclass(frozen=True)
class Resize(Op):
    """ONNX Resize to `shape`, with the input coordinate of output i along an axis given by `scale` and
    `coordinates` (ONNX coordinate_transformation_mode). `rounding` is ONNX nearest_mode. `antialias`: where the image
    shrinks, the filter is stretched over all elements that a result stands for; `exclude_outside`: elements beyond the
    edge count nothing, instead of being the edge's."""

    shape: tuple[Dim, ...]
    scales: tuple[float | None, ...]  # output size over input size; None: from the shapes
    mode: ResizeMode
    coordinates: str = "half_pixel"
    rounding: str = "round_prefer_floor"
    cubic_coefficient: float = -0.75
    antialias: bool = False
    exclude_outside: bool = False
    stores: tuple[ex.Expr, ...] = (ex.Acc(),)

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        if len(inputs[0].shape) != len(self.shape):
            raise ShapeError(f"Resize: rank {len(inputs[0].shape)} to rank {len(self.shape)}")
        return tuple((store.dtype, self.shape) for store in self.stores)

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        taps = {ResizeMode.NEAREST: 0, ResizeMode.LINEAR: 2, ResizeMode.CUBIC: 4}[self.mode]
        resized = [(i, o) for i, o in zip(inputs[0].shape, outputs[0].shape, strict=True) if i != o]
        met = prod(-(-taps * i // o) if self.antialias and o < i else taps for i, o in resized)
        return outputs[0].elements * (2 * met if taps else 0)


@dataclass(frozen=True)
class Undefined(Op):
    """A tensor of `shape`, of the type of its input (which is not read), whose content does not matter: whoever reads
    it selects something else. No step computes it; as an operand of Concat it is a gap."""

    shape: tuple[Dim, ...]

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        return ((inputs[0].dtype, self.shape),)

    def bytes(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        return 0


@dataclass(frozen=True)
class ShapeTensor(Op):
    """A tensor of `shape` whose elements are sizes: `values` in row-major order, or, where `values` is None, the
    numbers 0, 1, 2, … (`shape` has then one axis). It has no inputs; the plan computes it once when it is built."""

    shape: tuple[Dim, ...]
    values: tuple[Dim, ...] | None
    dtype: DType = DType.I64

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        if self.values is not None and product(self.shape) != len(self.values):
            raise ShapeError(f"ShapeTensor: {len(self.values)} values for shape {self.shape}")
        return ((self.dtype, self.shape),)

    def bytes(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        return 0


@dataclass(frozen=True)
class Opaque(Op):
    """A rare ONNX operator without a kernel, run on the host through `onnx.reference`; counted, named, refused in
    strict mode. `node` is the serialised NodeProto with its inputs renamed to ``i0, i1, …`` ("" where absent; the
    node's inputs are those present, in order); `opsets` the (domain, version) pairs; `results` the output types."""

    op_type: str
    node: bytes
    opsets: tuple[tuple[str, int], ...]
    results: tuple[tuple[DType, tuple[Dim, ...]], ...]

    @property
    def name(self) -> str:
        return f"Opaque[{self.op_type}]"

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        return self.results
