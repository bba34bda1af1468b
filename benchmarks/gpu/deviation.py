"""Our stamps beside ncu's durations, of the same launches.

A stamp goes from the start of a kernel's first block to the end of its last. ncu's duration (`gpu__time_duration`) is
that of the launch: it begins before the first block does, and ends when the GPU has drained. What lies between, the
`Offset`, is the same kind of thing for every kernel, and is measured on kernels that do nothing but write their stamp.
So what is judged is (stamp + offset) / duration - 1; the deviation without the offset stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.cases.metrics import BANDS
from benchmarks.gpu.ncu import NcuError, Timed, matched
from benchmarks.gpu.windows import Launched, Window

Pair = tuple[Launched, Sequence[float]]
"""A step as it was launched, and ncu's µs of its kernels."""


@dataclass(frozen=True)
class Offset:
    """µs by which ncu's duration exceeds the stamp of a kernel that does nothing else: the median of all such launches,
    and the medians of each of their shapes, by label."""

    us: float
    of_shapes: dict[str, float]


@dataclass(frozen=True)
class Deviation:
    """A step of one kernel: medians over its launches. `judged` and `raw`: how far the stamp with the offset, and
    without, is from ncu's duration, relative."""

    name: str
    stamp_us: float
    ncu_us: float
    judged: float
    raw: float


@dataclass(frozen=True)
class Band:
    """The kernels of some range of durations. `worst`: the one whose judged deviation is the largest; `beyond`: how
    many are beyond the bound."""

    name: str
    kernels: int
    median: float
    raw_median: float
    worst: Deviation
    beyond: int
    bound: float


def paired(windows: Sequence[Window], timed: Sequence[Timed]) -> dict[str, list[list[Pair]]]:
    """The windows of every case (and of `windows.EMPTY`), each step with ncu's times of its kernels. `timed`: what ncu
    saw in all of them, one after the other. Raises NcuError where that is something else."""
    steps = [step for window in windows for step in window.steps]
    times = iter(matched([step.shapes for step in steps], timed))
    found: dict[str, list[list[Pair]]] = {}
    for window in windows:
        found.setdefault(window.case, []).append([(step, next(times)) for step in window.steps])
    return found


def offset(windows: Sequence[Sequence[Pair]]) -> Offset:
    """Of windows of kernels that only write their stamp. Raises NcuError where there is none."""
    by_shape: dict[str, list[float]] = {}
    for window in windows:
        for step, (us,) in window:
            by_shape.setdefault(step.name, []).append(us - step.stamp_us)
    if not by_shape:
        raise NcuError("no kernel that only writes its stamp was profiled")
    every = [us for some in by_shape.values() for us in some]
    return Offset(median(every), {name: median(some) for name, some in by_shape.items()})


def deviations(windows: Sequence[Sequence[Pair]], offset_us: float) -> Iterator[Deviation]:
    """Of every step of one kernel, over the windows of a case. What a step of several takes also holds what lies
    between them."""
    for launches in zip(*windows, strict=True):
        step = launches[0][0]
        if len(step.shapes) != 1:
            continue
        pairs = [(one.stamp_us, us) for one, (us,) in launches]
        yield Deviation(
            step.name,
            median(stamp for stamp, _ in pairs),
            median(us for _, us in pairs),
            median((stamp + offset_us) / us - 1 for stamp, us in pairs),
            median(stamp / us - 1 for stamp, us in pairs),
        )


def bands(found: Sequence[Deviation]) -> Iterator[Band]:
    """The kernels by ncu's duration."""
    for name, (least, most, bound) in BANDS.items():
        within = [one for one in found if least <= one.ncu_us < most]
        if within:
            yield Band(
                name,
                len(within),
                median(one.judged for one in within),
                median(one.raw for one in within),
                max(within, key=lambda one: abs(one.judged)),
                sum(abs(one.judged) > bound for one in within),
                bound,
            )


def sums_us(windows: Sequence[Sequence[Pair]]) -> tuple[float, float]:
    """The stamps and ncu's durations of all steps, each the median of its launches, added up."""
    by_step = list(zip(*windows, strict=True))
    stamps = sum(median(step.stamp_us for step, _ in launches) for launches in by_step)
    return stamps, sum(median(sum(times) for _, times in launches) for launches in by_step)


def windows_of(found: dict[str, list[list[Pair]]], case: str) -> list[list[Pair]]:
    """Those of a case, or of `windows.EMPTY`. Raises NcuError where there is none."""
    if case not in found:
        raise NcuError(f"nothing of {case or 'the kernels that only write their stamp'} was profiled")
    return found[case]
