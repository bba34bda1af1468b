"""The numbers behind the service's metrics: plain ones, which become Prometheus families when they are scraped.

Event loop only, so that counting takes no lock. What is told of every request and of every batch is kept as it comes
(`Rows`) and counted when there is much of it or somebody asks. `metrics.py` says which numbers there are.
"""

import struct
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import ClassVar, Generic, TypeVar

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


class Distribution:
    """A histogram of one set of labels; `bounds` are the upper ends of its buckets, ascending."""

    __slots__ = ("_bounds", "_counts", "_exemplars", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._exemplars: dict[int, Exemplar] = {}
        self._total = 0.0

    def observe(self, value: float) -> None:
        """One more."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def observe_all(self, values: NDArray[np.float64]) -> None:
        """Many more."""
        places = np.searchsorted(self._bounds, values)
        more = np.bincount(places, minlength=len(self._counts)).tolist()
        self._counts = [count + new for count, new in zip(self._counts, more, strict=True)]
        self._total += float(values.sum())

    def exemplify(self, value: float, trace: str) -> None:
        """One that is, or will be, counted belongs to a trace: it is the exemplar of its bucket from now on."""
        self._exemplars[bisect_left(self._bounds, value)] = Exemplar({"trace_id": trace}, value, time.time())

    def read(self) -> tuple[list[int], list[Exemplar | None], float]:
        """How many are in each bucket, the latest one of each that has a trace, and the sum of all."""
        return self._counts, [self._exemplars.get(place) for place in range(len(self._counts))], self._total


class Rows:
    """Numbers that are told together, a row at a time: keeping a row costs a fraction of counting it. `count` gets the
    columns of many, (width, rows)."""

    __slots__ = ("_count", "_kept", "_pack", "_width")

    def __init__(self, width: int, count: Callable[[NDArray[np.float64]], None]) -> None:
        self._count = count
        self._kept: list[bytes] = []  # which the garbage collector need not look into, unlike tuples
        self._pack = struct.Struct(f"{width}d").pack
        self._width = width

    def add(self, row: tuple[float, ...]) -> None:
        """One more."""
        self._kept.append(self._pack(*row))
        if len(self._kept) >= _KEPT:
            self.settle()

    def settle(self) -> None:
        """Count what is kept."""
        if self._kept:
            columns = np.frombuffer(b"".join(self._kept)).reshape(-1, self._width).T
            self._kept.clear()
            self._count(columns)


class Registry(CollectorRegistry):
    """Families that are up to date whenever they are collected: `settle` is called before."""

    def __init__(self, settle: Callable[[], None]) -> None:
        super().__init__(auto_describe=False)
        self._settle = settle

    def collect(self) -> Iterable[Metric]:
        """All families as they are now."""
        self._settle()
        return super().collect()


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

    def children(self) -> Iterable[Child]:
        """The numbers of all labels."""
        return self._children.values()

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
