"""Reductions over any axes: sum, mean, maximum, minimum, product, on floats, integers and booleans.

The innermost axis in memory of the largest operand is walked with vectors, whether it is reduced (the sum of a row) or
kept (the mean over the pixels of an NHWC image, one channel a lane).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Op, Reduce, ReduceKind
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.codegen.emit import Builder, Int, Value, element_type, lanes_of, vector_type
from engine.targets.cpu.codegen.expressions import lower as lower_expressions
from engine.targets.cpu.codegen.expressions import working_dtype
from engine.targets.cpu.codegen.operands import Row
from engine.targets.cpu.codegen.sweeps import Along, Load, Space, Sweep
from engine.targets.cpu.kernel import Context, KernelBuilder, KernelSpec, Launch, launch
from engine.targets.cpu.spaces import Axes, TensorOperand, operand, plan_sweep, read_operands

_SUMS = frozenset({ReduceKind.SUM, ReduceKind.MEAN})


@dataclass(frozen=True)
class ReduceSpec(KernelSpec):
    """`source` reads the first `source_reads` operands of `space`, `stores` those after; the results are the last."""

    space: Space
    kind: ReduceKind
    source_reads: int
    source: ex.Expr
    stores: tuple[ex.Expr, ...]
    family: ClassVar[str] = "reduce"

    @property
    def parameters(self) -> tuple[str, ...]:
        return (*self.space.parameters, "count")

    def emit(self, kernel: KernelBuilder) -> None:
        b = kernel
        sweep = Sweep(kernel, self.space)
        dtype = working_dtype(self.source.dtype)
        type_ = vector_type(element_type(dtype), sweep.lanes)
        identity = b.const(identity_of(self.kind, dtype), type_)
        count = b.integer("count")

        def step(load: Load, partial: Value) -> Value:
            value = lower_expressions(b, [self.source], load, None, sweep.lanes)[0]
            return combined(b, self.kind, dtype, partial, value)

        def combine(a: list[Value], c: list[Value]) -> list[Value]:
            return [combined(b, self.kind, dtype, a[0], c[0])]

        def reduced() -> list[Value]:
            reads = range(self.source_reads)
            if self.kind in _SUMS and dtype.is_float:
                return sweep.sum(reads, identity, step)
            results = sweep.fold(reads, [identity], lambda load, acc: [step(load, acc[0])], combine)
            return [result[0] for result in results]

        def group() -> None:
            results = reduced()

            def write(s: int, rows: dict[int, Row], i: Int, mask: Value | None) -> None:
                # Along rows every lane has the result; one is enough.
                acc = b.extract(results[s], 0) if self.space.along is Along.ROWS else results[s]
                if self.kind is ReduceKind.MEAN:
                    acc = _divided(b, acc, count, dtype)
                values = lower_expressions(
                    b, self.stores, lambda j: rows[self.source_reads + j].load(i, mask), acc, lanes_of(acc.type)
                )
                for j, value in zip(self.space.written, values, strict=True):
                    rows[j].store(i, value, mask)

            sweep.once(write, range(self.source_reads, len(self.space.operands)))

        sweep.run(group)


def identity_of(kind: ReduceKind, dtype: DType) -> float | int | bool:
    """What a reduction of nothing gives."""
    if kind in _SUMS:
        return 0
    if kind is ReduceKind.PROD:
        return 1
    lowest = kind is ReduceKind.MAX
    if dtype.is_float:
        return float("-inf") if lowest else float("inf")
    if dtype is DType.BOOL:
        return not lowest
    bits = 8 * dtype.itemsize
    if dtype.is_signed:
        limit = 1 << (bits - 1)
        return -limit if lowest else limit - 1
    return 0 if lowest else -1  # all bits set


def combined(b: Builder, kind: ReduceKind, dtype: DType, a: Value, c: Value) -> Value:
    """Two partial reductions joined. Maxima and minima of floats propagate NaN."""
    prefix = "f" if dtype.is_float else ""
    if kind in _SUMS:
        return b.binary(f"{prefix}add", a, c)
    if kind is ReduceKind.PROD:
        return b.binary(f"{prefix}mul", a, c)
    if dtype.is_float:
        return b.maximum(a, c) if kind is ReduceKind.MAX else b.minimum(a, c)
    if dtype is DType.BOOL:
        return b.binary("or" if kind is ReduceKind.MAX else "and", a, c)
    order = "s" if dtype.is_signed else "u"
    return b.intrinsic(f"llvm.{order}{kind.value}", a.type, a, c)


def _divided(b: Builder, total: Value, count: Value, dtype: DType) -> Value:
    lanes = lanes_of(total.type)
    scalar = element_type(dtype)
    if dtype.is_float:
        return b.binary("fdiv", total, b.splat(b.convert("sitofp", count, scalar), lanes))
    narrow = count if scalar == "i64" else b.convert("trunc", count, scalar)
    return b.binary("sdiv" if dtype.is_signed else "udiv", total, b.splat(narrow, lanes))


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Reduce)
    dtype = op.source.dtype
    if dtype is DType.BOOL and op.kind not in (ReduceKind.MAX, ReduceKind.MIN):
        raise UnsupportedOp(f"Reduce {op.kind.value} of bool; cast to a number first")
    return (Requirement(),) * len(inputs), (Requirement(),) * len(op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    op, outputs = step.op, step.outputs
    assert isinstance(op, Reduce)
    if not outputs[0].elements:
        return []
    rank = len(outputs[0].shape) + (0 if op.keepdims else len(op.axes))
    (source,), reads = read_operands((op.source,), step.inputs, (), rank)
    used = [step.inputs[i] for i in ex.arguments(op.source)]
    shape = _broadcast([t.shape for t in used], rank)
    stores, more = read_operands(op.stores, step.inputs, (), len(outputs[0].shape))
    results = [operand(out, len(out.shape)) for out in outputs]
    if not op.keepdims:
        more, results = [_expanded(o, op.axes) for o in more], [_expanded(o, op.axes) for o in results]
    main = max(range(len(reads)), key=lambda i: used[i].elements)
    plan = plan_sweep(
        Axes(shape, [*reads, *more, *results]), op.axes, main, len(results), context.isa.lanes, context.threads
    )
    count = prod(shape[axis] for axis in op.axes)
    spec = ReduceSpec(context.isa, plan.space, op.kind, len(reads), source, stores)
    return [launch(spec, plan.args | {"count": count}, plan.tasks)]


def _broadcast(shapes: Sequence[tuple[int, ...]], rank: int) -> tuple[int, ...]:
    sizes = [1] * rank
    for shape in shapes:
        for axis, size in enumerate(shape, start=rank - len(shape)):
            sizes[axis] = size if size != 1 else sizes[axis]
    return tuple(sizes)


def _expanded(o: TensorOperand, axes: Sequence[int]) -> TensorOperand:
    """An operand over the kept axes with the reduced ones put back, which it does not move along."""
    strides = list(o.strides)
    for axis in axes:
        strides.insert(axis, 0)
    return replace(o, strides=tuple(strides))
