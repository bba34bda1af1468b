"""Iteration spaces of the light kernels: which axes a kernel walks, in which order, and how operands lie along them.

Host side, run when a step is lowered: broadcasting becomes strides of 0, axes that lie together for every operand are
merged, and the axis that the kernel walks with vectors is chosen. `codegen/operands.py` is the device side.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops.light import Gathers
from engine.plan.plan import Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.codegen.operands import Access, Walk
from engine.targets.cpu.codegen.sweeps import Along, Space
from engine.targets.cpu.kernel import Pointer, Slot, StatusWord, pointer_to


@dataclass(frozen=True)
class IndexOperand:
    """The index of a table: where it lies along the axes (bytes), and the table's axis that it selects from."""

    pointer: Pointer
    dtype: DType
    strides: tuple[int, ...]
    rows: int
    row_stride: int


@dataclass(frozen=True)
class TensorOperand:
    """A tensor along the iteration axes: byte strides, 0 where it is broadcast."""

    pointer: Pointer
    dtype: DType
    strides: tuple[int, ...]
    index: IndexOperand | None = None

    def along(self, axes: Sequence[int]) -> TensorOperand:
        """The same with its axes picked and ordered anew."""
        index = self.index and replace(self.index, strides=tuple(self.index.strides[axis] for axis in axes))
        return replace(self, strides=tuple(self.strides[axis] for axis in axes), index=index)

    @property
    def walks(self) -> list[tuple[int, ...]]:
        """All its stride vectors."""
        return [self.strides] + ([self.index.strides] if self.index else [])

    def access(self, tiled: bool = False) -> Access:
        """How it lies along the last axis."""
        walk = Walk.TILED if tiled else _walk(self.strides[-1], self.dtype)
        if self.index is None:
            return Access(self.dtype, walk)
        return Access(self.dtype, walk, self.index.dtype, _walk(self.index.strides[-1], self.index.dtype))

    def slots(self, name: str) -> dict[str, Slot]:
        """Its run-time arguments."""
        slots: dict[str, Slot] = {name: self.pointer}
        slots |= {f"{name}.stride{axis}": stride for axis, stride in enumerate(self.strides)}
        if self.index is not None:
            slots |= {f"{name}.index_stride{axis}": stride for axis, stride in enumerate(self.index.strides)}
            slots |= {f"{name}.index": self.index.pointer, f"{name}.rows": self.index.rows}
            slots |= {f"{name}.row": self.index.row_stride, "status": StatusWord()}
        return slots


def _walk(stride: int, dtype: DType) -> Walk:
    return {0: Walk.FIXED, dtype.itemsize: Walk.UNIT}.get(stride, Walk.STRIDED)


def _broadcast(strides: Sequence[int], shape: Sequence[int], rank: int, itemsize: int) -> tuple[int, ...]:
    own = tuple(0 if size == 1 else stride * itemsize for size, stride in zip(shape, strides, strict=True))
    return (0,) * (rank - len(own)) + own


def operand(tensor: Tensor, rank: int) -> TensorOperand:
    """A tensor broadcast NumPy-style to `rank` axes."""
    strides = _broadcast(tensor.strides, tensor.shape, rank, tensor.dtype.itemsize)
    return TensorOperand(pointer_to(tensor), tensor.dtype, strides)


def gathered(data: Tensor, indices: Tensor, axis: int, rank: int) -> TensorOperand:
    """`data.take(indices, axis)` broadcast to `rank` axes, without taking."""
    itemsize = data.dtype.itemsize
    before, after = range(axis), range(axis + 1, len(data.shape))
    shape = (*(data.shape[i] for i in before), *indices.shape, *(data.shape[i] for i in after))
    own = (*(data.strides[i] for i in before), *(0,) * len(indices.shape), *(data.strides[i] for i in after))
    by = (*(0,) * axis, *indices.strides, *(0 for _ in after))
    index = IndexOperand(
        pointer_to(indices), indices.dtype, _broadcast(by, shape, rank, indices.dtype.itemsize),
        data.shape[axis], data.strides[axis] * itemsize,
    )  # fmt: skip
    return TensorOperand(pointer_to(data), data.dtype, _broadcast(own, shape, rank, itemsize), index)


def read_operands(
    roots: Sequence[ex.Expr], inputs: Sequence[Tensor], gathers: Gathers, rank: int
) -> tuple[tuple[ex.Expr, ...], list[TensorOperand]]:
    """The operands that expressions read, and the expressions with `Arg` numbering those operands."""
    used = ex.arguments(*roots)
    tables = dict(gathers)
    operands = [
        gathered(inputs[i], inputs[tables[i]], 0, rank) if i in tables else operand(inputs[i], rank) for i in used
    ]
    numbers = {i: n for n, i in enumerate(used)}
    return tuple(ex.renumber(root, numbers) for root in roots), operands


def refuse_empty_tables(step: Step, operands: Sequence[TensorOperand]) -> None:
    """Raise ShapeError where an index selects from an axis of size 0: there is no row to read instead."""
    if any(o.index is not None and o.index.rows == 0 for o in operands) and step.outputs[0].elements:
        raise ShapeError(f"{step.name}: an index selects from an axis of size 0")


