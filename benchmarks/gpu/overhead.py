"""What the stamps of the kernel metrics cost: the throughput with them beside that without.

Both take turns, in fours whose order changes: without, with, with, without. So a clock that drifts, which a GPU's does
at its power limit, meets both alike. A four is one figure; of them, the middle and its interval come from their ranks,
which a few that something else disturbed do not move: Hodges and Lehmann's estimate, and the interval that belongs to
Wilcoxon's signed ranks. Fours are made until that interval is narrow enough, or time is up.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import ceil, exp, log, sqrt
from statistics import median

Side = Callable[[bool], float]
"""Makes some runs, with stamps or without, and gives the seconds of each."""
Switch = Callable[[bool], None]
"""Says whether the runs that follow are with stamps."""

LEAST_FOURS = 8
_QUANTILE = 1.96  # of the normal distribution, for 95 % on both sides
SIDE_SECONDS = 0.12
_WINDOW_RUNS = 32  # at least: when a run ends varies by a part of a run


@dataclass(frozen=True)
class Ratio:
    """Throughput with over throughput without, and its 95 % confidence interval."""

    centre: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Effort:
    """When it is enough: the interval is within ± `within`, or `seconds` are over; `warm_up` seconds before."""

    within: float
    seconds: float
    warm_up: float = 0.0


@dataclass(frozen=True)
class Overhead:
    """What came out, and µs a run without and with stamps."""

    ratio: Ratio
    us: float
    with_us: float


def measure(side: Side, effort: Effort) -> Overhead:
    """Fours of a side's two ways."""
    with _without_collections():
        side(True)  # what is captured first is captured now
        begin = time.perf_counter()
        while time.perf_counter() - begin < effort.warm_up:
            side(False)
        begin = time.perf_counter()
        seconds: dict[bool, list[float]] = {False: [], True: []}
        while True:
            first = len(seconds[True]) % 4 == 2
            for stamped in (first, not first, not first, first):
                seconds[stamped].append(side(stamped))
            fours = len(seconds[True]) // 2
            if fours < LEAST_FOURS:
                continue
            ratio = ratio_of(seconds[True], seconds[False])
            if ratio.half <= effort.within or time.perf_counter() - begin >= effort.seconds:
                return Overhead(ratio, median(seconds[False]) * 1e6, median(seconds[True]) * 1e6)


def ratio_of(stamped: Sequence[float], plain: Sequence[float]) -> Ratio:
    """Of the seconds of sides, of which two neighbours with and two without stamps make a four."""
    logs = [log(plain[i] * plain[i + 1] / (stamped[i] * stamped[i + 1])) / 2 for i in range(0, len(stamped) - 1, 2)]
    n = len(logs)
    if n < LEAST_FOURS or len(plain) != len(stamped):
        raise ValueError(f"the interval is for {LEAST_FOURS} fours at least, not {n}")
    averages = sorted((one + other) / 2 for one, other in combinations_with_replacement(logs, 2))
    outside = int(n * (n + 1) / 4 - _QUANTILE * sqrt(n * (n + 1) * (2 * n + 1) / 24) - 0.5)
    return Ratio(exp(median(averages)), exp(averages[outside]), exp(averages[-1 - outside]))


@contextmanager
def _without_collections() -> Iterator[None]:
    """No pauses of Python's garbage collector."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def batches(run: Callable[[int], object], switch: Switch, every: int, least_seconds: float = SIDE_SECONDS) -> Side:
    """Sides of a fixed number of runs, a multiple of `every`, that take `least_seconds`. `run` makes so many and waits
    for them."""

    def seconds(stamped: bool, runs: int) -> float:
        switch(stamped)
        begin = time.perf_counter()
        run(runs)
        return time.perf_counter() - begin

    seconds(True, 2 * every)
    runs = every * max(1, ceil(least_seconds / max(seconds(False, every), 1e-9)))
    return lambda stamped: seconds(stamped, runs) / runs


@contextmanager
def steady(run: Callable[[], object], threads: int, switch: Switch) -> Iterator[Side]:
    """Sides of threads that run without a pause from the first to the last of them: a side is what ends within a while.
    So no side has a beginning, in which the threads wake up and the GPU waits, nor an end. What was under way when the
    side began does not count."""
    ended: list[float] = []
    problems: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                run()
                ended.append(time.perf_counter())
        except BaseException as problem:
            problems.append(problem)

    def side(stamped: bool) -> float:
        switch(stamped)
        first, least = len(ended) + threads, _WINDOW_RUNS + threads
        time.sleep(SIDE_SECONDS)
        while len(ended) < first + least and not problems:
            time.sleep(1e-3)
        if problems:
            raise problems[0]
        within = sorted(ended[first:])
        return (within[-1] - within[0]) / (len(within) - 1)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield side
    finally:
        stop.set()
        for worker in workers:
            worker.join()
