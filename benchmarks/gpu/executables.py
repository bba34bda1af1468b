"""A plan of ours as kernels ready to launch: without the copies of `Model.run`, without the events of `Model.bind`."""

from __future__ import annotations

from engine.model import Model
from engine.plan.plan import Plan
from engine.targets.cuda.target import CudaTarget, Executable


def executable(model: Model, plan: Plan) -> Executable:
    """`plan` bound to the GPU of `model`, on the weights and in the memory that all its plans share."""
    target = model._target  # its own affair for everyone but measurements of what it launches
    assert isinstance(target, CudaTarget)
    return target.bind(plan)


def distinct_kernels(bound: Executable) -> int:
    """How many kernels, told apart by tile, types and expressions, an executable launches."""
    return len({kernel.source for kernel in bound.kernels})
