"""Stand-ins of `benchmarks.gpu.timing` for a machine without a GPU. They need PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.gpu import timing


class Call(timing.CallContender):
    """A call without events of a GPU."""

    def error(self) -> float:
        return self._check(0, self._call())

    def round_us(self) -> float:
        begin = time.perf_counter()
        self._queue()
        return (time.perf_counter() - begin) * 1e6


class Graph(Call):
    """A call in the place of a graph."""

    def __init__(self, work: Callable[[int], torch.Tensor], runs: int, check: timing.Check) -> None:
        super().__init__(lambda: work(0), check)
