"""Counters of engine processes that outlive them: a scrape sees sums over all processes since the server started.

The process that starts engine processes gets a copy of every report (`child.py`), before whoever has asked for it, and
tells the next engine process, which adds to its own what was counted before it. So all that ask are told the same. What
a process did between the last report and its end is lost; nothing ever counts backwards.
"""

from collections.abc import Iterable
from dataclasses import replace

from service.workers.messages import KernelCounters, ModelKey, ModelStats, StatsReport


class LastingCounters:
    """Adds what earlier processes counted to what this one reports."""

    def __init__(self) -> None:
        self._before: dict[ModelKey, ModelStats] = {}

    def begin(self, models: Iterable[ModelStats]) -> None:
        """What the processes before had counted in the end."""
        self._before = {stats.key: stats for stats in models}

    def report(self, report: StatsReport) -> StatsReport:
        """The report with everything counted before it."""
        now = {stats.key: stats for stats in report.models}
        keys = dict.fromkeys((*self._before, *now))
        return StatsReport(report.id, tuple(_sum(self._before.get(key), now.get(key)) for key in keys))

    def forget(self, key: ModelKey) -> None:
        """A model was unloaded on purpose: its counters end."""
        self._before.pop(key, None)


def retired(models: Iterable[ModelStats]) -> tuple[ModelStats, ...]:
    """What stays of the counts of a process that is gone: its gauges are nothing now."""
    return tuple(replace(stats, memory=(), queued=0) for stats in models)


def _sum(before: ModelStats | None, now: ModelStats | None) -> ModelStats:
    if before is None or now is None:
        found = before if before is not None else now
        assert found is not None
        return found
    kernels: dict[tuple[str, str], KernelCounters] = {}
    for new in (*before.kernels, *now.kernels):
        old = kernels.get((new.kernel, new.op))
        kernels[new.kernel, new.op] = new if old is None else old.plus(new)
    return replace(now, kernels=tuple(kernels.values()), dropped=before.dropped + now.dropped)
