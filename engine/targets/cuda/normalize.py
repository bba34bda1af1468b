"""Norms and softmax over any axes. Rows along the innermost axis in memory stay in registers (normalize.cuh) or, longer
ones, are read twice (normalize_long.cuh); over other axes neighbouring threads hold neighbouring columns
(normalize_columns.cuh). Few long rows are split over blocks, in two launches."""

from __future__ import annotations

from math import prod

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Norm, Op, Softmax
from engine.ir.ops.light import Gathers
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import codegen
from engine.targets.cuda.kernel import (
    F64,
    I64,
    Argument,
    Context,
    Functor,
    Launch,
    Pointer,
    ceildiv,
    launch,
    workspace,
)
from engine.targets.cuda.spaces import (
    VECTOR,
    Operand,
    Space,
    check_counts,
    operand,
    operands,
    refuse_empty_tables,
    space,
)
from engine.targets.cuda.sweeps import (
    BLOCK_THREADS,
    STEPS_PER_PART,
    VECTORS_PER_PART,
    Parts,
    column_tile,
    power_of_two,
    split,
    sweep,
)

_WARP_THREADS = 128  # of a block whose warps have rows of their own
_WARP_CHUNKS = 4  # vectors a thread up to which a warp keeps a row
_MAX_CHUNKS = {DType.F64: 4}  # vectors of 8 elements a thread of a block: 64 registers
_USUAL_MAX_CHUNKS = 8


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    source, _, _ = _reads(op)
    if not source.dtype.is_float:
        raise UnsupportedOp(f"{op.name} of {source.dtype.value}: only floats have one")
    assert isinstance(op, Norm | Softmax)
    return tuple(Requirement() for _ in inputs), tuple(Requirement() for _ in op.stores)


def _reads(op: Op) -> tuple[ex.Expr, Gathers, tuple[int, ...]]:
    if isinstance(op, Norm):
        return op.source, op.gathers, op.axes
    assert isinstance(op, Softmax)
    return op.source, (), (op.axis,)


def lower(step: Step, context: Context) -> list[Launch]:
    if not step.outputs[0].elements:
        return []
    work = _Work(step)
    if work.sweep.columns_kept:
        return work.launch_columns(context)
    vectors = work.steps * work.chunks
    if vectors <= BLOCK_THREADS * _MAX_CHUNKS.get(work.dtype, _USUAL_MAX_CHUNKS):
        return [work.launch_resident(vectors)]
    return work.launch_long(vectors, context)


_KINDS = ("layer", "rms", "l2", "softmax", "log_softmax")  # as in scheduler/statistic.cuh


def _kind(op: Op) -> int:
    if isinstance(op, Norm):
        return _KINDS.index(op.kind.value)
    assert isinstance(op, Softmax)
    return _KINDS.index("log_softmax" if op.log else "softmax")


