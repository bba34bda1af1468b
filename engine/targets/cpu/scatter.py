"""Writing, or adding, … where an index says: the data is copied, then the updates are placed one after the other.

So of updates of the same place the last one wins, and sums are the same every time. Where the index does not move along
the innermost axis (rows of a table), a row is placed with vectors. An index out of range is reported through the step's
status word, and row 0 is written instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from engine.errors import ShapeError, UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Op, Scatter, ScatterKind
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.codegen.emit import Int, Value, element_type
from engine.targets.cpu.codegen.expressions import lower as lower_expressions
from engine.targets.cpu.codegen.operands import Access, Cursor, Operand, Walk, operand_parameters
from engine.targets.cpu.kernel import Context, KernelBuilder, KernelSpec, Launch, Slot, StatusWord, launch, pointer_to
from engine.targets.cpu.pointwise import copy_launches
from engine.targets.cpu.spaces import Axes, TensorOperand, operand

_COMBINE = {
    ScatterKind.ADD: PointOp.ADD,
    ScatterKind.MUL: PointOp.MUL,
    ScatterKind.MAX: PointOp.MAX,
    ScatterKind.MIN: PointOp.MIN,
}


@dataclass(frozen=True)
class ScatterSpec(KernelSpec):
    """Operands lie along the axes of the updates; `depth` indices lie together for each place."""

    kind: ScatterKind
    rank: int
    depth: int
    updates: Access
    index: Access
    result: Access
    family: ClassVar[str] = "scatter"

    @property
    def parameters(self) -> tuple[str, ...]:
        names = [*(f"size{axis}" for axis in range(self.rank)), "units", "component", "status"]
        names += [f"{what}{i}" for what in ("rows", "row") for i in range(self.depth)]
        for name, access in self.operands():
            names += operand_parameters(name, access, self.rank)
        return tuple(names)

    def operands(self) -> list[tuple[str, Access]]:
        return [("updates", self.updates), ("index", self.index), ("result", self.result)]

    def emit(self, kernel: KernelBuilder) -> None:
        _Emitter(self, kernel).emit()


class _Emitter:
    """Writes the kernel of one spec."""

    def __init__(self, spec: ScatterSpec, kernel: KernelBuilder) -> None:
        self.spec, self.b = spec, kernel
        self.sizes: list[Int] = [kernel.integer(f"size{axis}") for axis in range(spec.rank)]
        self.updates, self.index, self.result = (Operand(kernel, name, a, spec.rank) for name, a in spec.operands())

    def emit(self) -> None:
        self.b.loop(0, self.b.integer("units"), 1, lambda unit, _: self._row(unit))

    def _row(self, unit: Value) -> None:
        """The updates along the last axis at one place of the others."""
        b, spec, last = self.b, self.spec, self.spec.rank - 1
        rest: Int = unit
        updates, index, result = self.updates.start, self.index.start, self.result.start
        for axis in reversed(range(last)):
            place = b.rem(rest, self.sizes[axis])
            rest = b.div(rest, self.sizes[axis])
            updates = self.updates.moved(updates, axis, place)
            index = self.index.moved(index, axis, place)
            result = self.result.moved(result, axis, place)
        if spec.index.walk is not Walk.FIXED:
            b.loop(0, self.sizes[last], 1, lambda i, _: self._element(
                self.updates.moved(updates, last, i), self.index.moved(index, last, i),
                self.result.moved(result, last, i),
            ))  # fmt: skip
            return
        result = Cursor(self._placed(result.pointer, index.pointer))
        if Walk.UNIT is spec.updates.walk is spec.result.walk:
            self._vectors(updates.pointer, result.pointer)
        else:
            b.loop(0, self.sizes[last], 1, lambda i, _: self._combine(
                self.updates.moved(updates, last, i).pointer, self.result.moved(result, last, i).pointer, 0, None
            ))  # fmt: skip

    def _element(self, updates: Cursor, index: Cursor, result: Cursor) -> None:
        self._combine(updates.pointer, self._placed(result.pointer, index.pointer), 0, None)

    def _vectors(self, updates: Value, result: Value) -> None:
        """A row of neighbours."""
        b, lanes, itemsize = self.b, self.spec.isa.lanes, self.spec.result.dtype.itemsize
        size = self.sizes[-1]

        def vector(i: Int, mask: Value | None) -> None:
            self._combine(b.at(updates, i, itemsize), b.at(result, i, itemsize), lanes, mask)

        whole = b.mul(b.div(size, lanes), lanes)
        b.loop(0, whole, lanes, lambda i, _: vector(i, None))
        rest = b.sub(size, whole)
        b.branch(b.compare("sgt", rest, 0), lambda: vector(whole, b.tail_mask(lanes, rest)))

    def _placed(self, result: Value, index: Value) -> Value:
        """`result` moved to where the indices from `index` on say."""
        b, dtype = self.b, self.spec.index.dtype
        for i in range(self.spec.depth):
            place = b.load(element_type(dtype), b.offset(index, b.mul(b.integer("component"), i)))
            if place.type != "i64":
                place = b.convert("sext" if dtype.is_signed else "zext", place, "i64")
            result = b.offset(result, b.mul(self._checked(place, b.integer(f"rows{i}")), b.integer(f"row{i}")))
        return result

    def _checked(self, index: Value, rows: Value) -> Value:
        b = self.b
        index = b.select(b.compare("slt", index, 0), b.i64(b.add(index, rows)), index)
        bad = b.compare("uge", index, rows)
        b.branch(bad, lambda: b.store(Value("1", "i64"), b.pointer("status"), 8))
        return b.select(bad, b.i64(0), index)

    def _combine(self, update: Value, result: Value, lanes: int, mask: Value | None) -> None:
        b, spec = self.b, self.spec
        dtype = spec.result.dtype
        value = b.load_elements(dtype, lanes, update, mask)
        if spec.kind is not ScatterKind.REPLACE:
            both = (b.load_elements(dtype, lanes, result, mask), value)
            combined = ex.apply(_COMBINE[spec.kind], ex.Arg(0, dtype), ex.Arg(1, dtype))
            (value,) = lower_expressions(b, (combined,), lambda i: both[i], None, lanes)
        b.store_elements(dtype, value, result, mask)


# --- host side ------------------------------------------------------------------------------------------------------


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Scatter)
    if op.kind is not ScatterKind.REPLACE and inputs[0].dtype is DType.BOOL:
        raise UnsupportedOp(f"Scatter: {op.kind.value} of bool")
    return (Requirement(),) * len(inputs), (Requirement(),)


def lower(step: Step, context: Context) -> list[Launch]:
    op, (data, indices, updates), output = step.op, step.inputs, step.outputs[0]
    assert isinstance(op, Scatter)
    launches = copy_launches(output, operand(data, len(output.shape)), context)
    if not updates.elements:
        return launches
    depth, rank = op.depth(step.inputs), len(updates.shape)
    placed = [op.axis] if op.axis is not None else list(range(depth))
    if any(output.shape[axis] == 0 for axis in placed):
        raise ShapeError(f"{step.name}: an index selects from an axis of size 0")
    itemsize = output.dtype.itemsize
    strides = tuple(stride * itemsize for stride in output.strides)
    if op.axis is not None:
        index, component = operand(indices, rank), 0
        along = tuple(0 if axis == op.axis else stride for axis, stride in enumerate(strides))
    else:
        lead = len(indices.shape) - 1
        still = replace(indices, shape=indices.shape[:-1], strides=indices.strides[:-1])
        index = operand(still, lead)
        index = replace(index, strides=index.strides + (0,) * (rank - lead))
        component = indices.strides[-1] * indices.dtype.itemsize
        along = (0,) * lead + strides[depth:]
    result = TensorOperand(pointer_to(output), output.dtype, along)
    axes, _ = Axes(updates.shape, [operand(updates, rank), index, result]).merged((0,) * rank)
    axes = axes.padded(0, max(0, 1 - len(axes.sizes)))
    spec = ScatterSpec(context.isa, op.kind, len(axes.sizes), depth, *(o.access() for o in axes.operands))
    args: dict[str, Slot] = {f"size{axis}": size for axis, size in enumerate(axes.sizes)}
    args |= {"units": axes.elements // axes.sizes[-1], "component": component, "status": StatusWord()}
    for i, axis in enumerate(placed):
        args |= {f"rows{i}": output.shape[axis], f"row{i}": strides[axis]}
    for (name, _), o in zip(spec.operands(), axes.operands, strict=True):
        args |= o.slots(name)
    return [*launches, launch(spec, args, 1)]
