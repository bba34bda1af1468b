"""Point-wise chains, gathers and copies between layouts (pointwise.cuh)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.ir import expr as ex
from engine.ir.ops import Op, Pointwise
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import codegen
from engine.targets.cuda.kernel import Argument, Context, Launch, ceildiv, launch
from engine.targets.cuda.spaces import VECTOR, Operand, operand, operands, refuse_empty_tables, space

_THREADS = 256
_BLOCKS_PER_MULTIPROCESSOR = 8


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Pointwise)
    return tuple(Requirement() for _ in inputs), tuple(Requirement() for _ in op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    op = step.op
    assert isinstance(op, Pointwise)
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
    first = outputs[0]
    writes = [operand(tensor, len(first.shape)) for tensor in outputs]
    # Axes as they lie in the first result, outermost first, so that neighbouring threads write neighbouring elements.
    order = sorted(range(len(first.shape)), key=lambda axis: (-abs(first.strides[axis]), axis))
    every = [*reads.values(), *writes]
    columns = _column_axes(first.shape, order, [walk for operand in every for walk in operand.walks])
    rows = space(first.shape, order[: len(order) - len(columns)], columns, every)
    vector = rows.columns >= VECTOR
    placed = dict(zip(reads, rows.operands, strict=False))
    epilogue = codegen.epilogue(stores, rows, placed, rows.operands[len(reads) :], rows.columns)
    width = VECTOR if vector else 1
    chunks = rows.rows * ceildiv(rows.columns, width)
    grid = min(ceildiv(chunks, _THREADS), context.multiprocessors * _BLOCKS_PER_MULTIPROCESSOR)
    config: dict[str, int | bool | str] = {"width": width, "threads": _THREADS}
    arguments: dict[str, Argument] = {"rows": rows.rows, "columns": rows.columns}
    return [launch(family, "pointwise.cuh", config, [epilogue], arguments, (grid, 1, 1), _THREADS)]


def _column_axes(shape: tuple[int, ...], order: list[int], walks: list[tuple[int, ...]]) -> list[int]:
    """As many of the last axes of `order` as lie together for every operand."""
    columns: list[int] = []
    for axis in reversed(order):
        outer = next((a for a in columns if shape[a] > 1), None)
        if outer is not None and shape[axis] > 1 and any(walk[axis] != walk[outer] * shape[outer] for walk in walks):
            break
        columns.insert(0, axis)
    return columns
