"""Counters of an engine process that outlive it: a scrape sees sums over all processes since the server started.

What a process did between the last report and its end is lost; nothing ever counts backwards.
"""

from dataclasses import replace

from service.workers.messages import KernelCounters, ModelKey, ModelStats, StatsReport


class LastingCounters:
    """Adds what earlier processes counted to what the present one reports."""

    def __init__(self) -> None:
        self._before: dict[ModelKey, ModelStats] = {}
        self._now: dict[ModelKey, ModelStats] = {}

    def report(self, report: StatsReport) -> StatsReport:
        """The report with everything counted before it."""
        self._now = {stats.key: stats for stats in report.models}
        return StatsReport(report.id, tuple(self._totals().values()))

    def retire(self) -> None:
        """The present process is gone: its gauges are nothing now, its counters stay."""
        self._before = {key: replace(stats, memory=(), queued=0) for key, stats in self._totals().items()}
        self._now = {}

    def forget(self, key: ModelKey) -> None:
        """A model was unloaded on purpose: its counters end."""
        self._before.pop(key, None)
        self._now.pop(key, None)

    def _totals(self) -> dict[ModelKey, ModelStats]:
        keys = dict.fromkeys((*self._before, *self._now))
        return {key: _sum(self._before.get(key), self._now.get(key)) for key in keys}


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
