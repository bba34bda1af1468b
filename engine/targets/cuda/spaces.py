"""Iteration spaces: which logical axes are a kernel's rows and columns, and how each operand lies along them.

Broadcasting becomes strides of 0; neighbouring row axes that lie together for every operand merge into one level, so
that most kernels split no row index at run time. The device side is kernels/epilogue/access.cuh.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from engine.errors import ShapeError, UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops.light import Gathers
from engine.plan.plan import Step
from engine.plan.tensor import Tensor
from engine.targets.cuda.kernel import Pointer, pointer_to

VECTOR = 8  # elements that a thread moves at once
MAX_COUNT = 2**31 - 1  # rows and columns are 32-bit numbers in a kernel, with room to step beyond the end


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor along iteration axes: element strides, 0 where it is broadcast. `index` selects the row of a table."""

    pointer: Pointer
    dtype: DType
    strides: tuple[int, ...]
    offset: int  # elements from the start of the buffer, for alignment
    index: Operand | None = None
    table_rows: int = 0
    table_stride: int = 0

    def along(self, axes: Sequence[int]) -> Operand:
        """The same with its axes picked and ordered anew."""
        index = self.index and self.index.along(axes)
        strides = tuple(self.strides[axis] for axis in axes)
        return Operand(self.pointer, self.dtype, strides, self.offset, index, self.table_rows, self.table_stride)

    @property
    def walks(self) -> list[tuple[int, ...]]:
        """All its stride vectors."""
        return [self.strides, *(self.index.walks if self.index else [])]


def operand(tensor: Tensor, rank: int) -> Operand:
    """A tensor broadcast NumPy-style to `rank` axes."""
    own = tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    return Operand(pointer_to(tensor), tensor.dtype, (0,) * (rank - len(own)) + own, tensor.offset)


def operands(inputs: Sequence[Tensor], used: Sequence[int], gathers: Gathers, rank: int) -> dict[int, Operand]:
    """The inputs numbered `used`; a gathered table is seen as `table[index[…]]`."""
    tables = dict(gathers)
    return {
        i: gathered(inputs[i], inputs[tables[i]], 0, rank) if i in tables else operand(inputs[i], rank) for i in used
    }


def gathered(table: Tensor, index: Tensor, axis: int, rank: int) -> Operand:
    """`table.take(index, axis)` broadcast NumPy-style to `rank` axes."""
    after = len(table.shape) - axis - 1
    shape = (*table.shape[:axis], *index.shape, *table.shape[axis + 1 :])
    still = (0,) * len(index.shape)
    strides = (*table.strides[:axis], *still, *table.strides[axis + 1 :])
    own = operand(Tensor(table.buffer, table.dtype, shape, strides, table.offset), rank)
    by = operand(
        Tensor(index.buffer, index.dtype, shape, ((0,) * axis + index.strides + (0,) * after), index.offset), rank
    )
    return Operand(own.pointer, own.dtype, own.strides, own.offset, by, table.shape[axis], table.strides[axis])


def refuse_empty_tables(step: Step, reads: Iterable[Operand]) -> None:
    """Raise ShapeError where an index selects from an axis of size 0: there is no row to read instead."""
    if any(operand.index is not None and not operand.table_rows for operand in reads) and step.outputs[0].elements:
        raise ShapeError(f"{step.name}: an index selects from an axis of size 0")


@dataclass(frozen=True, eq=False)
class Space:
    """Rows (levels, outermost first) × columns, and the operands along them: their last axis is the column."""

    levels: tuple[int, ...]
    columns: int
    operands: tuple[Operand, ...]

    @property
    def rows(self) -> int:
        return prod(self.levels)

    def is_aligned(self, operand: Operand, granularity: int) -> bool:
        """Whether every VECTOR of columns starts at a multiple of VECTOR elements. `granularity` divides the columns at
        which the kernel starts and ends."""
        strides = (*operand.strides[:-1], operand.offset, operand.table_stride, granularity)
        return operand.strides[-1] == 1 and all(stride % VECTOR == 0 for stride in strides)


