"""Contenders without a device, and recipes for another process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.measure import Contender


class Fake:
    """A contender with a given error and given times, round after round."""

    def __init__(self, error: float = 1e-4, times: Sequence[float] = (10.0,)) -> None:
        self._error = error
        self._times = times
        self.rounds = 0

    def error(self) -> float:
        return self._error

    def round_us(self) -> float:
        self.rounds += 1
        return self._times[(self.rounds - 1) % len(self._times)]


class Stuck(Fake):
    """Loses its device in the second round."""

    def round_us(self) -> float:
        if self.rounds == 1:
            raise RuntimeError("an illegal memory access")
        return super().round_us()


@dataclass(frozen=True)
class Recipe:
    """Three contenders: one that works, one that fails to compile, one that fails when it is asked."""

    def build(self) -> Mapping[str, Callable[[], Contender]]:
        def broken() -> Contender:
            raise RuntimeError("does not\ncompile")

        return {"works": lambda: Fake(2e-3, (7.0,)), "broken": broken, "stuck": Stuck}


@dataclass(frozen=True)
class Slow:
    """The first contender takes its time, so that none is left for the second."""

    seconds: float

    def build(self) -> Mapping[str, Callable[[], Contender]]:
        def slow() -> Contender:
            time.sleep(self.seconds)
            return Fake()

        return {"slow": slow, "next": Fake}


@dataclass(frozen=True)
class Dying:
    """Ends its process."""

    def build(self) -> Mapping[str, Callable[[], Contender]]:
        os._exit(3)


@dataclass(frozen=True)
class Impossible:
    """Cannot even begin."""

    def build(self) -> Mapping[str, Callable[[], Contender]]:
        raise ImportError("No module named 'timm'")
