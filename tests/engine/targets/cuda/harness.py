"""Runs the kernels of single steps and compares them with the NumPy interpreter of the IR, in float64.

Operands are random, every byte the step could write is poisoned before it runs, and bytes beyond its results must stay
so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import inf, sqrt
from typing import Protocol

import numpy as np

from engine.ir.dtype import DType
from engine.ir.graph import Node, Value
from engine.plan.plan import Step
from engine.plan.tensor import Tensor
from engine.targets.cuda.families import family_of
from engine.targets.cuda.kernel import Context, Kernel, Launch, content, is_constant
from tests.engine import ir_interpreter
from tests.engine.targets.cuda.tally import Tally

POISON = 0xFF  # every float type reads NaN, integers −1


@dataclass
class Case:
    """A step to check. `length` is the number of terms in its sums, `rounding` the relative error with which the kernel
    takes the operands of its products; `lowered` its launches where the test chose them. `computed`: the type that
    everything is computed in, where the kernel rounds nothing to 16 bits in between."""

    label: str
    step: Step
    length: int
    feeds: dict[int, np.ndarray] = field(default_factory=dict)  # operands by position; the others are random
    lowered: list[Launch] | None = None
    rounding: float = 2.0**-11  # values between the stages of a kernel (probabilities) become fp16
    computed: DType | None = None


class Runner(Protocol):
    """What runs the launches of one step: a GPU (gpu_runner.py) or the emulator (emulator/runner.py). `tally` counts
    the cases of the test under way."""

    tally: Tally

    @property
    def context(self) -> Context: ...

    def prepare(self, kernel: Kernel) -> str | None:
        """Compile a kernel. What is wrong with it, if anything."""
        ...

    def run(self, step: Step, launches: Sequence[Launch], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The results of a step on `arrays`. Raises RunError where a launch fails, or writes beyond its results."""
        ...


class RunError(Exception):
    """A launch failed, or did what it must not."""


def run_cases(runner: Runner, cases: Sequence[Case], seed: int = 0) -> list[str]:
    """Check every case; returns a line for each that fails."""
    lowered = [case.lowered or family_of(case.step.op).lower(case.step, runner.context) for case in cases]
    kernels = list(dict.fromkeys(launch.kernel for launches in lowered for launch in launches))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = dict(zip(kernels, pool.map(runner.prepare, kernels), strict=True))
    failures = [problem for problem in problems.values() if problem]
    for i, (case, launches) in enumerate(zip(cases, lowered, strict=True)):
        if any(problems[launch.kernel] for launch in launches):
            runner.tally.count(case.step, inf, failed=True)
            continue
        ratio, problem = check(runner, case, launches, np.random.default_rng((seed, i)))
        runner.tally.count(case.step, ratio, failed=problem is not None)
        if problem:
            failures.append(f"{case.label}: {problem}; kernels {[launch.kernel.source.name for launch in launches]}")
    return failures


def check(runner: Runner, case: Case, launches: list[Launch], rng: np.random.Generator) -> Comparison:
    """The results of a case beside the interpreter's."""
    step = case.step
    arrays = [content(t) if is_constant(t) else case.feeds.get(i, random(rng, t)) for i, t in enumerate(step.inputs)]
    values = tuple(Value(f"i{i}", t.dtype, t.shape) for i, t in enumerate(step.inputs))
    results = tuple(Value(f"o{i}", t.dtype, t.shape) for i, t in enumerate(step.outputs))
    expected = ir_interpreter.run_node(Node(step.op, values, results), arrays, {})
    try:
        outputs = runner.run(step, launches, arrays)
    except RunError as error:
        return inf, str(error)
    # GELU in halves rounds what it is applied to, and is off by up to 2^-11 (kernels/epilogue/gelu.cuh).
    in_halves = any("gelu_of_two<" in launch.kernel.source.text for launch in launches)
    compared = [
        compare(got, want, case.length, max(case.rounding, 2.0**-11 if in_halves else 0.0), case.computed)
        for got, want in zip(outputs, expected, strict=True)
    ]
    return max(compared, key=lambda comparison: comparison[0])


def random(rng: np.random.Generator, tensor: Tensor) -> np.ndarray:
    """Random content; integers are small, as indices and masks are."""
    if tensor.dtype is DType.BOOL:
        return rng.integers(0, 2, tensor.shape).astype(np.bool_)
    if not tensor.dtype.is_float:
        return rng.integers(0, 2, tensor.shape).astype(tensor.dtype.numpy)
    return rng.standard_normal(tensor.shape).astype(tensor.dtype.numpy)


_EPSILON = {
    DType.F16: 2.0**-11, DType.BF16: 2.0**-8, DType.F8E4M3: 2.0**-4, DType.F32: 2.0**-22, DType.F64: 2.0**-22,
}  # fmt: skip
_SMALLEST = {DType.F16: 2.0**-24, DType.F8E4M3: 2.0**-9}
"""The step between the smallest numbers, which rounding to them may take."""
_COMPUTED = {DType.F32: 2.0**-22, DType.F64: 2.0**-50}
"""Four roundings of the type: the elementary functions are good to two."""


Comparison = tuple[float, str | None]
"""The largest error over its bound, and what is wrong, if anything."""


def compare(
    got: np.ndarray, want: np.ndarray, length: int, rounding: float = 2.0**-11, computed: DType | None = None
) -> Comparison:
    """What differs beyond rounding. An element may be off by two roundings, of its own size and of the typical size of
    the largest row: those of its dtype and the `rounding` of two operands, plus the sum of `length` terms in fp32, or
    in the type in which everything is `computed`, and then nothing else is rounded."""
    dtype = DType.of(want.dtype)
    if not dtype.is_float or not want.size:
        same = np.array_equal(got, want)
        return (0.0, None) if same else (inf, f"{np.count_nonzero(got != want)} of {want.size} integers differ")
    a, b = got.astype(np.float64), want.astype(np.float64)
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return inf, f"NaN in {np.count_nonzero(np.isnan(a))} places, {np.count_nonzero(np.isnan(b))} expected"
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return inf, "infinities differ"
    rows = np.where(finite, b, 0.0).reshape(-1, b.shape[-1] if b.ndim else 1)
    size = sqrt(float(np.max(np.mean(rows**2, axis=1))))
    accumulated = _COMPUTED[computed or DType.F32]
    rounding = accumulated if computed else rounding
    epsilon = max(accumulated, np.finfo(np.float64).eps) if dtype is DType.F64 else _EPSILON[dtype]
    bound = 2 * max(epsilon, rounding) * np.where(finite, np.abs(b), 0.0) + size * (
        2 * rounding + accumulated * sqrt(length)
    )
    bound += _SMALLEST.get(dtype, 0.0)
    with np.errstate(invalid="ignore"):
        off = np.where(finite, np.abs(a - b), 0.0)
        ratio = np.where(off > 0, off / bound, 0.0)
    worst = int(np.argmax(ratio))
    if off.flat[worst] <= bound.flat[worst]:
        return float(ratio.flat[worst]), None
    count = int(np.count_nonzero(off > bound))
    place = [int(i) for i in np.unravel_index(worst, b.shape)]
    what = f"{count} of {b.size} off, worst {a.flat[worst]:.6g} for {b.flat[worst]:.6g} at {place} of {list(b.shape)}"
    return float(ratio.flat[worst]), what
