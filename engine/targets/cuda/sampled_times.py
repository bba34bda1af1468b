"""Seconds of a plan's steps of which only one run in some writes stamps. Used by program.py.

The mean of the samples stands for every run. A quick sample after slow ones makes that less than what was told before,
which whoever takes rates of it would read as a counter that begins again; so what was told stays until the mean has
caught up with it. It is never further above than the time of as many runs as there are from one sample to the next.
"""

import numpy as np
from numpy.typing import NDArray

Nanoseconds = NDArray[np.float64]


class SampledTimes:
    """Nanoseconds of each of `steps` steps over all runs. Whoever calls it holds the target's lock."""

    def __init__(self, steps: int) -> None:
        self._sampled: Nanoseconds = np.zeros(steps, np.float64)
        self._samples = 0
        self._told: Nanoseconds = np.zeros(steps, np.float64)

    def add(self, sample: Nanoseconds) -> None:
        """The nanoseconds of each step in one run."""
        self._sampled += sample
        self._samples += 1

    def total(self, runs: int) -> Nanoseconds:
        """All of `runs` runs; zero before the first sample, and never less than before."""
        if self._samples:
            self._told = np.maximum(self._told, self._sampled * (runs / self._samples))
        return self._told
