"""Softmax and log-softmax along any axis, with a prologue and an epilogue.

The exponential is taken twice, for the sum and for the result, instead of storing it in between: that works for any
dtype of result and for a result that lies where the source lay. Attention has its own (`attention.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.ops import Op, Softmax
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.codegen.emit import Builder, Int, Value, element_type, scalar_of, vector_type
from engine.targets.cpu.codegen.expressions import lower as lower_expressions
from engine.targets.cpu.codegen.expressions import working_dtype
from engine.targets.cpu.codegen.operands import Row
from engine.targets.cpu.codegen.sweeps import Load, Space, Sweep
from engine.targets.cpu.codegen.vector_math import VectorMath, by_lane
from engine.targets.cpu.kernel import Context, KernelBuilder, KernelSpec, Launch, launch
from engine.targets.cpu.spaces import Axes, operand, plan_sweep, read_operands


@dataclass(frozen=True)
class SoftmaxSpec(KernelSpec):
    """`source` and `stores` with `Arg(j)` the j-th operand of `space`; the stores are its last operands."""

    space: Space
    log: bool
    source: ex.Expr
    stores: tuple[ex.Expr, ...]
    family: ClassVar[str] = "softmax"

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.space.parameters

    def emit(self, kernel: KernelBuilder) -> None:
        b = kernel
        sweep = Sweep(kernel, self.space)
        type_ = vector_type(element_type(working_dtype(self.source.dtype)), sweep.lanes)
        reads = ex.arguments(self.source)

        def source(load: Load) -> Value:
            return lower_expressions(b, [self.source], load, None, sweep.lanes)[0]

        def larger(a: list[Value], c: list[Value]) -> list[Value]:
            # A NaN that this ignores comes back through the exponential.
            return [b.maximum(a[0], c[0], nan=False)]

        def group() -> None:
            lowest = b.const(float("-inf"), type_)
            maxima = sweep.fold(reads, [lowest], lambda load, acc: larger([source(load)], acc), larger)

            def weigh(load: Load, partial: Value) -> Value:
                return b.binary("fadd", partial, _exp(b, b.binary("fsub", source(load), maxima[sweep.current][0])))

            sums = sweep.sum(reads, b.const(0, type_), weigh)
            finals = [_log(b, s) if self.log else b.binary("fdiv", b.const(1, type_), s) for s in sums]

            def write(s: int, rows: dict[int, Row], i: Int, mask: Value | None) -> None:
                loaded: dict[int, Value] = {}

                def load(j: int) -> Value:
                    return loaded[j] if j in loaded else loaded.setdefault(j, rows[j].load(i, mask))

                shifted = b.binary("fsub", source(load), maxima[s][0])
                acc = (
                    b.binary("fsub", shifted, finals[s]) if self.log else b.binary("fmul", _exp(b, shifted), finals[s])
                )
                values = lower_expressions(b, self.stores, load, acc, sweep.lanes)
                for j, result in zip(self.space.written, values, strict=True):
                    rows[j].store(i, result, mask)

            sweep.each(write)

        sweep.run(group)


def _exp(b: Builder, x: Value) -> Value:
    return VectorMath(b, b.isa.lanes).exp_nonpositive(x) if scalar_of(x.type) == "float" else by_lane(b, "exp", x)


def _log(b: Builder, x: Value) -> Value:
    return VectorMath(b, b.isa.lanes).log(x) if scalar_of(x.type) == "float" else by_lane(b, "log", x)


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Softmax)
    if not op.source.dtype.is_float:
        raise UnsupportedOp(f"Softmax of {op.source.dtype.value}: only floats have one")
    return (Requirement(),) * len(inputs), (Requirement(),) * len(op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    op, outputs = step.op, step.outputs
    assert isinstance(op, Softmax)
    shape = outputs[0].shape
    if not outputs[0].elements:
        return []
    (source, *stores), reads = read_operands((op.source, *op.stores), step.inputs, (), len(shape))
    axes = Axes(shape, [*reads, *(operand(out, len(shape)) for out in outputs)])
    plan = plan_sweep(axes, (op.axis,), len(reads), len(outputs), context.isa.lanes, context.threads)
    return [launch(SoftmaxSpec(context.isa, plan.space, op.log, source, tuple(stores)), plan.args, plan.tasks)]
