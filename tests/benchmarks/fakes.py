"""Contenders without a device, and recipes for another process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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


@dataclass(frozen=True)
class BenchRecipe:
    """Cases that a process of its own measures: ``name`` says what becomes of each. Which cases were measured when is
    written to `log`, a line each."""

    names: Sequence[str]
    log: Path
    build_seconds: float = 0.0
    dies: bool = False
    impossible: bool = False
    is_plain: bool = False

    def build(self) -> FakeBench:
        if self.impossible:
            raise ImportError("No module named 'timm'")
        if not self.is_plain:
            time.sleep(self.build_seconds)
            if self.dies:
                os._exit(3)
        _write(self.log, f"ready {self.names[0]}")
        return FakeBench(self)

    def plain(self) -> BenchRecipe:
        return replace(self, is_plain=True)


@dataclass(frozen=True)
class FakeBench:
    recipe: BenchRecipe

    def measure(self, name: str) -> str:
        if name.startswith("dies"):
            os._exit(3)
        if name.startswith("fails"):
            raise ValueError("an illegal\nmemory access")
        _write(self.recipe.log, f"begin {name}")
        time.sleep(0.05)
        _write(self.recipe.log, f"end {name}")
        return f"{os.environ['SHARED']} {name}{' plain' if self.recipe.is_plain else ''}"


def _write(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(f"{line}\n")
