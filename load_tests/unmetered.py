"""`python -m load_tests.unmetered`: the service, which stops counting at a signal and goes on at the next, to show what
counting costs. At SIGUSR1 it stops what Prometheus is told; the statistics of the protocol go on, which are made of the
same rows (`service.numbers.Rows`). At SIGUSR2 it counts nothing at all. Takes the arguments of `python -m service`.

One process does both: two would differ by more than metrics cost, by where their memory lies.
"""

import signal
import sys
from types import FrameType

from service.numbers import Distribution, Number, Rows

_METRICS: tuple[tuple[type, str], ...] = ((Number, "inc"), (Distribution, "observe"), (Distribution, "observe_all"))
_COUNTING = {signal.SIGUSR1: _METRICS, signal.SIGUSR2: (*_METRICS, (Rows, "add"))}


def _nothing(self: object, *_: object) -> None:
    return


def main() -> int:
    """Serve, and have the work taken out of counting at a signal."""
    there = {place: getattr(*place) for place in _COUNTING[signal.SIGUSR2]}
    counts = True

    def toggle(sig: int, frame: FrameType | None) -> None:
        nonlocal counts
        counts = not counts
        for kind, name in _COUNTING[signal.Signals(sig)]:
            setattr(kind, name, there[kind, name] if counts else _nothing)

    for number in _COUNTING:
        signal.signal(number, toggle)
    from service.__main__ import main as serve

    return serve()


if __name__ == "__main__":
    sys.exit(main())
