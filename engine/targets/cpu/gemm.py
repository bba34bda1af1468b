"""Matrix products (`Gemm`): packed weights, or two operands of run time.

A constant second operand is packed once into panels (weight store). One of run time is packed by each task into its
scratch, panel by panel, so that no buffer holds it twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import ClassVar, cast

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Gemm, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.codegen.emit import Int, Value, element_type, vector_type
from engine.targets.cpu.codegen.tile import Epilogue, TileSpec
from engine.targets.cpu.kernel import Context, KernelBuilder, Launch, Pointer, Slot, is_constant, pointer_to
from engine.targets.cpu.tiling import (
    Operand,
    Panels,
    Product,
    epilogue_of,
    launches,
    merge_axes,
    packed,
    panels_of,
)

_SEGMENT = 512  # elements of a segment where the reduction is cut


class Second(Enum):
    """How the second operand comes."""

    PACKED = "packed"
    ROWS = "rows"  # neighbours along the columns: copied vector by vector
    STRIDED = "strided"  # copied element by element


@dataclass(frozen=True)
class GemmSpec(TileSpec):
    """Rows at a constant distance; the reduction is cut into segments only to split it."""

    second: Second
    family: ClassVar[str] = "gemm"

    @property
    def row_parameters(self) -> tuple[str, ...]:
        dynamic = () if self.second is Second.PACKED else ("b.depth", "b.column")
        return ("a.row", "depth", *dynamic)

    def emit_pointers(self, kernel: KernelBuilder, a: Value, table: Value, row: Int, count: Int, block: Int) -> None:
        stride = kernel.integer("a.row")
        first = kernel.offset(a, kernel.mul(row, stride))

        def segment(s: Value, _: list[Value]) -> None:
            place = kernel.offset(table, kernel.mul(s, self.rows * 8))
            start = kernel.offset(first, kernel.mul(kernel.mul(s, kernel.integer("inner")), self.dtype.itemsize))
            for r in range(self.rows):
                kernel.store(start, kernel.offset(place, 8 * r), 8)
                start = kernel.offset(start, stride)

        kernel.loop(0, kernel.integer("segments"), 1, segment)

    def segment_length(self, kernel: KernelBuilder, segment: Int) -> Int:
        if not self.split:
            return kernel.integer("depth")
        inner = kernel.integer("inner")
        return kernel.smin(inner, kernel.sub(kernel.integer("depth"), kernel.mul(segment, inner)))

    def emit_pack(self, kernel: KernelBuilder, b: Value, first: Int, last: Int) -> Value:
        if self.second is Second.PACKED:
            return b
        k, itemsize = kernel, self.dtype.itemsize
        area = k.offset(k.scratch, k.integer("packed"))
        depth, down, across = k.integer("depth"), k.integer("b.depth"), k.integer("b.column")
        panel_bytes = k.integer("panel_bytes")

        def panel(p: Value, _: list[Value]) -> None:
            target = k.offset(area, k.mul(k.sub(p, first), panel_bytes))
            columns = k.sub(k.integer("columns"), k.mul(p, self.width))
            source = k.offset(b, k.mul(k.mul(p, self.width), across))
            if self.second is Second.ROWS:
                self._pack_rows(k, source, target, depth, down, columns)
                return

            def column(j: Value, _: list[Value]) -> None:
                used = k.compare("slt", j, columns)
                start = k.offset(source, k.mul(k.smin(j, k.sub(columns, 1)), across))

                def element(i: Value, _: list[Value]) -> None:
                    value = k.load(element_type(self.dtype), k.offset(start, k.mul(i, down)), itemsize)
                    value = k.select(used, value, k.const(0.0, value.type))
                    k.store(value, k.at(k.at(target, j, itemsize), i, self.width * itemsize), itemsize)

                k.loop(0, depth, 1, element)

            k.loop(0, self.width, 1, column)

        k.loop(first, last, 1, panel)
        return k.offset(area, k.mul(k.sub(0, first), panel_bytes))

    def _pack_rows(self, k: KernelBuilder, source: Value, target: Value, depth: Int, down: Int, columns: Int) -> None:
        itemsize = self.dtype.itemsize
        starts = [sum(self.widths[:j]) for j in range(len(self.widths))]
        masks = [
            k.tail_mask(width, k.sub(columns, start)) if j >= self.masked else None
            for j, (width, start) in enumerate(zip(self.widths, starts, strict=True))
        ]

        def row(i: Value, _: list[Value]) -> None:
            from_, to = k.offset(source, k.mul(i, down)), k.offset(target, k.mul(i, self.width * itemsize))
            for width, start, mask in zip(self.widths, starts, masks, strict=True):
                value = k.load_elements(self.dtype, width, k.offset(from_, start * itemsize), mask)
                assert value.type == vector_type(element_type(self.dtype), width)
                k.store(value, k.offset(to, start * itemsize), itemsize)

        k.loop(0, depth, 1, row)


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """The second operand may lie anyhow; all others need neighbours along the last axis."""
    gemm = cast(Gemm, op)
    a, b = inputs[:2]
    if a.dtype is not b.dtype or a.dtype not in (DType.F32, DType.F64):
        raise UnsupportedOp(f"Gemm of {a.dtype.value} and {b.dtype.value}: the CPU target multiplies f32 and f64")
    inner = Requirement(Access.INNER)
    return (inner, Requirement(), *(inner for _ in inputs[2:])), tuple(inner for _ in gemm.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    gemm = cast(Gemm, step.op)
    a, b = step.inputs[:2]
    shape = step.outputs[0].shape
    epilogue, args = epilogue_of(gemm, gemm.stores, step.inputs, shape, range(len(shape)))
    rank = len(shape) - 1
    itemsize = a.dtype.itemsize
    operands = [
        Operand("a", pointer_to(a), _strides(a, rank)),
        Operand("b", pointer_to(b), (*_strides_of(b.shape[:-2], b.strides[:-2], rank - 1, itemsize), 0)),
    ]
    for i, tensor in enumerate(step.outputs):
        operands.append(Operand(f"out{i}", pointer_to(tensor), _strides(tensor, rank)))
    for i, (tensor, strides) in enumerate(args):
        operands.append(Operand(f"arg{i}", pointer_to(tensor), strides[:-1]))
    sizes, operands = merge_axes(shape[:-1], operands)
    if operands[1].strides[-1]:  # a matrix of one row per batch
        sizes = (*sizes, 1)
        operands = [Operand(o.name, o.pointer, (*o.strides, 0)) for o in operands]
    return multiply(context, a, b, shape[-1], sizes, operands, epilogue)


def multiply(
    context: Context,
    a: Tensor,
    b: Tensor,
    columns: int,
    sizes: tuple[int, ...],
    operands: list[Operand],
    epilogue: Epilogue,
) -> list[Launch]:
    """The launches of a product of which the axes are already merged: `sizes` of the batches and of the rows."""
    depth, itemsize = b.shape[-2], a.dtype.itemsize
    known = is_constant(b)
    parts = panels_of(context.isa, a.dtype, columns, known)
    slots: dict[str, Slot] = {"a.row": operands[0].strides[-1], "depth": depth}
    if known:
        second = Second.PACKED
        # Strides of 0 mark axes along which the matrix is repeated: it is packed once for each other index.
        operands[1] = _pack(context, b, parts, operands[1])
    else:
        second = Second.ROWS if b.strides[-1] == 1 or columns == 1 else Second.STRIDED
        slots |= {"b.depth": b.strides[-2] * itemsize, "b.column": b.strides[-1] * itemsize}

    def make(part: Panels, split: bool, batched: bool, finished: Epilogue) -> GemmSpec:
        return GemmSpec(context.isa, a.dtype, part.widths, part.masked, None, split, batched, finished, second)

    def move_second(part: Panels, before: int) -> int:
        return before if known else part.start * b.strides[-1] * itemsize

    segments = -(-depth // _SEGMENT)
    product = Product(
        a.dtype,
        sizes,
        columns,
        depth,
        1,
        _SEGMENT,
        operands,
        epilogue,
        slots,
        not known,
        segments if known else 0,
        depth * itemsize,
    )
    return launches(product, parts, make, move_second, context)


def _pack(context: Context, b: Tensor, parts: Sequence[Panels], operand: Operand) -> Operand:
    """The operand of a packed constant. Its batches lie one after the other, repeated ones once."""
    distinct = tuple(
        slice(None) if size > 1 and stride else slice(0, 1)
        for size, stride in zip(b.shape[:-2], b.strides[:-2], strict=True)
    )
    layout = f"panels {context.isa.name} {[(part.widths, part.count) for part in parts]}"

    def pack(matrix: np.ndarray) -> np.ndarray:
        chosen = matrix[distinct]
        return packed(chosen.reshape(prod(chosen.shape[:-2]), *matrix.shape[-2:]), parts)

    buffer = context.weights.packed(b, layout, pack)
    batch_bytes = sum(part.count * part.width for part in parts) * b.shape[-2] * b.dtype.itemsize
    # Byte strides of the matrices become strides of their packed forms, matrix number by matrix number.
    count = 1
    numbers: dict[int, int] = {0: 0}
    for size, stride in reversed(list(zip(b.shape[:-2], b.strides[:-2], strict=True))):
        if size > 1 and stride:
            numbers[stride * b.dtype.itemsize] = count * batch_bytes
            count *= size
    strides = tuple(numbers[stride] for stride in operand.strides)
    return Operand("b", Pointer(buffer), strides)


def _strides(tensor: Tensor, rank: int) -> tuple[int, ...]:
    """Byte strides of all axes but the last, broadcast to `rank` axes."""
    return _strides_of(tensor.shape[:-1], tensor.strides[:-1], rank, tensor.dtype.itemsize)


def _strides_of(shape: Sequence[int], strides: Sequence[int], rank: int, itemsize: int) -> tuple[int, ...]:
    own = (0 if size == 1 else stride * itemsize for size, stride in zip(shape, strides, strict=True))
    return (*(0,) * (rank - len(shape)), *own)
