"""Point-wise chains, gathers and copies between layouts (pointwise.cuh); where source and result have their neighbours
along different axes, through tiles in shared memory (transpose.cuh)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from engine.ir import expr as ex
from engine.ir.ops import Op, Pointwise
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import codegen
from engine.targets.cuda.kernel import STORAGE, Argument, Context, Launch, ceildiv, launch
from engine.targets.cuda.spaces import (
    MAX_COUNT,
    VECTOR,
    Operand,
    by_stride,
    check_counts,
    column_group,
    operand,
    operands,
    refuse_empty_tables,
    space,
)

_THREADS = 256
_BLOCKS_PER_MULTIPROCESSOR = 8
_MAX_STORES = 8  # of a launch: a thread holds 8 elements of each
_TILE = 64  # as in transpose.cuh
_LEAST_TRANSPOSED = 16  # elements along both axes from which tiles are worth while


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Pointwise)
    return tuple(Requirement() for _ in inputs), tuple(Requirement() for _ in op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    op = step.op
    assert isinstance(op, Pointwise)
    if not step.outputs[0].elements:
        return []
    reads = operands(step.inputs, ex.arguments(*op.stores), op.gathers, len(step.outputs[0].shape))
    refuse_empty_tables(step, reads.values())
    return launches(op.stores, reads, step.outputs, context)


def copy(source: Operand, output: Tensor, context: Context, family: str) -> list[Launch]:
    """The launches that copy `source`, which lies along the axes of `output`, as part of another family."""
    return launches((ex.Arg(0, output.dtype),), {0: source}, (output,), context, family)


def launches(
    stores: tuple[ex.Expr, ...],
    reads: Mapping[int, Operand],
    outputs: Sequence[Tensor],
    context: Context,
    family: str = "pointwise",
) -> list[Launch]:
    """The launches that compute `stores` of operands along the axes of the outputs."""
    starts = range(0, len(stores), _MAX_STORES)
    parts = [(stores[i : i + _MAX_STORES], outputs[i : i + _MAX_STORES]) for i in starts]
    return [_launch(part, reads, results, context, family) for part, results in parts]


def _launch(
    stores: tuple[ex.Expr, ...],
    every_read: Mapping[int, Operand],
    outputs: Sequence[Tensor],
    context: Context,
    family: str,
) -> Launch:
    shape = outputs[0].shape
    reads = {i: every_read[i] for i in ex.arguments(*stores)}
    writes = [operand(tensor, len(shape)) for tensor in outputs]
    # Axes as they lie in the first result, so that neighbouring threads write neighbouring elements.
    order = by_stride(range(len(shape)), outputs[0].strides)
    transposed = _find_transposition(shape, order, stores, reads, writes)
    if transposed is not None:
        return _launch_transposed(shape, reads, writes, transposed, family)
    every = [*reads.values(), *writes]
    columns = column_group(shape, order, every)
    rows = space(shape, order[: len(order) - len(columns)], columns, every)
    placed = dict(zip(reads, rows.operands, strict=False))
    epilogue = codegen.epilogue(stores, rows, placed, rows.operands[len(reads) :], rows.columns)
    looked_up = any(read.index is not None for read in reads.values())
    width = VECTOR if rows.columns >= VECTOR else 1
    if looked_up and width == VECTOR and min(write.dtype.itemsize for write in writes) >= 4:
        width //= 2  # so that neighbouring threads store neighbouring 16 bytes
    chunks = rows.rows * ceildiv(rows.columns, width)
    most = context.multiprocessors * _BLOCKS_PER_MULTIPROCESSOR
    grid = min(ceildiv(chunks, _THREADS), most)
    ahead = 2 if looked_up and chunks > _THREADS * most else 1  # of a thread that has several
    config: dict[str, int | bool | str] = {
        "width": width, "threads": _THREADS, "ahead": ahead, "count_t": "u32" if chunks <= MAX_COUNT else "u64",
    }  # fmt: skip
    arguments: dict[str, Argument] = {"rows": rows.rows, "columns": rows.columns}
    return launch(family, "pointwise.cuh", config, [epilogue], arguments, (grid, 1, 1), _THREADS)


@dataclass(frozen=True)
class _Transposition:
    """`source` is read along the axes `x` into tiles, and the stores, in which it is the accumulator, are written along
    `y`; `outer` are the other axes."""

    source: ex.Expr
    stores: tuple[ex.Expr, ...]
    outer: tuple[int, ...]
    y: tuple[int, ...]
    x: tuple[int, ...]


def _find_transposition(
    shape: tuple[int, ...],
    order: list[int],
    stores: tuple[ex.Expr, ...],
    reads: dict[int, Operand],
    writes: list[Operand],
) -> _Transposition | None:
    """How to go through tiles, where that pays: all results have their neighbours along one axis, and some inputs along
    another."""
    large = [axis for axis in order if shape[axis] > 1]
    if len(large) < 2 or any(write.strides[large[-1]] != 1 for write in writes):
        return None
    inner = large[-1]
    across = {
        i: next((axis for axis in large if read.strides[axis] == 1), inner)
        for i, read in reads.items()
        if read.strides[inner] not in (0, 1)
    }
    if len(set(across.values())) != 1 or inner in across.values():
        return None
    (other,) = set(across.values())
    if len(across) == 1:
        ((index, _),) = across.items()
        source: ex.Expr = next(leaf for leaf in ex.walk(*stores) if isinstance(leaf, ex.Arg) and leaf.index == index)
        acc = ex.Acc(source.dtype)
        left = tuple(ex.rewrite(store, lambda leaf: acc if leaf == source else leaf) for store in stores)
    elif len(stores) == 1 and all(read.strides[other] in (0, 1) for read in reads.values()):
        source, left = stores[0], (ex.Acc(stores[0].dtype),)
    else:
        return None
    every = [*reads.values(), *writes]
    main = reads[next(iter(across))].strides
    y = column_group(shape, [axis for axis in order if axis != other], every)
    x = column_group(
        shape, [*(axis for axis in by_stride(order, main) if axis not in y and axis != other), other], every
    )
    if min(prod(shape[axis] for axis in axes) for axes in (x, y)) < _LEAST_TRANSPOSED:
        return None
    outer = tuple(axis for axis in order if axis not in x and axis not in y)
    return _Transposition(source, left, outer, tuple(y), tuple(x))


def _launch_transposed(
    shape: tuple[int, ...], reads: dict[int, Operand], writes: list[Operand], plan: _Transposition, family: str
) -> Launch:
    loaded = {i: reads[i] for i in ex.arguments(plan.source)}
    stored = {i: reads[i] for i in ex.arguments(*plan.stores)}
    along_x = space(shape, (*plan.outer, *plan.y), plan.x, list(loaded.values()))
    along_y = space(shape, (*plan.outer, *plan.x), plan.y, [*stored.values(), *writes])
    placed = iter(along_y.operands)
    rest = {i: next(placed) for i in stored}
    prologue = codegen.prologue(plan.source, along_x, dict(zip(loaded, along_x.operands, strict=True)), along_x.columns)
    epilogue = codegen.epilogue(plan.stores, along_y, rest, list(placed), along_y.columns, plan.source.dtype)
    size_x, size_y = along_x.columns, along_y.columns
    tiles = prod(shape[axis] for axis in plan.outer) * ceildiv(size_x, _TILE) * ceildiv(size_y, _TILE)
    check_counts(shape, tiles)
    config: dict[str, int | bool | str] = {
        "width": VECTOR,
        "threads": _THREADS,
        "element_t": STORAGE[plan.source.dtype],
    }
    arguments: dict[str, Argument] = {"size_x": size_x, "size_y": size_y}
    return launch(family, "transpose.cuh", config, [prologue, epilogue], arguments, (tiles, 1, 1), _THREADS)
