"""A GPU for tests without one: the interpreter behind the target's interface, in any precision, wrong on demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Gemm, Op
from engine.passes.traits import Traits
from engine.plan.plan import Plan
from engine.plan.tensor import Tensor
from engine.specs import DeviceInfo, StepStat
from engine.targets.host import HostResident
from tests.engine.plan.executor import AnyLayout, execute


@dataclass
class FakeGpu:
    """`kernels`: storage types of which it has matrix products. `noise`: relative error that it adds, by type."""

    kernels: frozenset[DType] = frozenset({DType.F16, DType.BF16, DType.F32})
    noise: Mapping[DType, float] = field(default_factory=dict)
    runs: list[DType] = field(default_factory=list)
    """Storage type of every run."""
    sizes: list[Mapping[str, int]] = field(default_factory=list)
    """Sizes of the plan of every run."""
    traits: Traits = field(default_factory=Traits)
    open: int = 0
    """Targets made and not closed."""

    def target(self) -> FakeTarget:
        self.open += 1
        return FakeTarget(self, self.traits)


@dataclass
class FakeTarget:
    gpu: FakeGpu
    traits: Traits = field(default_factory=Traits)
    concurrent_runs: int = 1
    divides_threads: bool = False
    device_info: DeviceInfo = field(
        default_factory=lambda: DeviceInfo("cuda:0", "fake", "sm_90a", 0, 1.0, 1.0, 1 << 20, 4.0)
    )

    def requirements(self, op: Op, inputs: tuple[Tensor, ...]) -> Any:
        if isinstance(op, Gemm) and inputs[1].dtype not in self.gpu.kernels:
            raise UnsupportedOp(f"no product of {inputs[1].dtype.value}")
        return AnyLayout().requirements(op, inputs)

    def bind(self, plan: Plan) -> FakeExecutable:
        return FakeExecutable(self.gpu, plan)

    def resident(self, plan: Plan) -> HostResident:
        return HostResident(plan, self.bind(plan))

    def memory(self) -> dict[str, int]:
        return {"weights": 0, "arena": 0}

    def close(self) -> None:
        self.gpu.open -= 1


@dataclass
class FakeExecutable:
    gpu: FakeGpu
    plan: Plan
    nbytes: int = 0

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], side_by_side: bool = False
    ) -> None:
        storage = next((step.inputs[1].dtype for step in self.plan.steps if isinstance(step.op, Gemm)), DType.F32)
        self.gpu.runs.append(storage)
        self.gpu.sizes.append(self.plan.sizes)
        with np.errstate(all="ignore"):
            for name, array in execute(self.plan, inputs).items():
                noise = self.gpu.noise.get(storage, 0.0)
                outputs[name][...] = array * (1 + noise) if noise else array

    def step_stats(self) -> Sequence[StepStat]:
        return []

    def close(self) -> None:
        pass