def space(sizes: Sequence[int], row_axes: Sequence[int], column_axes: Sequence[int], every: Sequence[Operand]) -> Space:
    """The space whose rows run over `row_axes` and whose columns run over `column_axes`, in that order.

    Raises UnsupportedOp where the operands do not lie together along the columns (`column_group` gives axes that do),
    or where there are more rows or columns than a kernel counts.
    """
    row_sizes, rows = _merge(sizes, row_axes, every)
    column_sizes, columns = _merge(sizes, column_axes, every)
    if len(column_sizes) > 1:
        raise UnsupportedOp(f"operands of shape {list(sizes)} need {len(column_sizes)} levels of columns")
    check_counts(sizes, prod(row_sizes), prod(column_sizes))
    # Powers of two only up to four, so that another batch size rarely means another kernel.
    padding = {0: 1, 3: 1}.get(len(row_sizes), 0)
    levels = (1,) * padding + row_sizes
    picked = tuple(_padded(operand, rows, padding, columns) for operand in every)
    return Space(levels, prod(column_sizes), picked)


def check_counts(sizes: Sequence[int], *counts: int) -> None:
    """Raise UnsupportedOp where a kernel would have to count further than it can."""
    if max(counts) > MAX_COUNT:
        raise UnsupportedOp(
            f"a tensor of shape {list(sizes)} has {max(counts):,} rows or columns: the limit is 2³¹ − 1"
        )


def by_stride(axes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Axes as they lie in memory, outermost first."""
    return sorted(axes, key=lambda axis: (-abs(strides[axis]), axis))


def innermost(sizes: Sequence[int], every: Sequence[Operand]) -> int:
    """The axis along which most operands have neighbouring elements; the last one in doubt."""
    votes = [sum(size > 1 and operand.strides[axis] == 1 for operand in every) for axis, size in enumerate(sizes)]
    return max(range(len(sizes)), key=lambda axis: (votes[axis], axis))


def column_group(sizes: Sequence[int], ordered: Sequence[int], every: Sequence[Operand]) -> list[int]:
    """As many of the last axes of `ordered` as lie together for every operand."""
    walks = [walk for operand in every for walk in operand.walks]
    group: list[int] = []
    for axis in reversed(ordered):
        outer = next((a for a in group if sizes[a] > 1), None)
        if outer is not None and sizes[axis] > 1:
            apart = any(walk[axis] != walk[outer] * sizes[outer] for walk in walks)
            if apart or sizes[axis] * prod(sizes[a] for a in group) > MAX_COUNT:
                break
        group.insert(0, axis)
    return group


def _merge(sizes: Sequence[int], axes: Sequence[int], every: Sequence[Operand]) -> tuple[tuple[int, ...], list[int]]:
    """Sizes after merging, and the innermost old axis of each new one."""
    walks = [walk for operand in every for walk in operand.walks]
    merged: list[int] = []
    last: list[int] = []
    for axis in axes:
        if sizes[axis] == 1:
            continue
        if last and all(walk[last[-1]] == walk[axis] * sizes[axis] for walk in walks):
            merged[-1] *= sizes[axis]
            last[-1] = axis
        else:
            merged.append(sizes[axis])
            last.append(axis)
    return tuple(merged), last


def _padded(operand: Operand, rows: Sequence[int], padding: int, columns: Sequence[int]) -> Operand:
    index = operand.index and _padded(operand.index, rows, padding, columns)
    column = operand.strides[columns[0]] if columns else 1  # of a single column nothing depends on the stride
    strides = (*(0,) * padding, *(operand.strides[axis] for axis in rows), column)
    return Operand(
        operand.pointer, operand.dtype, strides, operand.offset, index, operand.table_rows, operand.table_stride
    )
