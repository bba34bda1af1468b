"""Resizing by nearest, linear or cubic interpolation along any axes, in any layout.

What depends on coordinates is computed on the host, once per plan (engine/targets/interpolation.py): for each resized
axis a table of the source offsets and weights of the taps of every output index. The kernel multiplies and adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Op, Resize, ResizeMode
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.codegen.emit import Int, Value, vector_type
from engine.targets.cpu.codegen.expressions import lower as lower_expressions
from engine.targets.cpu.codegen.operands import Access, Operand, addresses, load_gathered, operand_parameters
from engine.targets.cpu.kernel import Context, KernelBuilder, KernelSpec, Launch, Slot, launch, table
from engine.targets.cpu.spaces import Axes, by_memory, operand, read_operands, split_tasks
from engine.targets.interpolation import count_taps, tables_of


@dataclass(frozen=True)
class ResizeSpec(KernelSpec):
    """`resized[i]` says whether axis i has a table. `x` does not move along those axes by itself."""

    taps: int
    resized: tuple[bool, ...]
    x: Access
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    stores: tuple[ex.Expr, ...]
    family: ClassVar[str] = "resize"

    @property
    def rank(self) -> int:
        return len(self.resized)

    @property
    def parameters(self) -> tuple[str, ...]:
        names = [*(f"size{axis}" for axis in range(self.rank)), "units", "units_per_task"]
        for axis, resized in enumerate(self.resized):
            names += [f"offsets{axis}", f"weights{axis}"] if resized else []
        for name, access in self.operands():
            names += operand_parameters(name, access, self.rank)
        return tuple(names)

    def operands(self) -> list[tuple[str, Access]]:
        reads = [("x", self.x), *((f"read{i}", access) for i, access in enumerate(self.reads))]
        return reads + [(f"write{i}", access) for i, access in enumerate(self.writes)]

    def emit(self, kernel: KernelBuilder) -> None:
        _Emitter(self, kernel).emit()


class _Emitter:
    """Writes the kernel of one spec."""

    def __init__(self, spec: ResizeSpec, kernel: KernelBuilder) -> None:
        self.spec, self.b = spec, kernel
        self.lanes = spec.isa.lanes
        self.sizes: list[Int] = [kernel.integer(f"size{axis}") for axis in range(spec.rank)]
        self.x, *self.others = (
            Operand(kernel, name, a, spec.rank, name.startswith("write")) for name, a in spec.operands()
        )
        self.interpolates = spec.taps > 1

    def emit(self) -> None:
        b = self.b
        per_task = b.integer("units_per_task")
        first = b.mul(b.task, per_task)
        b.loop(first, b.smin(b.add(first, per_task), b.integer("units")), 1, lambda unit, _: self._row(unit))

    def _row(self, unit: Value) -> None:
        b, spec, last = self.b, self.spec, self.spec.rank - 1
        rest: Int = unit
        source, cursors = self.x.start, [operand.start for operand in self.others]
        taps: list[list[tuple[Value, Value | None]]] = []  # (offset, weight) of each tap of each resized outer axis
        for axis in reversed(range(last)):
            place = b.rem(rest, self.sizes[axis])
            rest = b.div(rest, self.sizes[axis])
            source = self.x.moved(source, axis, place)
            cursors = [o.moved(c, axis, place) for o, c in zip(self.others, cursors, strict=True)]
            if spec.resized[axis]:
                taps.insert(0, [self._tap(axis, tap, place) for tap in range(spec.taps)])
        rows = [o.row(c, self.lanes) for o, c in zip(self.others, cursors, strict=True)]

        def vector(i: Int, mask: Value | None) -> None:
            acc = self._interpolated(source.pointer, taps, self._load_along(i, mask))
            values = lower_expressions(b, spec.stores, lambda j: rows[j].load(i, mask), acc, self.lanes)
            for row, value in zip(rows[len(spec.reads) :], values, strict=True):
                row.store(i, value, mask)

        whole = b.mul(b.div(self.sizes[last], self.lanes), self.lanes)
        b.loop(0, whole, self.lanes, lambda i, _: vector(i, None))
        remaining = b.sub(self.sizes[last], whole)
        b.branch(b.compare("sgt", remaining, 0), lambda: vector(whole, b.tail_mask(self.lanes, remaining)))

    def _tap(self, axis: int, tap: int, place: Int) -> tuple[Value, Value | None]:
        b = self.b
        index = b.add(b.mul(self.sizes[axis], tap), place)
        offset = b.load("i64", b.at(b.pointer(f"offsets{axis}"), index, 8))
        if not self.interpolates:
            return offset, None
        return offset, b.load_splat(DType.F32, self.lanes, b.at(b.pointer(f"weights{axis}"), index, 4))

    def _interpolated(
        self, pointer: Value, taps: list[list[tuple[Value, Value | None]]], load: Callable[[Value], Value]
    ) -> Value:
        """The weighted sum over the taps of the first axis of that over the others."""
        if not taps:
            return load(pointer)
        values = [
            (self._interpolated(self.b.offset(pointer, offset), taps[1:], load), weight) for offset, weight in taps[0]
        ]
        return self._weighted(values)

    def _weighted(self, values: list[tuple[Value, Value | None]]) -> Value:
        result: Value | None = None
        for value, weight in values:
            if weight is None:
                return value
            if weight.type != value.type:
                weight = self.b.convert("fpext", weight, value.type)
            result = self.b.binary("fmul", value, weight) if result is None else self.b.fma(value, weight, result)
        assert result is not None
        return result

    def _load_along(self, i: Int, mask: Value | None) -> Callable[[Value], Value]:
        """How vectors are read from a row of the source: by its stride, or through the table of the vector axis."""
        b, spec, dtype, last = self.b, self.spec, self.spec.x.dtype, self.spec.rank - 1
        if not spec.resized[last]:
            return lambda pointer: self._number(
                self.x.row(replace(self.x.start, pointer=pointer), self.lanes).load(i, mask)
            )
        offsets, weights = [], []
        for tap in range(spec.taps):
            index = b.add(b.mul(self.sizes[last], tap), i)
            offsets.append(b.load_elements(DType.I64, self.lanes, b.at(b.pointer(f"offsets{last}"), index, 8), mask))
            weights.append(
                b.load_elements(DType.F32, self.lanes, b.at(b.pointer(f"weights{last}"), index, 4), mask)
                if self.interpolates else None
            )  # fmt: skip

        def load(pointer: Value) -> Value:
            values = [
                self._number(load_gathered(b, dtype, addresses(b, pointer, offset), self.lanes, mask))
                for offset in offsets
            ]
            return self._weighted(list(zip(values, weights, strict=True)))

        return load

    def _number(self, value: Value) -> Value:
        """An element as a float to interpolate with."""
        dtype = self.spec.x.dtype
        if not self.interpolates:
            return value
        if dtype.is_float:
            return value
        return self.b.convert("sitofp" if dtype.is_signed else "uitofp", value, vector_type("float", self.lanes))


# --- host side ------------------------------------------------------------------------------------------------------


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Resize)
    if op.mode is not ResizeMode.NEAREST and inputs[0].dtype is DType.BOOL:
        raise UnsupportedOp("Resize: bool has nothing between true and false; use nearest")
    return (Requirement(),) * len(inputs), (Requirement(),) * len(op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    op, x, outputs = step.op, step.inputs[0], step.outputs
    assert isinstance(op, Resize)
    shape = outputs[0].shape
    if not outputs[0].elements:
        return []
    rank = len(shape)
    found = tables_of(op, x.shape, shape)
    tables = {axis: (index * (x.strides[axis] * x.dtype.itemsize), weights) for axis, (index, weights) in found.items()}
    whole = operand(x, rank)
    still = replace(whole, strides=tuple(0 if axis in tables else s for axis, s in enumerate(whole.strides)))
    stores, reads = read_operands(op.stores, step.inputs, (), rank)
    axes = Axes(shape, [still, *reads, *(operand(out, rank) for out in outputs)])
    order = by_memory(axes.operands[1 + len(reads)], range(rank), shape)
    ordered, taps = [tables.get(axis) for axis in order], count_taps(found, op)
    return _launches(op, step, context, axes.ordered(order), ordered, taps, stores, len(reads))


def _launches(
    op: Resize,
    step: Step,
    context: Context,
    axes: Axes,
    tables: list[tuple[np.ndarray, np.ndarray] | None],
    taps: int,
    stores: tuple[ex.Expr, ...],
    reads: int,
) -> list[Launch]:
    dtype = step.inputs[0].dtype
    number = dtype if op.mode is ResizeMode.NEAREST or dtype is DType.F64 else DType.F32
    # `Acc` may ask for the element type (integers): what is interpolated is a float.
    stores = tuple(
        ex.rewrite(s, lambda leaf: ex.cast(ex.Acc(number), leaf.dtype) if isinstance(leaf, ex.Acc) else leaf)
        for s in stores
    )
    accesses = [o.access() for o in axes.operands]
    spec = ResizeSpec(
        context.isa, taps, tuple(t is not None for t in tables), accesses[0],
        tuple(accesses[1 : 1 + reads]), tuple(accesses[1 + reads :]), stores,
    )  # fmt: skip
    units = axes.elements // axes.sizes[-1]
    tasks, per_task = split_tasks(units, axes.elements * spec.taps, context.threads)
    args: dict[str, Slot] = {f"size{axis}": size for axis, size in enumerate(axes.sizes)}
    args |= {"units": units, "units_per_task": per_task}
    for axis, entry in enumerate(tables):
        if entry is not None:
            args |= {f"offsets{axis}": table(entry[0]), f"weights{axis}": table(entry[1], DType.F32)}
    for (name, _), o in zip(spec.operands(), axes.operands, strict=True):
        args |= o.slots(name)
    return [launch(spec, args, tasks)]
