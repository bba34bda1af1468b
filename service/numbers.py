"""The numbers behind the service's metrics: plain ones, which become Prometheus families when they are scraped.

Event loop only, so that counting takes no lock: a request touches a dozen of them. `metrics.py` says which there are.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import ClassVar, Generic, TypeVar

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

_KEPT = 1024


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

    __slots__ = ("_bounds", "_counts", "_exemplars", "_total", "joint")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._exemplars: dict[int, Exemplar] = {}
        self._total = 0.0
        self.joint: Joint | None = None

    def observe(self, value: float, trace: str = "") -> None:
        """One more; the exemplar of its bucket where it has a trace."""
        place = bisect_left(self._bounds, value)
        self._counts[place] += 1
        self._total += value
        if trace:
            self._exemplars[place] = Exemplar({"trace_id": trace}, value, time.time())

    def observe_all(self, values: Sequence[float]) -> None:
        """Many more."""
        places = np.searchsorted(self._bounds, values)
        more = np.bincount(places, minlength=len(self._counts)).tolist()
        self._counts = [count + new for count, new in zip(self._counts, more, strict=True)]
        self._total += math.fsum(values)

    def read(self) -> tuple[list[int], list[Exemplar | None], float]:
        """How many are in each bucket, the latest one of each that has a trace, and the sum of all."""
        if self.joint is not None:
            self.joint.settle()
        return self._counts, [self._exemplars.get(place) for place in range(len(self._counts))], self._total


class Joint:
    """Distributions that are observed together, for every request: what they are told is kept until there is much of it
    or somebody asks, because looking up many places at once costs a fraction of each."""

    def __init__(self, *distributions: Distribution) -> None:
        self._distributions = distributions
        self._kept: list[tuple[float, ...]] = []
        for distribution in distributions:
            distribution.joint = self

    def observe(self, values: tuple[float, ...], trace: str = "") -> None:
        """One more of each, of the trace with this id where there is one."""
        if trace:
            for distribution, value in zip(self._distributions, values, strict=True):
                distribution.observe(value, trace)
            return
        self._kept.append(values)
        if len(self._kept) >= _KEPT:
            self.settle()

    def settle(self) -> None:
        """Count what is kept."""
        if self._kept:
            kept, self._kept = self._kept, []
            for distribution, values in zip(self._distributions, zip(*kept, strict=True), strict=True):
                distribution.observe_all(values)


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


class Numbers(Family[Number]):
    """One number for each set of labels."""

    _kind: ClassVar[type[CounterMetricFamily] | type[GaugeMetricFamily]]

    def _make(self) -> Number:
        return Number()

    def collect(self) -> Iterable[Metric]:
        """One sample for each set of labels."""
        family = self._kind(self._name, self._text, labels=self._labels)
        for values, child in self._children.items():
            family.add_metric(values, child.value)
        yield family


class Counters(Numbers):
    """Numbers that only grow."""

    _kind = CounterMetricFamily


class Gauges(Numbers):
    """Numbers that come and go."""

    _kind = GaugeMetricFamily


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
            counts, exemplars, total = child.read()
            buckets = zip(self._edges, accumulate(counts), exemplars, strict=True)
            family.add_metric(values, [(edge, n, trace) if trace else (edge, n) for edge, n, trace in buckets], total)
        yield family
