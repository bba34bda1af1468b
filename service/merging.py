"""What several front ends counted, as one: metrics and the protocol's statistics add up. Pure functions over snapshots,
which are plain data that crosses between processes.

Called by the metrics and statistics routes through `Siblings`, and by the supervisor, which keeps what front ends
counted that are gone: no counter ever goes back.
"""

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar, Sample

Snapshot = dict[str, Any]
"""`metrics`: families as [name, help, type, [[sample, labels, value, exemplar], …]], an exemplar being [labels, value,
timestamp] or None; `statistics`: by "model/version" the entries
of `model_stats`."""

_SampleKey = tuple[str, tuple[tuple[str, str], ...]]
_Exemplar = list[Any] | None

# Each process counts the same restarts; a start and a limit are no amounts.
_MOST = frozenset({"engine_process_restarts", "process_start_time_seconds", "process_max_fds", "python_info"})
_MOST_FIELDS = ("last_inference", "batch_size")
_COUNTERS = frozenset({"counter", "histogram"})


def take(registry: CollectorRegistry, but: Collector, statistics: Mapping[str, dict[str, Any]]) -> Snapshot:
    """What one process counted, without what `but` collects."""
    theirs = {family.name for family in but.collect()}
    families = [
        [
            family.name,
            family.documentation,
            family.type,
            [[s.name, s.labels, s.value, _plain(s)] for s in family.samples],
        ]
        for family in registry.collect()
        if family.name not in theirs
    ]
    return {"metrics": families, "statistics": dict(statistics)}


def merge(snapshots: Sequence[Snapshot]) -> Snapshot:
    """The sum."""
    families: dict[str, tuple[str, str, dict[_SampleKey, tuple[float, _Exemplar]]]] = {}
    for snapshot in snapshots:
        for name, documentation, kind, samples in snapshot["metrics"]:
            _, _, values = families.setdefault(name, (documentation, kind, {}))
            for sample, labels, value, exemplar in samples:
                key = (sample, tuple(labels.items()))
                if key in values:
                    before, older = values[key]
                    value = max(before, value) if name in _MOST else before + value
                    exemplar = max(filter(None, (older, exemplar)), key=itemgetter(2), default=None)
                values[key] = (value, exemplar)
    metrics = [
        [name, documentation, kind, [[sample, dict(labels), *values[sample, labels]] for sample, labels in values]]
        for name, (documentation, kind, values) in families.items()
    ]
    statistics: dict[str, dict[str, Any]] = {}
    for snapshot in snapshots:
        for model, entry in snapshot["statistics"].items():
            statistics[model] = _sum(statistics[model], entry) if model in statistics else entry
    return {"metrics": metrics, "statistics": statistics}


def lasting(snapshot: Snapshot) -> Snapshot:
    """What stays of a process that is gone: its counters, not what it held."""
    metrics = [family for family in snapshot["metrics"] if family[2] in _COUNTERS]
    return {"metrics": metrics, "statistics": snapshot["statistics"]}


class Merged(Collector):
    """The families of a snapshot, for an exposition."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        """The families."""
        for name, documentation, kind, samples in self._snapshot["metrics"]:
            family = Metric(name, documentation, kind)
            family.samples = [
                Sample(sample, labels, value, exemplar=Exemplar(*exemplar) if exemplar else None)
                for sample, labels, value, exemplar in samples
            ]
            yield family


def _plain(sample: Sample) -> _Exemplar:
    found = sample.exemplar
    return None if found is None else [dict(found.labels), found.value, float(found.timestamp or 0)]


def _sum(a: Any, b: Any) -> Any:
    """Two entries of `model_stats`, or parts of them."""
    if isinstance(a, dict):
        summed = {key: _sum(a[key], b[key]) for key in a if key not in _MOST_FIELDS}
        most = {key: max(a[key], b[key]) for key in _MOST_FIELDS if key in a}
        return {key: most[key] if key in most else summed[key] for key in a}
    if isinstance(a, list):  # batch_stats
        sizes: dict[int, Any] = {entry["batch_size"]: entry for entry in a}
        for entry in b:
            size = entry["batch_size"]
            sizes[size] = _sum(sizes[size], entry) if size in sizes else entry
        return [sizes[size] for size in sorted(sizes)]
    return a if isinstance(a, str) else a + b
