"""The input list of a node that is being made from several: expressions of each are renumbered into one list.

An operator's fixed operands come first and are never shared with the arguments of its expressions, so that a target may
pack or convert them; among the arguments every value occurs once (once plain and once per index it is gathered by).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from engine.ir import expr as ex
from engine.ir.dim import Dim
from engine.ir.graph import Node, Shape, Value
from engine.ir.ops import Attention, Conv, Gemm, Norm, Op, Pointwise, Pool, Reduce, Resize, Softmax
from engine.ir.ops.light import Gathers

FUSED_OPS = (Gemm, Conv, Attention, Norm, Softmax, Reduce, Pool, Resize)
HEAVY_OPS = (Gemm, Conv, Attention)


def fixed_operands(op: Op) -> int:
    """How many of the first inputs the operator itself reads, apart from what its expressions say."""
    if isinstance(op, Attention | Gemm):
        return op.operands
    if isinstance(op, Conv):
        return 2
    return 0 if isinstance(op, Pointwise | Norm | Softmax | Reduce) else 1


def is_matrix_product(node: Node) -> bool:
    """Whether a node is a 1×1 convolution: the channels of every pixel alone times one matrix."""
    op = node.op
    if not isinstance(op, Conv) or op.transposed or op.groups != 1 or not op.is_pointwise:
        return False
    return all(size == 1 for size in node.inputs[1].shape[2:])


def is_alike(value: Value) -> bool:
    """Whether an operand of an image's epilogue is the same for all pixels."""
    return all(size == 1 for size in value.shape[-2:])


def stores_of(op: Op) -> tuple[ex.Expr, ...]:
    """The epilogue of a fused operator (empty for the others)."""
    stores: tuple[ex.Expr, ...] = getattr(op, "stores", ())
    return stores


def gathers_of(op: Op) -> Gathers:
    gathers: Gathers = getattr(op, "gathers", ())
    return gathers


class Operands:
    """The inputs of a node to be made, growing as expressions are adopted."""

    def __init__(self, fixed: Sequence[Value] = ()) -> None:
        self._inputs = list(fixed)
        self._places: dict[tuple[Value, Value | None], int] = {}
        self._gathers: list[tuple[int, int]] = []

    @property
    def inputs(self) -> tuple[Value, ...]:
        return tuple(self._inputs)

    @property
    def gathers(self) -> Gathers:
        return tuple(self._gathers)

    def place(self, value: Value, index: Value | None = None) -> int:
        """The input number of `value`, or of `value` gathered by `index`."""
        if (value, index) not in self._places:
            self._places[value, index] = len(self._inputs)
            self._inputs.append(value)
            if index is not None:
                self._gathers.append((self._places[value, index], self.place(index)))
        return self._places[value, index]

    def arg(self, value: Value) -> ex.Expr:
        return ex.Arg(self.place(value), value.dtype)

    def adopt(self, e: ex.Expr, node: Node, given: Mapping[Value, ex.Expr] | None = None) -> ex.Expr:
        """The expression `e` of `node`, over these operands; `given` says what stands for the values it has."""
        by = dict(gathers_of(node.op))

        def leaf(part: ex.Expr) -> ex.Expr:
            if not isinstance(part, ex.Arg):
                return part
            value = node.inputs[part.index]
            if part.index in by:
                return ex.Arg(self.place(value, node.inputs[by[part.index]]), part.dtype)
            if given is not None and value in given:
                return given[value]
            return ex.Arg(self.place(value), part.dtype)

        return ex.rewrite(e, leaf)


def with_expressions(
    op: Op, stores: tuple[ex.Expr, ...], source: ex.Expr | None = None, gathers: Gathers | None = None
) -> Op:
    """`op` with another epilogue and, where it has them, another prologue and other gathered operands."""
    changes: dict[str, object] = {"stores": stores}
    if source is not None:
        changes["source"] = source
    if gathers is not None and isinstance(op, Pointwise | Norm):
        changes["gathers"] = gathers
    return replace(op, **changes)


def with_same_shape(op: Op, inputs: Sequence[Value], like: Node) -> bool:
    """Whether `op` of `inputs` has results of the shapes that `like` has."""
    types = op.infer(tuple(inputs))
    return all(shape == value.shape for (_, shape), value in zip(types, like.outputs, strict=False))


def alike(a: Shape, b: Shape) -> bool:
    """Whether two shapes are equal as far as the IR tells: a symbol beside a size other than 1 is taken to be it."""

    def equal(x: Dim, y: Dim) -> bool:
        return x == y or (1 not in (x, y) and not (isinstance(x, int) and isinstance(y, int)))

    return len(a) == len(b) and all(map(equal, a, b))
