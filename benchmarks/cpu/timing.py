"""Calls on the CPU as contenders."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import numpy as np

from benchmarks.measure import worst
from engine.cli.check import relative_error

Outputs = Mapping[str, np.ndarray]


class CpuContender:
    """A function that runs once and returns its outputs. A round is a median over `seconds`, after a pause in which the
    other side's threads stop spinning."""

    def __init__(self, call: Callable[[], Outputs], expected: Outputs, seconds: float, pause: float) -> None:
        self._call = call
        self._expected = expected
        self._seconds = seconds
        self._pause = pause

    def error(self) -> float:
        """The largest relative L2 error of an output. Outputs are fresh arrays: there is nothing to poison."""
        found = self._call()
        return worst(relative_error(found[name], wanted) for name, wanted in self._expected.items())

    def round_us(self) -> float:
        """Microseconds per run: the median of at least five, after two to warm up."""
        time.sleep(self._pause)
        for _ in range(2):
            self._call()
        times: list[float] = []
        end = time.perf_counter() + self._seconds
        while len(times) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            self._call()
            times.append(time.perf_counter() - start)
        return median(times) * 1e6
