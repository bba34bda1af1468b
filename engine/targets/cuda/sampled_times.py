"""Seconds of a plan's steps of which only one run in some writes stamps. Used by program.py.

The newest sample stands for every run until the next one. So what has been charged never becomes less: scaling the mean
of all samples to all runs would, when a quick sample follows slow ones, and whoever takes rates of it would see a
counter that begins again.
"""

import numpy as np
from numpy.typing import NDArray

Nanoseconds = NDArray[np.float64]


class SampledTimes:
    """Nanoseconds of each of `steps` steps over all runs. Whoever calls it holds the target's lock."""

    def __init__(self, steps: int) -> None:
        self._charged: Nanoseconds = np.zeros(steps, np.float64)
        self._charged_runs = 0
        self._newest: Nanoseconds | None = None

    def add(self, runs: int, sample: Nanoseconds) -> None:
        """A sample has arrived when `runs` runs have been queued. The first stands for the runs before it, too."""
        self._charged = self._charged + (sample if self._newest is None else self._newest) * (runs - self._charged_runs)
        self._charged_runs, self._newest = runs, sample

    def total(self, runs: int) -> Nanoseconds:
        """All of `runs` runs, the number queued by now; zero before the first sample."""
        if self._newest is None:
            return self._charged
        return self._charged + self._newest * (runs - self._charged_runs)