@dataclass
class Axes:
    """Iteration axes (sizes, outermost first) and the operands along them."""

    sizes: tuple[int, ...]
    operands: list[TensorOperand] = field(default_factory=list)

    def ordered(self, order: Sequence[int]) -> Axes:
        return Axes(tuple(self.sizes[axis] for axis in order), [operand.along(order) for operand in self.operands])

    def merged(self, groups: Sequence[int]) -> tuple[Axes, tuple[int, ...]]:
        """Axes of size 1 dropped and neighbours merged where they lie together for every operand. Only axes of the same
        group merge (`groups[i]` is that of axis i, ascending); also returns the groups of what is left."""
        keep = [axis for axis, size in enumerate(self.sizes) if size != 1]
        walks = [walk for operand in self.operands for walk in operand.walks]
        sizes: list[int] = []
        last: list[int] = []  # the innermost old axis of each new one
        for axis in keep:
            joins = sizes and groups[last[-1]] == groups[axis]
            if joins and all(walk[last[-1]] == walk[axis] * self.sizes[axis] for walk in walks):
                sizes[-1] *= self.sizes[axis]
                last[-1] = axis
            else:
                sizes.append(self.sizes[axis])
                last.append(axis)
        return Axes(tuple(sizes), [o.along(last) for o in self.operands]), tuple(groups[axis] for axis in last)

    def padded(self, at: int, count: int) -> Axes:
        """`count` axes of size 1 inserted before axis `at`."""
        operands = []
        for operand in self.operands:
            index = operand.index and replace(operand.index, strides=_inserted(operand.index.strides, at, count))
            operands.append(replace(operand, strides=_inserted(operand.strides, at, count), index=index))
        return Axes(_inserted(self.sizes, at, count, 1), operands)

    @property
    def elements(self) -> int:
        return prod(self.sizes)


def _inserted(values: tuple[int, ...], at: int, count: int, value: int = 0) -> tuple[int, ...]:
    return (*values[:at], *(value,) * count, *values[at:])


def by_memory(operand: TensorOperand, axes: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """`axes` in the order in which `operand` lies in memory, widest stride first (axes that it repeats come first)."""

    def place(axis: int) -> tuple[bool, int, int]:
        return operand.strides[axis] != 0 and sizes[axis] != 1, -abs(operand.strides[axis]), axis

    return sorted(axes, key=place)


_COLUMN_BLOCK = 4  # groups of vectors in one unit of work of a sweep over columns
_SWEEP_GRAIN = 4096


@dataclass(frozen=True)
class SweepPlan:
    """A sweep over concrete axes: its compile-time shape, and its run-time arguments and tasks."""

    space: Space
    args: dict[str, Slot]
    tasks: int


def plan_sweep(axes: Axes, reduced: Collection[int], main: int, writes: int, lanes: int, threads: int) -> SweepPlan:
    """Order the axes for a sweep that reduces `reduced`: operand `main` decides which axis is walked with vectors."""
    rank = len(axes.sizes)
    order = by_memory(axes.operands[main], range(rank), axes.sizes)
    lengthy = [axis for axis in order if axes.sizes[axis] != 1]
    along = Along.ROWS if lengthy and lengthy[-1] in reduced else Along.COLUMNS
    order = sorted(order, key=lambda axis: axis in reduced)  # stable: each group stays in memory order
    axes, groups = axes.ordered(order).merged([int(axis in reduced) for axis in order])
    kept = groups.count(0)
    if along is Along.COLUMNS:
        if not kept:
            axes, kept = axes.padded(0, 1), 1
        total = len(axes.sizes)
        axes = axes.ordered([*range(kept - 1), *range(kept, total), kept - 1])
        kept -= 1
    accesses = tuple(operand.access() for operand in axes.operands)
    space = Space(along, kept, len(axes.sizes) - kept - 1, accesses, writes)
    block = _COLUMN_BLOCK * 4 * lanes
    blocks = -(-axes.sizes[-1] // block) if along is Along.COLUMNS else 1
    units = prod(axes.sizes[:kept]) * blocks
    tasks, per_task = split_tasks(units, axes.elements, threads, _SWEEP_GRAIN)
    args: dict[str, Slot] = {f"size{axis}": size for axis, size in enumerate(axes.sizes)}
    args |= {"units": units, "units_per_task": per_task, "block": block, "blocks": blocks}
    for i, operand in enumerate(axes.operands):
        args |= operand.slots(f"operand{i}")
    return SweepPlan(space, args, tasks)


def split_tasks(units: int, elements: int, threads: int, grain: int = 16384) -> tuple[int, int]:
    """(tasks, units per task) for `units` independent units of work of `elements` altogether: tasks of at least `grain`
    elements, and a few per thread so that a slow core does not hold up the rest."""
    wanted = max(1, min(units, 4 * threads, elements // grain)) if threads > 1 else 1
    per_task = -(-units // wanted)
    return -(-units // per_task), per_task
