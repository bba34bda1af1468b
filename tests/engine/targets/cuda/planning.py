"""Plans as the CUDA target makes them, where there is no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from engine import passes
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.graph import Graph
from engine.ir.ops import Op, Pointwise
from engine.passes.traits import Traits
from engine.plan.build import Constants, build
from engine.plan.memory import Lifetime, peak
from engine.plan.plan import Plan, Requirement
from engine.plan.tensor import BufferKind, Tensor
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.families import TRAITS, family_of
from engine.targets.cuda.kernel import Context, Launch, WeightStore


class CudaCapabilities:
    """What the kernels of the CUDA target ask of layouts."""

    def requirements(
        self, op: Op, inputs: tuple[Tensor, ...]
    ) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
        return family_of(op).requirements(op, inputs)


def cuda_traits(storage: DType = DType.F16) -> Traits:
    return replace(TRAITS, storage_type=storage)


def cuda_plan(graph: Graph, sizes: Mapping[str, int], storage: DType | None = DType.F16) -> Plan:
    """The plan of a graph as the frontend gives it, which the passes rewrite; with `storage` None of one they have
    rewritten."""
    if storage is not None:
        graph = passes.run(graph, cuda_traits(storage))
    return build(graph, sizes, CudaCapabilities(), Constants())


def launches(plan: Plan) -> list[Launch]:
    """What an H100 would launch. Raises UnsupportedOp for a step without a kernel."""
    context = Context(SM_90A, 132, WeightStore())
    return [launch for step in plan.steps for launch in family_of(step.op).lower(step, context)]


def copies(plan: Plan) -> list[str]:
    """The steps that only move elements."""
    return [step.name for step in plan.steps if isinstance(step.op, Pointwise) and is_copy(step.op)]


def is_copy(op: Pointwise) -> bool:
    return all(isinstance(store, ex.Arg) for store in op.stores) and not op.gathers


def least_arena(plan: Plan) -> int:
    """Bytes of the intermediates that live at once at most."""
    spans: dict[object, Lifetime] = {}
    for index, step in enumerate(plan.steps):
        for tensor in (*step.inputs, *step.outputs):
            if tensor.buffer.kind is BufferKind.ARENA:
                first = spans[tensor.buffer].first if tensor.buffer in spans else index
                spans[tensor.buffer] = Lifetime(tensor.buffer, first, index)
    return peak(list(spans.values()))
