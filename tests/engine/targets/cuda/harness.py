"""Runs single steps on the GPU and compares them with the NumPy interpreter of the IR, in float64.

Operands are random, every byte the step could write is poisoned before it runs, and bytes beyond its results must stay
so.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import sqrt

import cupy
import numpy as np

from engine.ir.dtype import DType
from engine.ir.graph import Node, Value
from engine.plan.plan import Plan, Step
from engine.plan.tensor import BufferKind, Tensor
from engine.targets.cuda.compiler import CompileError
from engine.targets.cuda.families import family_of
from engine.targets.cuda.kernel import Kernel, Launch, Pointer, content, is_constant
from engine.targets.cuda.target import CudaTarget, Executable
from tests.engine import ir_interpreter

POISON = 0xFF  # every float type reads NaN, integers −1


@dataclass
class Case:
    """A step to check. `length` is the number of terms in its sums; `lowered` its launches where the test chose
    them."""

    label: str
    step: Step
    length: int
    feeds: dict[int, np.ndarray] = field(default_factory=dict)  # operands by position; the others are random
    lowered: list[Launch] | None = None


def run_cases(target: CudaTarget, cases: Sequence[Case], seed: int = 0) -> list[str]:
    """Check every case; returns a line for each that fails."""
    lowered = [case.lowered or family_of(case.step.op).lower(case.step, target.context) for case in cases]
    kernels = list(dict.fromkeys(launch.kernel for launches in lowered for launch in launches))
    with ThreadPoolExecutor(target.device.compiler.workers) as pool:
        problems = dict(zip(kernels, pool.map(lambda kernel: _compile(target, kernel), kernels), strict=True))
    failures = [problem for problem in problems.values() if problem]
    for i, (case, launches) in enumerate(zip(cases, lowered, strict=True)):
        if any(problems[launch.kernel] for launch in launches):
            continue
        problem = check(target, case, launches, np.random.default_rng((seed, i)))
        if problem:
            failures.append(f"{case.label}: {problem}; kernels {[launch.kernel.source.name for launch in launches]}")
    return failures


def _compile(target: CudaTarget, kernel: Kernel) -> str | None:
    """Bring a kernel into the compiler's cache, in parallel; what is wrong with it, if anything."""
    try:
        target.device.compiler.cubin(kernel.source)
    except CompileError as error:
        return str(error)
    return None


def check(target: CudaTarget, case: Case, launches: list[Launch], rng: np.random.Generator) -> str | None:
    step = case.step
    arrays = [content(t) if is_constant(t) else case.feeds.get(i, random(rng, t)) for i, t in enumerate(step.inputs)]
    values = tuple(Value(f"i{i}", t.dtype, t.shape) for i, t in enumerate(step.inputs))
    results = tuple(Value(f"o{i}", t.dtype, t.shape) for i, t in enumerate(step.outputs))
    expected = ir_interpreter.run_node(Node(step.op, values, results), arrays, {})
    outputs = run_step(target, step, launches, arrays)
    for got, want in zip(outputs, expected, strict=True):
        problem = mismatch(got, want, case.length)
        if problem:
            return problem
    return None


