"""`python -m load_tests.unmetered`: the service, which stops counting at one SIGUSR1 and goes on at the next, to show
what counting costs. Takes the arguments of `python -m service`.

One process does both: two would differ by more than metrics cost, by where their memory lies. Every metric must have
been used before, or it would never count.
"""

import signal
import sys
from types import FrameType
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

_COUNTING: dict[type[MetricWrapperBase], tuple[str, ...]] = {
    Counter: ("inc",),
    Gauge: ("inc", "dec", "set"),
    Histogram: ("observe",),
}


def _same(self: MetricWrapperBase, *_: Any, **__: Any) -> MetricWrapperBase:
    return self


def _nothing(self: MetricWrapperBase, *_: Any, **__: Any) -> None:
    return


_OFF: dict[tuple[type[MetricWrapperBase], str], Any] = {
    (MetricWrapperBase, "labels"): _same,
    **{(kind, name): _nothing for kind, names in _COUNTING.items() for name in names},
}


def main() -> int:
    """Serve, and have the work taken out of every metric at a signal."""
    there = {place: getattr(*place) for place in _OFF}
    counts = True

    def toggle(sig: int, frame: FrameType | None) -> None:
        nonlocal counts
        counts = not counts
        for (kind, name), method in (there if counts else _OFF).items():
            setattr(kind, name, method)

    signal.signal(signal.SIGUSR1, toggle)
    from service.__main__ import main as serve

    return serve()


if __name__ == "__main__":
    sys.exit(main())
