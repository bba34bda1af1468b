"""Reductions over any axes. Where the innermost axis in memory of most inputs is reduced, rows are (reduce_rows.cuh),
else columns (reduce_columns.cuh). Where few results leave multiprocessors without work, blocks share a walk, and the
last of them joins the parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Op, Reduce, ReduceKind
from engine.ir.ops.light import iteration_shape
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda import codegen
from engine.targets.cuda.kernel import (
    I64,
    STORAGE,
    Argument,
    Context,
    Functor,
    Launch,
    Pointer,
    ceildiv,
    launch,
    workspace,
)
from engine.targets.cuda.spaces import VECTOR, Operand, check_counts, operand, operands, space
from engine.targets.cuda.sweeps import (
    BLOCK_THREADS,
    VECTORS_PER_PART,
    Parts,
    batch_of,
    pick_column_walk,
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


def lower_reduction(
    step: Step, op: Reduce, shape: tuple[int, ...], count: int, context: Context, shared: bool = True
) -> list[Launch]:
    """The launches of `op` on the operands of `step`; `count` is what a mean divides by. Unless `shared`, blocks share
    no walk, and nothing is left in the workspace."""
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
    itemsize = max((read.dtype.itemsize for read in reads.values()), default=4)
    walk = _Walk(op, count, kept, steps, source.columns, plan.columns_kept, itemsize, shared)
    return [walk.launch(prologue, epilogue, context)]


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
"""Of which type the results of parts are, where not their own: the one they are computed in."""


@dataclass(frozen=True)
class _Walk:
    """What a launch reduces: for each of `kept` rows, `steps` rows of `columns` (one result each where kept), elements
    of `itemsize` bytes. `shared`: blocks may share the walk."""

    op: Reduce
    count: int
    kept: int
    steps: int
    columns: int
    columns_kept: bool
    itemsize: int
    shared: bool

    @property
    def chunks(self) -> int:
        return ceildiv(self.columns, VECTOR)

    @property
    def _value_bytes(self) -> int:
        """Of an element as it is computed."""
        return max(4, self.op.source.dtype.itemsize)

    def launch(self, prologue: Functor, epilogue: Functor, context: Context) -> Launch:
        return self._launch_columns(prologue, epilogue, context) if self.columns_kept else self._launch_rows(
            prologue, epilogue, context
        )  # fmt: skip

    def _launch_columns(self, prologue: Functor, epilogue: Functor, context: Context) -> Launch:
        walk = pick_column_walk(
            self.kept, self.steps, self.chunks, VECTOR * self.itemsize, self._value_bytes, context.multiprocessors,
            self.shared,
        )  # fmt: skip
        arguments: dict[str, Argument] = {
            "column_threads": walk.column_threads, "row_threads": walk.row_threads, "kept_threads": walk.kept_threads,
            "column_tiles": walk.column_tiles,
        }  # fmt: skip
        tiles, left = walk.tiles, walk.kept_threads * walk.column_threads * VECTOR
        return self._launched(
            prologue, epilogue, {"batch": walk.batch}, arguments, walk.parts, walk.threads, tiles, left
        )

    def _launch_rows(self, prologue: Functor, epilogue: Functor, context: Context) -> Launch:
        size = self.steps * self.chunks
        group = min(32, power_of_two(size)) if size <= 32 * _VECTORS_PER_LANE else BLOCK_THREADS
        tiles = ceildiv(self.kept, BLOCK_THREADS // group)
        parts = split(size, VECTORS_PER_PART, tiles, context) if self.shared else Parts(1, size)
        batch = batch_of(ceildiv(parts.size, group), self._value_bytes)
        config = {"group": group, "stepped": self.steps > 1, "batch": batch}
        return self._launched(prologue, epilogue, config, {}, parts, BLOCK_THREADS, tiles, 1)

    def _launched(
        self,
        prologue: Functor,
        epilogue: Functor,
        config: Mapping[str, int | bool | str],
        arguments: Mapping[str, Argument],
        parts: Parts,
        threads: int,
        tiles: int,
        left: int,
    ) -> Launch:
        """`left`: the values that a block leaves to the one that joins the parts."""
        op, dtype = self.op, self.op.source.dtype
        element = codegen.COMPUTE[dtype] if dtype.is_float else STORAGE[dtype]
        shared: dict[str, Argument] = {}
        if parts.count > 1:
            partial = workspace(tiles * parts.count * left * _PARTIAL.get(dtype, dtype).itemsize)
            arrived = Buffer("arrived", BufferKind.PLAN, tiles * 4, np.zeros(tiles, np.uint32))
            shared = {
                "partial": Pointer(partial, ctype=codegen.COMPUTE[dtype]), "arrived": Pointer(arrived, ctype="u32"),
            }  # fmt: skip
        identity = f"DEVICE {codegen.COMPUTE[dtype]} identity() {{ return {_identity(op)}; }}\n"
        return launch(
            "reduce",
            "reduce_columns.cuh" if self.columns_kept else "reduce_rows.cuh",
            {
                "threads": threads, "split": parts.count > 1,
                "mean": op.kind is ReduceKind.MEAN, "operation": _OPERATIONS[op.kind], "element_t": element, **config,
            },
            [prologue, epilogue],
            {
                "kept_rows": self.kept, "steps": self.steps, "columns": self.columns, "chunks": self.chunks,
                "splits": parts.count, "per_split": parts.size, "count": I64(self.count), **arguments, **shared,
            },
            (tiles * parts.count, 1, 1),
            threads,
            helpers=identity,
        )  # fmt: skip


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
