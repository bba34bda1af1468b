"""What a GPU reaches with nothing in the way: the ceilings of the roofline, measured on the device as it runs now."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import cupy

from engine.ir.dtype import DType
from engine.ir.expr import Arg
from engine.ir.ops import Gemm, Pointwise, Reduce, ReduceKind
from engine.plan.plan import Plan, Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda.resident import ResidentExecutable
from engine.targets.cuda.timing import elapsed_seconds

if TYPE_CHECKING:
    from engine.targets.cuda.target import CudaTarget

_N = 4096
_MEMORY_BYTES = 512 << 20  # several times the cache of any GPU
_ROW = 2048
_CACHED_STEPS = 32
_LEAST_SECONDS = 0.1  # of every measurement: a GPU takes a while to leave its idle clock
_LEAST_REPEATS = 5


def measure_ceilings(target: CudaTarget) -> tuple[float, float, float]:
    """(FLOP/s, bytes/s of memory, bytes/s of the L2 cache): the best tries of our fp16 product of 4096³; of a
    copy and of a sum of 512 MiB; of copies that together take half of the cache, one after the other in a graph."""
    from engine.targets.cuda.covering import ACC, arg, make_step, stored  # which imports the families

    # The second operand lies as packed weights do, k innermost.
    b = Tensor(Buffer("input1", BufferKind.INPUT, _N * _N * 2), DType.F16, (_N, _N), (1, _N))
    product = make_step(Gemm((stored(ACC),)), [(DType.F16, (_N, _N)), b])
    rows = _MEMORY_BYTES // _ROW // 2
    total = make_step(Reduce(ReduceKind.SUM, (1,), False, arg(0), (stored(ACC),)), [(DType.F16, (rows, _ROW))])
    quarter = target.cache_bytes // 4 // 2
    cached = make_step(Pointwise((Arg(0, DType.F16),)), [(DType.F16, (quarter,))])
    flops = 2 * _N**3 / _best(target, product, 1)
    memory = max(_copy_rate(target.device.stream), total.cost.bytes / _best(target, total, 1))
    # With a small cache a copy is hardly longer than a launch, and shows the launch.
    cache = max(memory, cached.cost.bytes / _best(target, cached, _CACHED_STEPS) if quarter else 0.0)
    cupy.get_default_memory_pool().free_all_blocks()  # more than a GiB that nobody needs again
    return flops, memory, cache


def _best(target: CudaTarget, step: Step, times: int) -> float:
    """Seconds of a step on random operands, `times` in a row."""
    inputs = {f"operand{i}": tensor for i, tensor in enumerate(step.inputs)}
    buffers = tuple(tensor.buffer for tensor in (*step.inputs, *step.outputs))
    bound = ResidentExecutable(target, Plan({}, (step,) * times, inputs, {"result": step.outputs[0]}, buffers, 0, 0))
    rng = cupy.random.default_rng(0)
    stream = target.device.stream
    with stream:
        for array in bound.inputs.values():
            rows = max(1, _N * _N * len(array) // array.size)
            part = rng.standard_normal((min(rows, len(array)), *array.shape[1:]), dtype=cupy.float32)
            for start in range(0, len(array), rows):
                array[start : start + rows] = part[: len(array) - start]
    seconds = _least_seconds(stream, lambda: bound.launch(stream))
    bound.close()
    return seconds / times


def _copy_rate(stream: cupy.cuda.Stream) -> float:
    with stream:
        source = cupy.empty(_MEMORY_BYTES, cupy.uint8)
        copy = cupy.empty_like(source)
        return 2 * _MEMORY_BYTES / _least_seconds(stream, lambda: cupy.copyto(copy, source))


def _least_seconds(stream: cupy.cuda.Stream, work: Callable[[], object]) -> float:
    """Of some runs, without the first."""
    elapsed_seconds(stream, work)
    seconds: list[float] = []
    begin = time.monotonic()
    while len(seconds) < _LEAST_REPEATS or time.monotonic() < begin + _LEAST_SECONDS:
        seconds.append(elapsed_seconds(stream, work))
    return min(seconds)
