"""What the engine asks of a target: requirements for the plan, an executable for a plan, and facts about the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from engine.ir.ops import Op
from engine.passes.traits import Traits
from engine.plan.plan import Plan, Requirement
from engine.plan.tensor import Tensor
from engine.specs import DeviceInfo, StepStat, TileTrial


class Executable(Protocol):
    """A plan bound to a device, ready to run. Safe to use from many threads."""

    @property
    def nbytes(self) -> int:
        """Memory that the executable itself holds (arguments, tensors of sizes; not the arena, not the weights). Never
        changes."""
        ...

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], side_by_side: bool = False
    ) -> None:
        """Run once. All arrays are C-contiguous, of the plan's dtypes and shapes. `side_by_side`: another run goes on
        meanwhile, which a target that divides its threads leaves some of them. Raises ShapeError for an index out of
        range found on the way, DeviceError where the device failed."""
        ...

    def step_stats(self) -> Sequence[StepStat]:
        """What every step has done since the executable was made, in plan order."""
        ...

    def close(self) -> None:
        """Give its memory back, while no run is in it."""
        ...


class Resident(Protocol):
    """A plan bound to inputs and outputs of its own in the device's memory (NumPy arrays on a CPU, CuPy on a GPU)."""

    @property
    def inputs(self) -> Mapping[str, Any]: ...
    @property
    def outputs(self) -> Mapping[str, Any]: ...

    def launch(self, stream: object) -> None:
        """Run once on the arrays as they are. Waits for the result where `stream` is None, else the run takes its
        place in the stream. Raises what `Executable.run` does; a run in a stream reports an index out of range at the
        next launch that waits."""
        ...

    def step_stats(self) -> Sequence[StepStat]: ...

    def close(self) -> None: ...


class Target(Protocol):
    """A device that runs plans. One instance serves one model: it owns that model's packed weights and its arena."""

    @property
    def traits(self) -> Traits: ...
    @property
    def concurrent_runs(self) -> int:
        """How many runs it is worth having under way: 1 where they take turns, more where copies of one overlap with
        the computing of another, or where they divide the threads. Any number of threads may run; what is beyond this
        waits."""
        ...

    @property
    def divides_threads(self) -> bool:
        """Whether runs `side_by_side` get a part of the threads each, and others all of them: those should be alone."""
        ...

    @property
    def device_info(self) -> DeviceInfo: ...

    def requirements(
        self, op: Op, inputs: tuple[Tensor, ...]
    ) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]: ...

    def bind(self, plan: Plan) -> Executable: ...

    def resident(self, plan: Plan) -> Resident: ...

    def trials(self, plan: Plan, timed: bool, deadline: float) -> Iterator[TileTrial]:
        """The tiles that the products and convolutions of a plan can run in, step by step; `timed`: those that should
        be the fastest are run, and the fastest is kept for plans that are bound later; none is begun after `deadline`
        (of `time.monotonic`). Raises DeviceError where there is nothing to choose from, OutOfMemory."""
        ...

    def memory(self) -> Mapping[str, int]:
        """Bytes by kind: ``weights`` (packed), ``arena``."""
        ...

    def close(self) -> None: ...
