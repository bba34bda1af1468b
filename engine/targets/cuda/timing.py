"""How long the device takes for what is queued in a stream. Used by the tuner and for the ceilings of the roofline."""

from __future__ import annotations

from collections.abc import Callable

import cupy


def elapsed_seconds(stream: cupy.cuda.Stream, work: Callable[[], object]) -> float:
    """The seconds from before to behind what `work` queues in `stream`. Waits for it."""
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(begin, end)) * 1e-3
