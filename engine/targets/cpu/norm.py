"""Layer, RMS and L2 normalisation over any axes, with a prologue (e.g. a sum of gathered embeddings) and an epilogue.

Statistics take the source again on each pass instead of storing it: rows are short enough to stay in the first-level
cache, and what is read twice is not written once. The variance is that of the differences from the mean (two passes).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Norm, NormKind, Op
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.codegen.emit import Int, Value, element_type, vector_type
from engine.targets.cpu.codegen.expressions import lower as lower_expressions
from engine.targets.cpu.codegen.expressions import working_dtype
from engine.targets.cpu.codegen.operands import Row
from engine.targets.cpu.codegen.sweeps import Load, Space, Sweep
from engine.targets.cpu.kernel import Context, KernelBuilder, KernelSpec, Launch, launch
from engine.targets.cpu.spaces import Axes, operand, plan_sweep, read_operands, refuse_empty_tables


@dataclass(frozen=True)
class NormSpec(KernelSpec):
    """`source` and `stores` with `Arg(j)` the j-th operand of `space`; the stores are its last operands."""

    space: Space
    kind: NormKind
    source: ex.Expr
    stores: tuple[ex.Expr, ...]
    family: ClassVar[str] = "norm"

    @property
    def parameters(self) -> tuple[str, ...]:
        return (*self.space.parameters, "count", "epsilon")

    @property
    def dtype(self) -> DType:
        """The dtype of the statistics."""
        return working_dtype(self.source.dtype)

    def emit(self, kernel: KernelBuilder) -> None:
        b = kernel
        sweep = Sweep(kernel, self.space)
        type_ = vector_type(element_type(self.dtype), sweep.lanes)
        zero, one = b.const(0, type_), b.const(1, type_)
        count, epsilon = (_real(b, name, self.dtype, sweep.lanes) for name in ("count", "epsilon"))
        reads = ex.arguments(self.source)

        def source(load: Load) -> Value:
            return lower_expressions(b, [self.source], load, None, sweep.lanes)[0]

        def group() -> None:
            means = [zero] * sweep.sets
            if self.kind is NormKind.LAYER:
                sums = sweep.sum(reads, zero, lambda load, partial: b.binary("fadd", partial, source(load)))
                means = [b.binary("fdiv", total, count) for total in sums]

            def square(load: Load, partial: Value) -> Value:
                value = source(load)
                if self.kind is NormKind.LAYER:
                    value = b.binary("fsub", value, means[sweep.current])
                return b.fma(value, value, partial)

            factors = []
            for total in sweep.sum(reads, zero, square):
                if self.kind is NormKind.L2:
                    length = b.intrinsic("llvm.sqrt", type_, total)
                    factors.append(b.binary("fdiv", one, b.maximum(epsilon, length)))
                else:
                    variance = b.binary("fadd", b.binary("fdiv", total, count), epsilon)
                    factors.append(b.binary("fdiv", one, b.intrinsic("llvm.sqrt", type_, variance)))

            def write(s: int, rows: dict[int, Row], i: Int, mask: Value | None) -> None:
                loaded: dict[int, Value] = {}

                def load(j: int) -> Value:
                    return loaded[j] if j in loaded else loaded.setdefault(j, rows[j].load(i, mask))

                value = source(load)
                if self.kind is NormKind.LAYER:
                    value = b.binary("fsub", value, means[s])
                acc = b.binary("fmul", value, factors[s])
                values = lower_expressions(b, self.stores, load, acc, sweep.lanes)
                for j, result in zip(self.space.written, values, strict=True):
                    rows[j].store(i, result, mask)

            sweep.each(write)

        sweep.run(group)


def _real(b: KernelBuilder, name: str, dtype: DType, lanes: int) -> Value:
    value = b.real(name)
    return b.splat(b.convert("fpext", value, "double") if dtype is DType.F64 else value, lanes)


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Norm)
    if not op.source.dtype.is_float:
        raise UnsupportedOp(f"Norm of {op.source.dtype.value}: only floats have a norm here")
    return (Requirement(),) * len(inputs), (Requirement(),) * len(op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    op, outputs = step.op, step.outputs
    assert isinstance(op, Norm)
    shape = outputs[0].shape
    if not outputs[0].elements:
        return []
    (source, *stores), reads = read_operands((op.source, *op.stores), step.inputs, op.gathers, len(shape))
    refuse_empty_tables(step, reads)
    axes = Axes(shape, [*reads, *(operand(out, len(shape)) for out in outputs)])
    plan = plan_sweep(axes, op.axes, len(reads), len(outputs), context.isa.lanes, context.threads)
    spec = NormSpec(context.isa, plan.space, op.kind, source, tuple(stores))
    count = float(prod(shape[axis] for axis in op.axes))
    return [launch(spec, plan.args | {"count": count, "epsilon": float(op.epsilon)}, plan.tasks)]
