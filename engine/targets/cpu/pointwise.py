"""Point-wise chains and copies: one pass over an N-d iteration space, any strides, several stores.

The axes are merged as far as the operands allow; the last is walked with vectors, the one before in rows, the others
are unpacked from the number of a unit of work. An operand that is contiguous along another axis than the stores
(NCHW against NHWC) is read in tiles that are transposed in registers into scratch, so that a transpose copies whole
cache lines. `copy_launches` is what concatenation, padding, gathering and layout changes are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from engine.ir import expr as ex
from engine.ir.ops import Op, Pointwise
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.codegen.emit import Int, Value, vector_type
from engine.targets.cpu.codegen.expressions import lower as lower_expressions
from engine.targets.cpu.codegen.operands import Access, Cursor, Operand, Row, Walk, operand_parameters, transpose
from engine.targets.cpu.kernel import Context, KernelBuilder, KernelSpec, Launch, Slot, launch
from engine.targets.cpu.spaces import (
    Axes,
    TensorOperand,
    by_memory,
    operand,
    read_operands,
    refuse_empty_tables,
    split_tasks,
)

_BLOCK = 16384  # elements of one unit of work
_TILE_ROWS = _TILE_COLUMNS = 64  # long enough for the hardware to prefetch, small enough for the first-level cache
_MIN_TILED = 8  # along shorter axes a transpose through tiles does not pay


@dataclass(frozen=True)
class PointwiseSpec(KernelSpec):
    """`stores[i]`, with `Arg(j)` the j-th of `reads`, written to the i-th of `writes`."""

    rank: int
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    stores: tuple[ex.Expr, ...]
    family: ClassVar[str] = "pointwise"

    @property
    def parameters(self) -> tuple[str, ...]:
        names = [f"size{axis}" for axis in range(self.rank)]
        names += ["block_rows", "block_columns", "row_blocks", "column_blocks", "units", "units_per_task"]
        for name, access in self.operands():
            names += operand_parameters(name, access, self.rank)
        if any(access.index is not None for access in self.reads):
            names.append("status")
        return tuple(names)

    def operands(self) -> list[tuple[str, Access]]:
        reads = [(f"read{i}", access) for i, access in enumerate(self.reads)]
        return reads + [(f"write{i}", access) for i, access in enumerate(self.writes)]

    def tile_bytes(self) -> int:
        """Scratch for the transposed tiles of all tiled operands."""
        return sum(_TILE_COLUMNS * _TILE_ROWS * a.dtype.itemsize for a in self.reads if a.walk is Walk.TILED)

    def emit(self, kernel: KernelBuilder) -> None:
        _Emitter(self, kernel).emit()


class _Emitter:
    """Writes the kernel of one spec."""

    def __init__(self, spec: PointwiseSpec, kernel: KernelBuilder) -> None:
        self.spec = spec
        self.b = kernel
        self.lanes = spec.isa.lanes
        self.sizes: list[Int] = [kernel.integer(f"size{axis}") for axis in range(spec.rank)]
        operands = [Operand(kernel, name, a, spec.rank, name.startswith("write")) for name, a in spec.operands()]
        self.reads, self.writes = operands[: len(spec.reads)], operands[len(spec.reads) :]
        self.tiled = [i for i, access in enumerate(spec.reads) if access.walk is Walk.TILED]

    def emit(self) -> None:
        b = self.b
        per_task = b.integer("units_per_task")
        first = b.mul(b.task, per_task)
        last = b.smin(b.add(first, per_task), b.integer("units"))
        b.loop(first, last, 1, lambda unit, _: self._unit(unit))

    def _unit(self, unit: Value) -> None:
        """A block of rows and columns at one place of the outer axes."""
        b = self.b
        column_blocks, row_blocks = b.integer("column_blocks"), b.integer("row_blocks")
        column = b.mul(b.rem(unit, column_blocks), b.integer("block_columns"))
        rest = b.div(unit, column_blocks)
        row = b.mul(b.rem(rest, row_blocks), b.integer("block_rows"))
        rest = b.div(rest, row_blocks)
        cursors = [operand.start for operand in (*self.reads, *self.writes)]
        for axis in reversed(range(self.spec.rank - 2)):
            place = b.rem(rest, self.sizes[axis])
            rest = b.div(rest, self.sizes[axis])
            cursors = self._moved(cursors, axis, place)
        cursors = self._moved(self._moved(cursors, self.spec.rank - 2, row), self.spec.rank - 1, column)
        rows = b.smin(b.integer("block_rows"), b.sub(self.sizes[-2], row))
        columns = b.smin(b.integer("block_columns"), b.sub(self.sizes[-1], column))
        if self.tiled:
            self._tiles(cursors, rows, columns)
        else:
            b.loop(0, rows, 1, lambda r, _: self._row(self._moved(cursors, self.spec.rank - 2, r), columns, {}))

    def _moved(self, cursors: list[Cursor], axis: int, count: Int) -> list[Cursor]:
        operands = (*self.reads, *self.writes)
        return [operand.moved(cursor, axis, count) for operand, cursor in zip(operands, cursors, strict=True)]

    def _row(self, cursors: list[Cursor], columns: Int, tiles: dict[int, Value]) -> None:
        """One row: whole vectors, then the rest under a mask. `tiles` are rows of transposed operands in scratch."""
        b, lanes = self.b, self.lanes
        rows: list[Row | None] = [
            None if i in tiles else operand.row(cursor, lanes)
            for i, (operand, cursor) in enumerate(zip(self.reads, cursors, strict=False))
        ]
        written = [o.row(c, lanes) for o, c in zip(self.writes, cursors[len(self.reads) :], strict=True)]

        def vector(i: Int, mask: Value | None) -> None:
            def load(j: int) -> Value:
                row = rows[j]
                if row is not None:
                    return row.load(i, mask)
                dtype = self.spec.reads[j].dtype
                return b.load_elements(dtype, lanes, b.at(tiles[j], i, dtype.itemsize))

            values = lower_expressions(b, self.spec.stores, load, None, lanes)
            for row, value in zip(written, values, strict=True):
                row.store(i, value, mask)

        whole = b.mul(b.div(columns, lanes), lanes)
        b.loop(0, whole, lanes, lambda i, _: vector(i, None))
        rest = b.sub(columns, whole)
        b.branch(b.compare("sgt", rest, 0), lambda: vector(whole, b.tail_mask(lanes, rest)))

    # --- tiles ------------------------------------------------------------------------------------------------------

    def _tiles(self, cursors: list[Cursor], rows: Int, columns: Int) -> None:
        """The block in tiles of _TILE_ROWS × _TILE_COLUMNS: tiled operands transposed into scratch, then row by row."""
        b, rank = self.b, self.spec.rank
        scratch: dict[int, Value] = {}
        place = b.scratch
        for i in self.tiled:
            scratch[i] = place
            place = b.offset(place, _TILE_COLUMNS * _TILE_ROWS * self.spec.reads[i].dtype.itemsize)

        def tile(row: Value, column: Value) -> None:
            at = self._moved(self._moved(cursors, rank - 2, row), rank - 1, column)
            height = b.smin(_TILE_ROWS, b.sub(rows, row))
            width = b.smin(_TILE_COLUMNS, b.sub(columns, column))
            for i in self.tiled:
                self._fill(self.reads[i], at[i].pointer, scratch[i], height, width)

            def one(r: Value, _: list[Value]) -> None:
                tiles = {i: b.at(scratch[i], r, _TILE_COLUMNS * self.spec.reads[i].dtype.itemsize) for i in self.tiled}
                self._row(self._moved(at, rank - 2, r), width, tiles)

            b.loop(0, height, 1, one)

        b.loop(0, rows, _TILE_ROWS, lambda r, _: b.loop(0, columns, _TILE_COLUMNS, lambda c, _: tile(r, c)) and None)

    def _fill(self, operand: Operand, source: Value, target: Value, height: Int, width: Int) -> None:
        """scratch[r][c] = operand at (r, c) for a tile; neighbours in memory are neighbours in r."""
        b = self.b
        itemsize = operand.access.dtype.itemsize
        square = min(self.spec.isa.lanes_of(itemsize), 16)
        type_ = vector_type(f"i{8 * itemsize}", square)
        whole_rows, whole_columns = b.mul(b.div(height, square), square), b.mul(b.div(width, square), square)
        target_row = _TILE_COLUMNS * itemsize

        def block(r: Value, c: Value) -> None:
            lines = [
                b.offset(b.at(source, r, itemsize), b.mul(b.add(c, i), operand.strides[-1])) for i in range(square)
            ]
            turned = transpose(b, [b.load(type_, line, itemsize) for line in lines])
            for i, line in enumerate(turned):
                b.store(line, b.offset(b.at(target, b.add(r, i), target_row), b.mul(c, itemsize)), itemsize)

        def single(r: Value, c: Value) -> None:
            value = b.load(
                f"i{8 * itemsize}", b.offset(b.at(source, r, itemsize), b.mul(c, operand.strides[-1])), itemsize
            )
            b.store(value, b.offset(b.at(target, r, target_row), b.mul(c, itemsize)), itemsize)

        def box(rows: tuple[Int, Int], columns: tuple[Int, Int]) -> None:
            b.loop(*columns, 1, lambda c, _: b.loop(*rows, 1, lambda r, _: single(r, c)) and None)

        b.loop(0, whole_columns, square,
               lambda c, _: b.loop(0, whole_rows, square, lambda r, _: block(r, c)) and None)  # fmt: skip
        box((whole_rows, height), (0, whole_columns))
        box((0, height), (whole_columns, width))


# --- host side ------------------------------------------------------------------------------------------------------


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Pointwise)
    return (Requirement(),) * len(inputs), (Requirement(),) * len(op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    op = step.op
    assert isinstance(op, Pointwise)
    rank = len(step.outputs[0].shape)
    stores, reads = read_operands(op.stores, step.inputs, op.gathers, rank)
    refuse_empty_tables(step, reads)
    return space_launches(step.outputs[0].shape, stores, reads, [operand(out, rank) for out in step.outputs], context)


def copy_launches(
    target: Tensor,
    source: TensorOperand | None,
    context: Context,
    *,
    value: ex.Expr | None = None,
    concurrent: bool = False,
) -> list[Launch]:
    """Copy `source`, which lies along the axes of `target`, or fill `target` with the constant `value`."""
    store = value if value is not None else ex.Arg(0, target.dtype)
    reads = [source] if source is not None else []
    writes = [operand(target, len(target.shape))]
    return space_launches(target.shape, (store,), reads, writes, context, concurrent=concurrent)


def space_launches(
    sizes: Sequence[int],
    stores: tuple[ex.Expr, ...],
    reads: list[TensorOperand],
    writes: list[TensorOperand],
    context: Context,
    *,
    concurrent: bool = False,
) -> list[Launch]:
    """The launch that computes `stores` over a space of `sizes`; none where it is empty."""
    axes = Axes(tuple(sizes), [*reads, *writes])
    if not axes.elements:
        return []
    order = by_memory(writes[0], range(len(sizes)), sizes)
    axes, _ = axes.ordered(order).merged((0,) * len(order))
    axes, tiled = _choose_tiles(_with_long_vectors(axes, len(reads)), len(reads))
    axes = axes.padded(0, max(0, 2 - len(axes.sizes)))
    rank = len(axes.sizes)
    accesses = [o.access(tiled=i in tiled) for i, o in enumerate(axes.operands)]
    spec = PointwiseSpec(context.isa, rank, tuple(accesses[: len(reads)]), tuple(accesses[len(reads) :]), stores)

    rows, columns = axes.sizes[-2:]
    block_columns = min(columns, _BLOCK)
    block_rows = min(rows, max(1, _BLOCK // block_columns))
    if tiled:
        # Square-ish blocks: both sides of the transpose stay within the pages and cache lines at hand.
        block_columns = min(columns, 4 * _TILE_COLUMNS)
        block_rows = min(rows, max(_TILE_ROWS, _BLOCK // block_columns // _TILE_ROWS * _TILE_ROWS))
    row_blocks, column_blocks = -(-rows // block_rows), -(-columns // block_columns)
    units = axes.elements // (rows * columns) * row_blocks * column_blocks
    tasks, per_task = split_tasks(units, axes.elements, context.threads)
    args: dict[str, Slot] = {f"size{axis}": size for axis, size in enumerate(axes.sizes)}
    args |= {"block_rows": block_rows, "block_columns": block_columns, "row_blocks": row_blocks}
    args |= {"column_blocks": column_blocks, "units": units, "units_per_task": per_task}
    for (name, _), o in zip(spec.operands(), axes.operands, strict=True):
        args |= o.slots(name)
    return [launch(spec, args, tasks, spec.tile_bytes(), concurrent)]


def _with_long_vectors(axes: Axes, reads: int) -> Axes:
    """Where the stores' innermost axis is short (the 3 channels of an image), walk along that of a read operand."""
    rank = len(axes.sizes)
    if rank < 2 or axes.sizes[-1] >= _MIN_TILED:
        return axes
    for o in axes.operands[:reads]:
        for axis in range(rank - 1):
            if o.strides[axis] == o.dtype.itemsize and axes.sizes[axis] > axes.sizes[-1]:
                return axes.ordered([*(a for a in range(rank) if a != axis), axis])
    return axes


def _choose_tiles(axes: Axes, reads: int) -> tuple[Axes, frozenset[int]]:
    """The operands to read in tiles, and the axes with the one along which those are contiguous next to last."""
    if len(axes.sizes) < 2 or axes.sizes[-1] < _MIN_TILED:
        return axes, frozenset()
    best: dict[int, list[int]] = {}
    for i, o in enumerate(axes.operands[:reads]):
        if o.index is None and o.access().walk is Walk.STRIDED:
            for axis, (stride, size) in enumerate(zip(o.strides[:-1], axes.sizes[:-1], strict=True)):
                if stride == o.dtype.itemsize and size >= _MIN_TILED:
                    best.setdefault(axis, []).append(i)
    if not best:
        return axes, frozenset()
    axis = max(best, key=lambda a: len(best[a]))
    rank = len(axes.sizes)
    return axes.ordered([*(a for a in range(rank - 1) if a != axis), axis, rank - 1]), frozenset(best[axis])
