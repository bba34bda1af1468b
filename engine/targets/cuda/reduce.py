"""Reductions over any axes (reduce.cuh). The innermost axis in memory of most inputs decides which columns are read.
Few results of long walks are reduced in two launches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Op, Reduce, ReduceKind
from engine.ir.ops.light import iteration_shape
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor, row_major
from engine.targets.cuda import codegen
from engine.targets.cuda.kernel import (
    I64,
    STORAGE,
    Argument,
    Context,
    Functor,
    Launch,
    ceildiv,
    launch,
    workspace,
)
from engine.targets.cuda.spaces import VECTOR, Operand, check_counts, operand, operands, space
from engine.targets.cuda.sweeps import (
    BLOCK_THREADS,
    STEPS_PER_PART,
    VECTORS_PER_PART,
    ColumnTile,
    Parts,
    column_tile,
    power_of_two,
    split,
    sweep,
)

_VECTORS_PER_LANE = 8  # of a result up to which a warp, or a part of one, reduces it alone

_OPERATIONS = {
    ReduceKind.SUM: "Sum", ReduceKind.MEAN: "Sum", ReduceKind.PROD: "Product", ReduceKind.MAX: "Maximum",
    ReduceKind.MIN: "Minimum",
}  # fmt: skip


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Reduce)
    if op.source.dtype is DType.BOOL and op.kind not in (ReduceKind.MAX, ReduceKind.MIN):
        raise UnsupportedOp(f"Reduce {op.kind.value} of bool; cast to a number first")
    return tuple(Requirement() for _ in inputs), tuple(Requirement() for _ in op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    op = step.op
    assert isinstance(op, Reduce)
    dims = iteration_shape("Reduce", (op.source,), step.inputs, ())
    shape = tuple(size for size in dims if isinstance(size, int))
    return lower_reduction(step, op, shape, prod(shape[axis] for axis in op.axes), context)


def lower_reduction(step: Step, op: Reduce, shape: tuple[int, ...], count: int, context: Context) -> list[Launch]:
    """The launches of `op` on the operands of `step`; `count` is what a mean divides by."""
    if not step.outputs[0].elements:
        return []
    reads = operands(step.inputs, ex.arguments(op.source), (), len(shape))
    # Results and epilogue inputs along the axes of the source: reduced ones do not move them.
    writes = [_kept(tensor, op, len(shape)) for tensor in step.outputs]
    more = {i: _kept(step.inputs[i], op, len(shape)) for i in ex.arguments(*op.stores)}
    plan = sweep(shape, op.axes, list(reads.values()), [*more.values(), *writes])
    source = space(shape, plan.rows, plan.columns, list(reads.values()))
    result_sizes = tuple(1 if axis in op.axes else size for axis, size in enumerate(shape))
    result = space(result_sizes, plan.kept, plan.columns if plan.columns_kept else (), [*more.values(), *writes])
    placed = iter(result.operands)
    stored: dict[int, Operand] = {i: next(placed) for i in more}
    prologue = codegen.prologue(op.source, source, dict(zip(reads, source.operands, strict=True)), source.columns)
    epilogue = codegen.epilogue(op.stores, result, stored, list(placed), result.columns, op.source.dtype)

    kept, steps = (prod(shape[axis] for axis in axes) for axes in (plan.kept, plan.steps))
    check_counts(shape, kept * ceildiv(source.columns, VECTOR), steps * ceildiv(source.columns, VECTOR))
    walk = _Walk(op, count, kept, steps, source.columns, plan.columns_kept)
    parts = walk.parts(context)
    if parts.count == 1:
        return [walk.launch(prologue, epilogue, parts)]
    leave, take = _through_workspace(op.source.dtype, kept, parts.count, source.columns if plan.columns_kept else None)
    steps, columns = (parts.count, source.columns) if plan.columns_kept else (1, parts.count)
    joined = replace(walk, steps=steps, columns=columns)
    return [
        walk.launch(prologue, leave, parts, last=False),
        joined.launch(take, epilogue, Parts(1, joined.size)),
    ]


def _kept(tensor: Tensor, op: Reduce, rank: int) -> Operand:
    """A tensor of the result's shape (or broadcasting against it) along the axes of the source."""
    if op.keepdims:
        return operand(tensor, rank)
    along = [axis for axis in range(rank) if axis not in op.axes]
    own = operand(tensor, len(along))
    strides = [0] * rank
    for axis, stride in zip(along, own.strides, strict=True):
        strides[axis] = stride
    return Operand(own.pointer, own.dtype, tuple(strides), own.offset)


