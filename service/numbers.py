"""The numbers behind the service's metrics: plain ones, which become Prometheus families when they are scraped.

Event loop only, so that counting takes no lock: a request touches a dozen of them. `metrics.py` says which there are.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

_MOST_ROWS = 1000


class Number:
    """A counter, or a gauge, of one set of labels."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, amount: int = 1) -> None:
        """So many more."""
        self.value += amount

    def dec(self) -> None:
        """One less."""
        self.value -= 1


class Distribution:
    """A histogram of one set of labels; `bounds` are the upper ends of its buckets, ascending."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """One more."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def observe_all(self, values: NDArray[np.float64]) -> None:
        """Many more."""
        places = np.searchsorted(self._bounds, values)
        for place, count in enumerate(np.bincount(places, minlength=len(self.counts)).tolist()):
            self.counts[place] += count
        self.total += float(values.sum())


class Rows:
    """Values that are observed together, one for each of `distributions`. They are kept until somebody looks, or until
    there are many: counting a thousand at a time costs each a third of what it costs alone."""

    __slots__ = ("_distributions", "_kept")

    def __init__(self, distributions: Sequence[Distribution]) -> None:
        self._distributions = distributions
        self._kept: list[tuple[float, ...]] = []

    def add(self, row: tuple[float, ...]) -> None:
        """One more of each."""
        self._kept.append(row)
        if len(self._kept) >= _MOST_ROWS:
            self.count()

    def count(self) -> None:
        """Count what was kept."""
        kept, self._kept = self._kept, []
        if kept:
            values = np.fromiter(chain.from_iterable(kept), np.float64, len(kept) * len(self._distributions))
            for distribution, column in zip(self._distributions, values.reshape(len(kept), -1).T, strict=True):
                distribution.observe_all(column)


class RowsByLabels(Collector):
    """All `Rows` of a registry, counted before its other families are looked at: made before them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._rows: dict[tuple[str, ...], Rows] = {}
        registry.register(self)

    def labels(self, *values: str, of: Sequence[Distribution]) -> Rows:
        """Those with these labels."""
        return self._rows.setdefault(values, Rows(of))

    def collect(self) -> Iterable[Metric]:
        """Nothing of its own."""
        for rows in self._rows.values():
            rows.count()
        return ()


Child = TypeVar("Child", Number, Distribution)


class Family(Collector, Generic[Child]):
    """All numbers of one name, by the values of its labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        self._name, self._text, self._labels = name, text, tuple(labels)
        self._children: dict[tuple[str, ...], Child] = {}
        registry.register(self)

    def labels(self, *values: str) -> Child:
        """The number with these labels, from now on exposed."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._make()
        return child

    def _make(self) -> Child:
        raise NotImplementedError

    def collect(self) -> Iterable[Metric]:
        """The family as it is now."""
        raise NotImplementedError


class Counters(Family[Number]):
    """Numbers that only grow."""

    def _make(self) -> Number:
        return Number()

    def collect(self) -> Iterable[Metric]:
        """One sample for each set of labels."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, child in self._children.items():
            family.add_metric(values, child.value)
        yield family


class Gauges(Family[Number]):
    """Numbers that come and go."""

    def _make(self) -> Number:
        return Number()

    def collect(self) -> Iterable[Metric]:
        """One sample for each set of labels."""
        family = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for values, child in self._children.items():
            family.add_metric(values, child.value)
        yield family


class Histograms(Family[Distribution]):
    """Distributions over the same buckets."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._bounds = tuple(bounds)
        self._edges = (*map(floatToGoString, self._bounds), "+Inf")
        super().__init__(name, text, labels, registry)

    def _make(self) -> Distribution:
        return Distribution(self._bounds)

    def collect(self) -> Iterable[Metric]:
        """Cumulative buckets, count and sum for each set of labels."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, child in self._children.items():
            family.add_metric(values, list(zip(self._edges, accumulate(child.counts), strict=True)), child.total)
        yield family
