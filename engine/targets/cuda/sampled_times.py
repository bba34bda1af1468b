"""Which runs of a plan write stamps, and the seconds of its steps, which those stand for. Used by program.py.

A run that writes stamps takes some 10 µs longer on an H100, so what they cost depends on the time from one to the next
and not on how many runs lie between: `Sampling` counts runs, and sets their number by how fast they have come of late.
A clock alone would choose badly: of runs that come in bursts, it would take the first one of each, on a GPU gone cold.

The mean of the samples, each weighted with the runs that it stands for, stands for every run: so a change of pace does
not change what the samples before it count. A quick sample after slow ones makes that less than what was told before,
which whoever takes rates of it would read as a counter that begins again; so what was told stays until the mean has
caught up with it. It is never further above than the time of as many runs as there are from one sample to the next.
"""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

Nanoseconds = NDArray[np.float64]
MOST_RUNS = 256
"""From one sample to the next: after a burst of short runs, a model that is asked seldom shall not wait for ever."""


class Sampling:
    """The runs that write stamps: the second one, of which nothing is the first time, and then one in so many. Each
    stands for itself and those since the last. Whoever calls it holds the target's lock."""

    def __init__(self) -> None:
        self._next = 1
        self._last = -1
        self._last_at: float | None = None

    def stands_for(self, run: int, every: int) -> int:
        """How many runs the one of this number, from 0 on, stands for; 0 where it writes no stamps. `every`: so many
        runs lie between two at least; 0: none does."""
        return run - self._last if every > 0 and run >= self._next else 0

    def taken(self, run: int, every: int, seconds: float, now: float) -> None:
        """The run of this number, queued at `now` (in seconds), does. The next is as many runs later as have come in
        `seconds` since the last, but at least `every` and, unless that is more, at most `MOST_RUNS`."""
        between = every
        if self._last_at is not None and now > self._last_at:
            pace = (run - self._last) / (now - self._last_at)
            between = max(every, min(MOST_RUNS, ceil(seconds * pace)))
        self._last, self._last_at, self._next = run, now, run + between


class SampledTimes:
    """Nanoseconds of each of `steps` steps over all runs. Whoever calls it holds the target's lock."""

    def __init__(self, steps: int) -> None:
        self._sampled: Nanoseconds = np.zeros(steps, np.float64)
        self._runs = 0
        self._told: Nanoseconds = np.zeros(steps, np.float64)
        self.samples = 0
        """How many have been added."""

    def add(self, sample: Nanoseconds, runs: int) -> None:
        """The nanoseconds of each step in one run, which stands for so many."""
        self._sampled += sample * runs
        self._runs += runs
        self.samples += 1

    def total(self, runs: int) -> Nanoseconds:
        """All of `runs` runs; zero before the first sample, and never less than before."""
        if self._runs:
            self._told = np.maximum(self._told, self._sampled * (runs / self._runs))
        return self._told
