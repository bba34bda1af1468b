"""`python -m load_tests.unmetered`: the service, which stops counting at one SIGUSR1 and goes on at the next, to show
what counting costs. Takes the arguments of `python -m service`. The statistics of the protocol go on: they are made of
the same rows (`service.numbers.Rows`), which are kept with and without.

One process does both: two would differ by more than metrics cost, by where their memory lies.
"""

import signal
import sys
from types import FrameType

from service.numbers import Distribution, Number

_COUNTING = ((Number, "inc"), (Distribution, "observe"), (Distribution, "observe_all"))


def _nothing(self: object, *_: float) -> None:
    return


def main() -> int:
    """Serve, and have the work taken out of every metric at a signal."""
    there = {place: getattr(*place) for place in _COUNTING}
    counts = True

    def toggle(sig: int, frame: FrameType | None) -> None:
        nonlocal counts
        counts = not counts
        for (kind, name), method in there.items():
            setattr(kind, name, method if counts else _nothing)

    signal.signal(signal.SIGUSR1, toggle)
    from service.__main__ import main as serve

    return serve()


if __name__ == "__main__":
    sys.exit(main())
