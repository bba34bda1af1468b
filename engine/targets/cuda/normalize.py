"""Norms and softmax along the innermost axes (normalize.cuh): one read, one write, the row in registers between."""

from __future__ import annotations

from math import prod

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.ops import Norm, Op, Softmax
from engine.ir.ops.light import Gathers, iteration_shape
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import codegen
from engine.targets.cuda.kernel import Argument, Context, Functor, Launch, ceildiv, launch
from engine.targets.cuda.spaces import VECTOR, Operand, Space, operand, operands, space

_WARP_THREADS = 128  # four rows to a block, a warp each
_BLOCK_THREADS = 256
_MAX_CHUNKS = 8  # of 8 elements a thread: 64 registers
MAX_COLUMNS = _BLOCK_THREADS * _MAX_CHUNKS * VECTOR


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides; results are written with the normalised axes innermost."""
    source, gathers, axes = _reads(op)
    shape = iteration_shape(op.name, (source,), inputs, gathers)
    sizes = [size for size in shape if isinstance(size, int)]
    columns = prod(sizes[axis] for axis in axes)
    if columns > MAX_COLUMNS:
        raise UnsupportedOp(f"{op.name} over {columns} elements: the CUDA kernel takes up to {MAX_COLUMNS}")
    order = (*(axis for axis in range(len(sizes)) if axis not in axes), *axes)
    assert isinstance(op, Norm | Softmax)
    return tuple(Requirement() for _ in inputs), tuple(Requirement(Access.INNER, order) for _ in op.stores)


def _reads(op: Op) -> tuple[ex.Expr, Gathers, tuple[int, ...]]:
    if isinstance(op, Norm):
        return op.source, op.gathers, op.axes
    assert isinstance(op, Softmax)
    return op.source, (), (op.axis,)


def lower(step: Step, context: Context) -> list[Launch]:
    op = step.op
    source, gathers, axes = _reads(op)
    assert isinstance(op, Norm | Softmax)
    shape = step.outputs[0].shape
    row_axes = [axis for axis in range(len(shape)) if axis not in axes]
    rows, functors = prologue_and_epilogue(step, source, gathers, shape, row_axes, axes, op.stores)
    width = VECTOR
    per_warp, per_block = 32 * width, _BLOCK_THREADS * width
    chunks = ceildiv(rows.columns, per_warp)
    warp_rows = chunks <= 4
    if not warp_rows:
        chunks = ceildiv(rows.columns, per_block)
    chunks = 1 << (chunks - 1).bit_length()  # few distinct kernels
    threads = _WARP_THREADS if warp_rows else _BLOCK_THREADS
    group = 32 if warp_rows else _BLOCK_THREADS
    config: dict[str, int | bool | str] = {
        "width": width, "threads": threads, "threads_per_row": group, "chunks": chunks, "kind": _kind(op),
    }  # fmt: skip
    epsilon = float(op.epsilon) if isinstance(op, Norm) else 0.0
    arguments: dict[str, Argument] = {"rows": rows.rows, "columns": rows.columns, "epsilon": epsilon}
    grid = (ceildiv(rows.rows, threads // group), 1, 1)
    return [launch(op.name.lower(), "normalize.cuh", config, functors, arguments, grid, threads)]


_KINDS = ("layer", "rms", "l2", "softmax", "log_softmax")  # as in normalize.cuh


def _kind(op: Op) -> int:
    if isinstance(op, Norm):
        return _KINDS.index(op.kind.value)
    assert isinstance(op, Softmax)
    return _KINDS.index("log_softmax" if op.log else "softmax")


def prologue_and_epilogue(
    step: Step,
    source: ex.Expr,
    gathers: Gathers,
    shape: tuple[int, ...],
    row_axes: list[int],
    column_axes: tuple[int, ...],
    stores: tuple[ex.Expr, ...],
) -> tuple[Space, list[Functor]]:
    """The functors of a kernel whose source and stores run over the same axes, and their space."""
    reads = operands(step.inputs, ex.arguments(source), gathers, len(shape))
    more = operands(step.inputs, ex.arguments(*stores), gathers, len(shape))
    writes = [operand(tensor, len(shape)) for tensor in step.outputs]
    every = space(shape, row_axes, column_axes, [*reads.values(), *more.values(), *writes])
    placed = iter(every.operands)
    loaded: dict[int, Operand] = {i: next(placed) for i in reads}
    stored: dict[int, Operand] = {i: next(placed) for i in more}
    return every, [
        codegen.prologue(source, every, loaded, every.columns),
        codegen.epilogue(stores, every, stored, list(placed), every.columns),
    ]
