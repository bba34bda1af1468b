"""A plan of ours as kernels ready to launch: without the copies of `Model.run`, without the events of `Model.bind`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import cupy

from engine.model import Model
from engine.plan.plan import Plan
from engine.targets.cuda.resident import ResidentExecutable
from engine.targets.cuda.target import CudaTarget, Executable

_LAUNCHES, _ROUNDS = 20, 15


def executable(model: Model, plan: Plan) -> Executable:
    """`plan` bound to the GPU of `model`, on the weights and in the memory that all its plans share."""
    return target_of(model).bind(plan)


def resident(model: Model, plan: Plan) -> ResidentExecutable:
    """`plan` with arrays of its own, on the weights of `model`."""
    bound = target_of(model).resident(plan)
    assert isinstance(bound, ResidentExecutable)
    return bound


def target_of(model: Model) -> CudaTarget:
    """The GPU of `model`."""
    target = model._target  # its own affair for everyone but measurements of what it launches
    assert isinstance(target, CudaTarget)
    return target


def distinct_kernels(bound: Executable) -> int:
    """How many kernels, told apart by tile, types and expressions, an executable launches."""
    return len({kernel.source for kernel in bound.kernels})


def compile_threads(processes: int) -> int:
    """Threads for each of so many processes that share the machine."""
    return max(1, (os.cpu_count() or 1) // max(1, processes))


def limit_compiler(model: Model, threads: int) -> None:
    """Compile the kernels of `model` in so many threads: other processes compile theirs meanwhile."""
    target_of(model).device.compiler.workers = threads


def host_us(launch: Callable[[cupy.cuda.Stream], None]) -> float:
    """Microseconds that the host takes to queue one run in a stream, on inputs that lie in device memory: the median
    over rounds of a few launches each, so few that the queue never fills."""
    stream = cupy.cuda.Stream(non_blocking=True)
    times: list[float] = []
    for number in range(_ROUNDS + 1):
        stream.synchronize()
        begin = time.perf_counter()
        for _ in range(_LAUNCHES):
            launch(stream)
        if number:  # the first one captures
            times.append((time.perf_counter() - begin) / _LAUNCHES)
    stream.synchronize()
    return median(times) * 1e6