_PARTIAL = {
    DType.F16: DType.F32, DType.BF16: DType.F32, DType.I16: DType.I32, DType.I8: DType.I32, DType.U16: DType.I32,
    DType.U8: DType.I32,
}  # fmt: skip
"""The types that results of parts are stored in, where not their own: those they are computed in."""


def _through_workspace(dtype: DType, kept: int, parts: int, columns: int | None) -> tuple[Functor, Functor]:
    """The epilogue that leaves the results of the parts, and the prologue that reads them."""
    stored = _PARTIAL.get(dtype, dtype)
    shape = (kept, parts) if columns is None else (kept, parts, columns)
    buffer = workspace(prod(shape) * stored.itemsize)
    partial = [operand(Tensor(buffer, stored, shape, row_major(shape)), len(shape))]
    written = space(shape, (0, 1), range(2, len(shape)), partial)
    read = space(shape, (0, 1)[: len(shape) - 1], (len(shape) - 1,), partial)
    return (
        codegen.epilogue((ex.Acc(stored),), written, {}, written.operands, written.columns, dtype),
        codegen.prologue(ex.Arg(0, stored), read, {0: read.operands[0]}, read.columns),
    )


@dataclass(frozen=True)
class _Walk:
    """What a launch reduces: for each of `kept` rows, `steps` rows of `columns` (one result each where kept)."""

    op: Reduce
    count: int
    kept: int
    steps: int
    columns: int
    columns_kept: bool

    @property
    def chunks(self) -> int:
        return ceildiv(self.columns, VECTOR)

    @property
    def size(self) -> int:
        """What a thread block walks over: steps where columns are kept, else vectors."""
        return self.steps if self.columns_kept else self.steps * self.chunks

    @property
    def tile(self) -> ColumnTile:
        if self.columns_kept:
            return column_tile(self.kept, self.steps, self.chunks)
        group = min(32, power_of_two(self.size)) if self.size <= 32 * _VECTORS_PER_LANE else BLOCK_THREADS
        return ColumnTile(BLOCK_THREADS // group, 1, group)

    @property
    def column_tiles(self) -> int:
        return ceildiv(self.chunks, self.tile.column_threads) if self.columns_kept else 1

    @property
    def blocks(self) -> int:
        return ceildiv(self.kept, self.tile.kept_threads) * self.column_tiles

    def parts(self, context: Context) -> Parts:
        least = STEPS_PER_PART * self.tile.row_threads if self.columns_kept else VECTORS_PER_PART
        return split(self.size, least, self.blocks, context)

    def launch(self, prologue: Functor, epilogue: Functor, parts: Parts, last: bool = True) -> Launch:
        """`last`: what is stored are the results, not those of parts."""
        op, dtype, tile = self.op, self.op.source.dtype, self.tile
        element = codegen.COMPUTE[dtype] if dtype.is_float else STORAGE[dtype]
        config: dict[str, int | bool | str] = {
            "columns_kept": self.columns_kept, **tile.config, "mean": last and op.kind is ReduceKind.MEAN,
            "last": last, "operation": _OPERATIONS[op.kind], "element_t": element,
        }  # fmt: skip
        arguments: dict[str, Argument] = {
            "kept_rows": self.kept, "steps": self.steps, "columns": self.columns, "chunks": self.chunks,
            "column_tiles": self.column_tiles, "splits": parts.count, "per_split": parts.size,
            "count": I64(self.count),
        }  # fmt: skip
        identity = f"DEVICE {codegen.COMPUTE[dtype]} identity() {{ return {_identity(op)}; }}\n"
        grid = (self.blocks * parts.count, 1, 1)
        return launch(
            "reduce", "reduce.cuh", config, [prologue, epilogue], arguments, grid, tile.threads, helpers=identity
        )


def _identity(op: Reduce) -> str:
    """The value that changes nothing, as an expression."""
    dtype = op.source.dtype
    if op.kind in (ReduceKind.SUM, ReduceKind.MEAN):
        return "0"
    if op.kind is ReduceKind.PROD:
        return "1"
    return codegen.literal(extreme(dtype, lowest=op.kind is ReduceKind.MAX), dtype)


def extreme(dtype: DType, lowest: bool) -> float | int | bool:
    """The lowest or the highest value of a type, infinite for floats."""
    if dtype.is_float:
        return -np.inf if lowest else np.inf
    if dtype is DType.BOOL:
        return not lowest
    limits = np.iinfo(dtype.numpy)
    return int(limits.min if lowest else limits.max)
