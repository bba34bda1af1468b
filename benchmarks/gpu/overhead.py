"""What the stamps of the kernel metrics cost: the throughput with them beside that without, in pairs whose order
changes, so that a drift of the clock meets both alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, exp, log, sqrt
from statistics import mean, median, stdev

PAIRS = 12
_QUANTILE = 2.201  # of Student's t, for 95 % on both sides with 11 degrees of freedom
_SECONDS = 0.1  # of each side of a pair, at least


@dataclass(frozen=True)
class Ratio:
    """Throughput with over throughput without: the geometric mean of the pairs, and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Overhead:
    """What came out, and µs a run without stamps."""

    ratio: Ratio
    us: float


def measure(run: Callable[[int], None], stamp: Callable[[bool], None], every: int) -> Overhead:
    """`run` makes so many runs and waits for them; `stamp` says whether one in `every` of those that follow writes
    stamps."""

    def seconds(stamped: bool, runs: int) -> float:
        stamp(stamped)
        begin = time.perf_counter()
        run(runs)
        return time.perf_counter() - begin

    try:
        seconds(True, 2 * every)  # what is captured first is captured now
        runs = every * max(1, ceil(_SECONDS / max(seconds(False, every), 1e-9)))
        pairs: list[tuple[float, float]] = []
        for number in range(PAIRS):
            found = {stamped: seconds(stamped, runs) for stamped in ((True, False) if number % 2 else (False, True))}
            pairs.append((found[True], found[False]))
    finally:
        stamp(True)
    return Overhead(ratio_of(pairs), median(without for _, without in pairs) / runs * 1e6)


def ratio_of(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """Of seconds with and without stamps, for `PAIRS` pairs."""
    if len(pairs) != PAIRS:
        raise ValueError(f"the interval is for {PAIRS} pairs, not {len(pairs)}")
    logs = [log(without / stamped) for stamped, without in pairs]
    middle, half = mean(logs), _QUANTILE * stdev(logs) / sqrt(len(logs))
    return Ratio(exp(middle), exp(middle - half), exp(middle + half))