def run_step(target: CudaTarget, step: Step, launches: list[Launch], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The results of one step on the GPU."""
    executable = bind_step(target, step, launches)
    with target.device.current(), target.device.stream:
        executable.prepare()
        slot = target.slots.all[0]
        whole = _bytes(target, slot.device, slot.device_bytes)
        whole[...] = POISON
        for tensor, array in zip(step.inputs, arrays, strict=True):
            if tensor.buffer.kind is BufferKind.INPUT:
                view(target, executable, tensor)[...] = cupy.asarray(_as_stored(array))
        executable.launch()
        target.device.stream.synchronize()
        results = [view(target, executable, tensor).get() for tensor in step.outputs]
        for tensor in step.outputs:
            used = executable.address(Pointer(tensor.buffer)) + tensor.buffer.nbytes
            if -used % 256:
                beyond = _bytes(target, used, -used % 256)
                assert bool((beyond == POISON).all()), f"{step.name}: wrote beyond its result"
    executable.close()
    return [result.view(tensor.dtype.numpy) for result, tensor in zip(results, step.outputs, strict=True)]


def bind_step(target: CudaTarget, step: Step, launches: list[Launch]) -> Executable:
    """An executable of one step whose operands and results are a plan's."""
    fed = {tensor.buffer: tensor for tensor in step.inputs if tensor.buffer.kind is BufferKind.INPUT}
    inputs = {f"operand{i}": _whole(tensor) for i, tensor in enumerate(fed.values())}
    outputs = {f"result{i}": _whole(tensor) for i, tensor in enumerate(step.outputs)}
    buffers = tuple(tensor.buffer for tensor in (*step.inputs, *step.outputs))
    with target.device.errors(), target.device.current():
        return Executable(target, Plan({}, (step,), inputs, outputs, buffers, 0, 0), [launches])


def _whole(tensor: Tensor) -> Tensor:
    """The buffer of a tensor as bytes."""
    return Tensor(tensor.buffer, DType.U8, (tensor.buffer.nbytes,), (1,))


def view(target: CudaTarget, executable: Executable, tensor: Tensor) -> cupy.ndarray:
    """A tensor in device memory, as an array (bfloat16 as bits)."""
    start = executable.address(Pointer(tensor.buffer, tensor.offset * tensor.dtype.itemsize))
    memory = cupy.cuda.UnownedMemory(start, max(1, tensor.buffer.nbytes), target, target.device.index)
    dtype = np.dtype(np.uint16) if tensor.dtype is DType.BF16 else tensor.dtype.numpy
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    return cupy.ndarray(tensor.shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


def _bytes(target: CudaTarget, start: int, count: int) -> cupy.ndarray:
    memory = cupy.cuda.UnownedMemory(start, max(1, count), target, target.device.index)
    return cupy.ndarray((count,), np.uint8, cupy.cuda.MemoryPointer(memory, 0))


def _as_stored(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == DType.BF16.numpy else array


def random(rng: np.random.Generator, tensor: Tensor) -> np.ndarray:
    """Random content; integers are small, as indices and masks are."""
    if tensor.dtype is DType.BOOL:
        return rng.integers(0, 2, tensor.shape).astype(np.bool_)
    if not tensor.dtype.is_float:
        return rng.integers(0, 2, tensor.shape).astype(tensor.dtype.numpy)
    return rng.standard_normal(tensor.shape).astype(tensor.dtype.numpy)


_EPSILON = {DType.F16: 2.0**-11, DType.BF16: 2.0**-8, DType.F32: 2.0**-22, DType.F64: 2.0**-22}
_OPERAND_EPSILON = 2.0**-11
"""Values between the stages of a kernel (probabilities) are rounded to fp16."""


def mismatch(got: np.ndarray, want: np.ndarray, length: int) -> str | None:
    """What differs beyond rounding. An element may be off by two roundings of its own size, plus a share of the typical
    size of the largest row: the fp32 sum of `length` terms, and one rounding of operands to fp16."""
    dtype = DType.of(want.dtype)
    if not dtype.is_float:
        return None if np.array_equal(got, want) else f"{np.count_nonzero(got != want)} of {want.size} integers differ"
    a, b = got.astype(np.float64), want.astype(np.float64)
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return f"NaN in {np.count_nonzero(np.isnan(a))} places, {np.count_nonzero(np.isnan(b))} expected"
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return "infinities differ"
    rows = np.where(finite, b, 0.0).reshape(-1, b.shape[-1] if b.ndim else 1)
    size = sqrt(float(np.max(np.mean(rows**2, axis=1))))
    bound = 2 * _EPSILON[dtype] * np.where(finite, np.abs(b), 0.0) + size * (
        2 * _OPERAND_EPSILON + 2.0**-22 * sqrt(length)
    )
    with np.errstate(invalid="ignore"):
        off = np.where(finite, np.abs(a - b), 0.0)
    worst = int(np.argmax(off - bound))
    if off.flat[worst] <= bound.flat[worst]:
        return None
    count = int(np.count_nonzero(off > bound))
    place = [int(i) for i in np.unravel_index(worst, b.shape)]
    return f"{count} of {b.size} off, worst {a.flat[worst]:.6g} for {b.flat[worst]:.6g} at {place} of {list(b.shape)}"
