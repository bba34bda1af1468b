"""Running sums and products: one step after the other along the axis; lines that lie side by side with vectors."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Op, Running, RunningKind
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.codegen.emit import Int, Value, element_type, vector_type
from engine.targets.cpu.codegen.expressions import lower as lower_expressions
from engine.targets.cpu.codegen.operands import Access, Cursor, Operand, operand_parameters
from engine.targets.cpu.kernel import Context, KernelBuilder, KernelSpec, Launch, Slot, launch
from engine.targets.cpu.spaces import Axes, by_memory, operand, split_tasks


@dataclass(frozen=True)
class RunningSpec(KernelSpec):
    """Axis 0 is the one along which is summed; the last of the others is walked with vectors where there are any."""

    kind: RunningKind
    exclusive: bool
    reverse: bool
    rank: int
    x: Access
    y: Access
    family: ClassVar[str] = "running"

    @property
    def parameters(self) -> tuple[str, ...]:
        names = [*(f"size{axis}" for axis in range(self.rank)), "units", "units_per_task"]
        for name, access in (("x", self.x), ("y", self.y)):
            names += operand_parameters(name, access, self.rank)
        return tuple(names)

    def emit(self, kernel: KernelBuilder) -> None:
        _Emitter(self, kernel).emit()


class _Emitter:
    """Writes the kernel of one spec."""

    def __init__(self, spec: RunningSpec, kernel: KernelBuilder) -> None:
        self.spec, self.b = spec, kernel
        self.sizes: list[Int] = [kernel.integer(f"size{axis}") for axis in range(spec.rank)]
        self.x = Operand(kernel, "x", spec.x, spec.rank)
        self.y = Operand(kernel, "y", spec.y, spec.rank, written=True)

    def emit(self) -> None:
        b = self.b
        per_task = b.integer("units_per_task")
        first = b.mul(b.task, per_task)
        b.loop(first, b.smin(b.add(first, per_task), b.integer("units")), 1, lambda unit, _: self._unit(unit))

    def _unit(self, unit: Value) -> None:
        """The lines along the last axis at one place of the others; a line alone where there is no other axis."""
        b, last, lanes = self.b, self.spec.rank - 1, self.spec.isa.lanes
        rest: Int = unit
        x, y = self.x.start, self.y.start
        for axis in reversed(range(1, last)):
            place = b.rem(rest, self.sizes[axis])
            rest = b.div(rest, self.sizes[axis])
            x, y = self.x.moved(x, axis, place), self.y.moved(y, axis, place)
        if not last:
            self._lines(x, y, 0, 0, None)
            return
        whole = b.mul(b.div(self.sizes[last], lanes), lanes)
        b.loop(0, whole, lanes, lambda i, _: self._lines(x, y, i, lanes, None))
        left = b.sub(self.sizes[last], whole)
        b.branch(
            b.compare("sgt", left, 0), lambda: self._lines(x, y, whole, lanes, b.tail_mask(lanes, left))
        )  # fmt: skip

    def _lines(self, x: Cursor, y: Cursor, column: Int, lanes: int, mask: Value | None) -> None:
        """`lanes` lines side by side (0: one) from end to end."""
        b, spec = self.b, self.spec
        count = self.sizes[0]
        type_ = vector_type(element_type(spec.x.dtype), lanes)
        identity = b.const(0 if spec.kind is RunningKind.SUM else 1, type_)

        def one(i: Value, carried: list[Value]) -> list[Value]:
            place = b.sub(b.sub(count, 1), i) if spec.reverse else i
            from_, to = self.x.moved(x, 0, place), self.y.moved(y, 0, place)
            if lanes:
                value = self.x.row(from_, lanes).load(column, mask)
            else:
                value = b.load_elements(spec.x.dtype, 0, from_.pointer)
            total = self._combined(carried[0], value, lanes)
            stored = carried[0] if spec.exclusive else total
            if lanes:
                self.y.row(to, lanes).store(column, stored, mask)
            else:
                b.store_elements(spec.y.dtype, stored, to.pointer)
            return [total]

        b.loop(0, count, 1, one, [identity])

    def _combined(self, a: Value, b: Value, lanes: int) -> Value:
        dtype = self.spec.x.dtype
        wide = DType.F32 if dtype in (DType.F16, DType.BF16) else dtype
        op = PointOp.ADD if self.spec.kind is RunningKind.SUM else PointOp.MUL
        both = (a, b)
        (value,) = lower_expressions(
            self.b, (ex.apply(op, ex.Arg(0, wide), ex.Arg(1, wide)),), lambda i: both[i], None, lanes
        )
        return value


# --- host side ------------------------------------------------------------------------------------------------------


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Running)
    if not (inputs[0].dtype.is_float or inputs[0].dtype.is_int):
        raise UnsupportedOp(f"Running {op.kind.value} of {inputs[0].dtype.value}")
    return (Requirement(),), (Requirement(),)


def lower(step: Step, context: Context) -> list[Launch]:
    op, x, y = step.op, step.inputs[0], step.outputs[0]
    assert isinstance(op, Running)
    if not y.elements:
        return []
    rank = len(x.shape)
    every = [operand(tensor, rank) for tensor in (x, y)]
    others = by_memory(every[1], [axis for axis in range(rank) if axis != op.axis], x.shape)
    order = [op.axis, *others]
    axes = Axes(x.shape, every).ordered(order)
    # The axis itself stays apart, also where it has one element.
    lines, _ = Axes(axes.sizes[1:], [o.along(range(1, rank)) for o in axes.operands]).merged((0,) * (rank - 1))
    strides = [o.strides[0] for o in axes.operands]
    sizes = (axes.sizes[0], *lines.sizes)
    placed = [
        type(o)(o.pointer, o.dtype, (stride, *o.strides)) for o, stride in zip(lines.operands, strides, strict=True)
    ]
    spec = RunningSpec(context.isa, op.kind, op.exclusive, op.reverse, len(sizes), *(o.access() for o in placed))
    units = prod(sizes[1:-1]) if len(sizes) > 1 else 1
    tasks, per_task = split_tasks(units, y.elements, context.threads)
    args: dict[str, Slot] = {f"size{axis}": size for axis, size in enumerate(sizes)}
    args |= {"units": units, "units_per_task": per_task}
    for name, o in zip(("x", "y"), placed, strict=True):
        args |= o.slots(name)
    return [launch(spec, args, tasks)]
