"""Where a server is saturated: the fewest users that get nearly all the throughput there is. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from load_tests.capacity.scrape import Split

ENOUGH = 0.95
"""Of the most throughput seen: who gets that is at the saturation point."""

GROWTH = 1.05
"""Two levels that do not raise the best throughput by so much end a ramp."""


LEAST_USERS = 32
"""No ramp ends with fewer: while users are fewer than the rows of a full batch, throughput may stay level and grow
again with the batches."""


@dataclass(frozen=True)
class Stage:
    """What so many users got in so many seconds. `latencies` are those of good answers, in seconds, sorted."""

    users: int
    seconds: float
    latencies: Sequence[float]
    refused: int
    failures: Mapping[str, int]
    generator_cpu: float
    split: Split
    timeline: Sequence[tuple[float, float]] = field(default=(), repr=False)
    """(when the answer came, latency) of good answers, in seconds since the stage began."""

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return len(self.latencies) / self.seconds

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    def percentile(self, percent: float) -> float:
        """A latency that so many of a hundred good answers do not exceed, in seconds; NaN without any."""
        return percentile(self.latencies, percent)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """By the nearest rank."""
    if not ordered:
        return float("nan")
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]


def is_saturated(stages: Sequence[Stage]) -> bool:
    """Whether the last two levels have brought nothing more, with users enough to tell."""
    rates = [stage.rate for stage in stages]
    return len(rates) > 2 and stages[-1].users >= LEAST_USERS and max(rates[-2:]) < GROWTH * max(rates[:-2])


def saturation_point(stages: Sequence[Stage]) -> Stage:
    """The stage with the fewest users among those with nearly the most throughput."""
    most = max(stage.rate for stage in stages)
    return min((stage for stage in stages if stage.rate >= ENOUGH * most), key=lambda stage: stage.users)


def sum_failures(stages: Sequence[Stage]) -> Counter[str]:
    """What went wrong in all stages, and how often."""
    total: Counter[str] = Counter()
    for stage in stages:
        total.update(stage.failures)
    return total
