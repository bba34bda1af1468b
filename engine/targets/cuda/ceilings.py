"""What a GPU reaches with nothing in the way: the ceilings of the roofline, measured on the device as it runs now."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import cupy

from engine.ir.dtype import DType
from engine.ir.ops import Gemm
from engine.plan.plan import Plan
from engine.targets.cuda.resident import ResidentExecutable

if TYPE_CHECKING:
    from engine.targets.cuda.target import CudaTarget

_N = 4096
_COPY_BYTES = 512 << 20
_REPEATS = 5


def measure_ceilings(target: CudaTarget) -> tuple[float, float]:
    """(FLOP/s, bytes/s): the best of a few tries of our fp16 product of 4096³ and of a copy of 512 MiB."""
    result = _flops(target), _bytes(target.device.stream)
    cupy.get_default_memory_pool().free_all_blocks()  # more than a GiB that nobody needs again
    return result


def _flops(target: CudaTarget) -> float:
    from engine.targets.cuda.covering import ACC, make_step, stored  # which imports the families

    step = make_step(Gemm((stored(ACC),)), [(DType.F16, (_N, _N)), (DType.F16, (_N, _N))])
    inputs = {f"operand{i}": tensor for i, tensor in enumerate(step.inputs)}
    buffers = tuple(tensor.buffer for tensor in (*step.inputs, *step.outputs))
    bound = ResidentExecutable(target, Plan({}, (step,), inputs, {"product": step.outputs[0]}, buffers, 0, 0))
    rng = cupy.random.default_rng(0)
    stream = target.device.stream
    with stream:
        for array in bound.inputs.values():
            array[...] = rng.standard_normal(array.shape, dtype=cupy.float32)
    seconds = [_seconds(stream, lambda: bound.launch(stream)) for _ in range(_REPEATS)]
    bound.close()
    return 2 * _N**3 / min(seconds[1:])


def _bytes(stream: cupy.cuda.Stream) -> float:
    with stream:
        source = cupy.empty(_COPY_BYTES, cupy.uint8)
        copy = cupy.empty_like(source)
        seconds = [_seconds(stream, lambda: cupy.copyto(copy, source)) for _ in range(_REPEATS)]
    return 2 * _COPY_BYTES / min(seconds[1:])


def _seconds(stream: cupy.cuda.Stream, work: Callable[[], object]) -> float:
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(begin, end)) * 1e-3
