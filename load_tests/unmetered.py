"""`python -m load_tests.unmetered`: the service without its metrics, to measure what those cost. Takes the arguments of
`python -m service`."""

import sys
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase


def _same(self: MetricWrapperBase, *_: Any, **__: Any) -> MetricWrapperBase:
    return self


def _nothing(self: MetricWrapperBase, *_: Any, **__: Any) -> None:
    return


def main() -> int:
    """Take the work out of every metric, then serve."""
    setattr(MetricWrapperBase, "labels", _same)  # noqa: B010 - as a plain assignment it has another type
    for kind, names in ((Counter, ("inc",)), (Gauge, ("inc", "dec", "set")), (Histogram, ("observe",))):
        for name in names:
            setattr(kind, name, _nothing)
    from service.__main__ import main as serve

    return serve()


if __name__ == "__main__":
    sys.exit(main())
