"""The threads that decode images and tokenize long texts: a bounded queue whose overflow is refused at once.

Owned by `Serving`; called from the event loop.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from service.errors import DeadlineExceeded, Overloaded

T = TypeVar("T")

_WEIGHT = 0.1  # of the newest job in the running mean
_LATE = "the deadline passed while the request was decoded"


class PreprocessPool:
    """`threads` threads, at most `limit` jobs waiting or running."""

    def __init__(self, threads: int, limit: int) -> None:
        self._executor = ThreadPoolExecutor(threads, "preprocess")
        self._threads = threads
        self._lanes = min(2, max(1, threads - 1))  # per request: a thread stays free for the others
        self._limit = limit
        self._jobs = 0
        self._mean_s = 0.0

    async def run(self, jobs: Sequence[Callable[[], T]], deadline: float = math.inf) -> list[T]:
        """Results in order; a request has one or two jobs at the threads at a time, so that others come in between.

        Raises Overloaded when the queue is full, DeadlineExceeded at `deadline` (of `time.monotonic()`; no job begins
        after it), and what the first failing job raised.
        """
        if self._jobs and self._jobs + len(jobs) > self._limit:
            seconds = float(max(1, math.ceil(self._jobs * self._mean_s / self._threads)))
            raise Overloaded("the queue for decoding is full", retry_after=seconds)
        results: dict[int, T] = {}
        waiting = iter(enumerate(jobs))

        async def lane() -> None:
            for position, job in waiting:
                results[position] = await self._one(job, deadline)
                self._jobs -= 1

        self._jobs += len(jobs)
        try:
            async with asyncio.timeout(None if deadline == math.inf else deadline - time.monotonic()):
                lanes = [asyncio.ensure_future(lane()) for _ in range(min(self._lanes, len(jobs)))]
                try:
                    await asyncio.gather(*lanes)
                finally:
                    for task in lanes:
                        task.cancel()
        except TimeoutError:
            raise DeadlineExceeded(_LATE) from None
        finally:
            self._jobs -= len(jobs) - len(results)
        return [results[position] for position in range(len(jobs))]

    async def _one(self, job: Callable[[], T], deadline: float) -> T:
        loop = asyncio.get_running_loop()
        seconds, result = await loop.run_in_executor(self._executor, _timed, job, deadline)
        self._mean_s += _WEIGHT * (seconds - self._mean_s)
        return result

    def close(self) -> None:
        """Drop what waits."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _timed(job: Callable[[], T], deadline: float) -> tuple[float, T]:
    started = time.monotonic()
    if started >= deadline:
        raise DeadlineExceeded(_LATE)
    result = job()
    return time.monotonic() - started, result
