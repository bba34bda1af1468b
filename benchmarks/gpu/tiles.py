"""``python -m benchmarks tiles``: the ways in which a convolution could run, each timed on the GPU beside what its
model says. For whoever fits a cost model or decides whether a kernel is taken; no row is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.cases.conv import ConvCase
from benchmarks.gpu.steps import step_of
from engine.targets.cuda.conv_variants import Variant, variants
from engine.targets.cuda.launch_timing import SHORT_ROUNDS, timed_launches
from engine.targets.cuda.product_cost import CLOCK_MHZ
from engine.targets.cuda.target import CudaTarget


@dataclass(frozen=True)
class TimedVariant:
    """A variant with its time in µs, and what its model says of it, if it has one."""

    variant: Variant
    us: float
    predicted_us: float | None


def measure_all(
    target: CudaTarget, chosen: Sequence[ConvCase], most: int, deadline: float
) -> Iterator[tuple[ConvCase, list[TimedVariant]]]:
    """Every case with its variants, the fastest first, as long as `deadline` (of `time.monotonic`) is not past. The
    variants of a case take turns."""
    for case in chosen:
        if time.monotonic() >= deadline:
            return
        step = step_of(case)
        found = variants(step, target.context, most)
        target.device.load(launch.kernel for variant in found for launch in variant.launches)
        with target.lock, target.device.errors(), target.device.current():
            measured = timed_launches(target, step, [list(variant.launches) for variant in found], SHORT_ROUNDS)
        timed = [
            TimedVariant(variant, us, None if variant.cycles is None else variant.cycles / CLOCK_MHZ)
            for variant, us in zip(found, measured, strict=True)
        ]
        yield case, sorted(timed, key=lambda one: one.us)