class _Work:
    """A step as kept rows × (steps × columns), with its functors and what all its kernels take."""

    def __init__(self, step: Step) -> None:
        op, shape = step.op, step.outputs[0].shape
        source, gathers, axes = _reads(op)
        assert isinstance(op, Norm | Softmax)
        reads = operands(step.inputs, ex.arguments(source), gathers, len(shape))
        more = operands(step.inputs, ex.arguments(*op.stores), gathers, len(shape))
        refuse_empty_tables(step, (*reads.values(), *more.values()))
        writes = [operand(tensor, len(shape)) for tensor in step.outputs]
        every = [*reads.values(), *more.values(), *writes]
        self.name = op.name.lower()
        self.dtype = source.dtype
        self.sweep = sweep(shape, axes, every, ())
        self.functors = _functors(
            source, op.stores, space(shape, self.sweep.rows, self.sweep.columns, every), reads, more
        )
        self.kept = prod(shape[axis] for axis in self.sweep.kept)
        self.steps = prod(shape[axis] for axis in self.sweep.steps)
        self.columns = prod(shape[axis] for axis in self.sweep.columns)
        self.chunks = ceildiv(self.columns, VECTOR)
        check_counts(shape, self.kept * self.chunks, self.steps * self.chunks)
        epsilon = float(op.epsilon) if isinstance(op, Norm) else 0.0
        exact = any(tensor.dtype not in (DType.F16, DType.BF16) for tensor in step.outputs)
        self.config: dict[str, int | bool | str] = {"kind": _kind(op), "exact": exact}
        self.arguments: dict[str, Argument] = {
            "steps": self.steps, "columns": self.columns, "chunks": self.chunks,
            "count": I64(prod(shape[axis] for axis in axes)),
            "epsilon": F64(epsilon) if self.dtype is DType.F64 else epsilon,
        }  # fmt: skip

    def launch_resident(self, vectors: int) -> Launch:
        """Rows in registers: of a warp or a part of one, or of a block."""
        group = min(32, power_of_two(vectors))
        threads = _WARP_THREADS
        chunks = ceildiv(vectors, group)
        if chunks > _WARP_CHUNKS:
            group = threads = BLOCK_THREADS
            chunks = power_of_two(ceildiv(vectors, group))
        config = {
            "threads": threads, "threads_per_row": group, "chunks": chunks, "stepped": self.steps > 1,
        }  # fmt: skip
        grid = (ceildiv(self.kept, threads // group), 1, 1)
        arguments = {"rows": self.kept, **self.arguments}
        return launch(self.name, "normalize.cuh", self.config | config, self.functors, arguments, grid, threads)

    def launch_long(self, vectors: int, context: Context) -> list[Launch]:
        """Rows of a block, or of several."""
        parts = split(vectors, VECTORS_PER_PART, self.kept, context)
        config: dict[str, int | bool | str] = {"threads": BLOCK_THREADS, "stepped": self.steps > 1}
        return self._in_phases("normalize_long.cuh", config, {}, self.kept, self.kept, parts, BLOCK_THREADS)

    def launch_columns(self, context: Context) -> list[Launch]:
        """Columns that are kept."""
        tile = column_tile(self.kept, self.steps, self.chunks)
        column_tiles = ceildiv(self.chunks, tile.column_threads)
        blocks = ceildiv(self.kept, tile.kept_threads) * column_tiles
        parts = split(self.steps, STEPS_PER_PART * tile.row_threads, blocks, context)
        arguments: dict[str, Argument] = {"kept_rows": self.kept, "column_tiles": column_tiles}
        results = self.kept * self.columns
        return self._in_phases("normalize_columns.cuh", tile.config, arguments, blocks, results, parts, tile.threads)

    def _in_phases(
        self,
        body: str,
        config: dict[str, int | bool | str],
        arguments: dict[str, Argument],
        blocks: int,
        results: int,
        parts: Parts,
        threads: int,
    ) -> list[Launch]:
        """One launch, or where rows are split one for the statistics of the parts and one that joins them."""
        config = self.config | config
        arguments = self.arguments | arguments | {"splits": parts.count, "per_split": parts.size}
        if parts.count == 1:
            phases = [(False, True)]
        else:
            phases = [(False, False), (True, True)]
            statistic = 3 * (8 if self.dtype is DType.F64 else 4)
            partial = workspace(results * parts.count * statistic)
            arguments["partial"] = Pointer(partial, ctype="struct Statistic")
        grid = (blocks * parts.count, 1, 1)
        return [
            launch(
                self.name, body, config | {"joins": joins, "writes": writes}, self.functors, arguments, grid, threads
            )
            for joins, writes in phases
        ]


def _functors(
    source: ex.Expr, stores: tuple[ex.Expr, ...], every: Space, reads: dict[int, Operand], more: dict[int, Operand]
) -> list[Functor]:
    """The functors of a kernel whose source and stores run over the same space."""
    placed = iter(every.operands)
    loaded = {i: next(placed) for i in reads}
    stored = {i: next(placed) for i in more}
    return [
        codegen.prologue(source, every, loaded, every.columns),
        codegen.epilogue(stores, every, stored, list(placed), every.columns, source.dtype),
    ]
