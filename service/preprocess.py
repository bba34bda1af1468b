"""The threads that decode images and tokenize long texts: a bounded queue whose overflow is refused at once.

Owned by `Serving`; called from the event loop.
"""

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from service.errors import Overloaded

T = TypeVar("T")

_WEIGHT = 0.1  # of the newest job in the running mean


class PreprocessPool:
    """`threads` threads, at most `limit` jobs waiting or running."""

    def __init__(self, threads: int, limit: int) -> None:
        self._executor = ThreadPoolExecutor(threads, "preprocess")
        self._threads = threads
        self._limit = limit
        self._jobs = 0
        self._mean_s = 0.0

    async def run(self, jobs: list[Callable[[], T]]) -> list[T]:
        """Results in order. Raises Overloaded when the queue is full, and what the first failing job raised."""
        if self._jobs and self._jobs + len(jobs) > self._limit:
            seconds = float(max(1, math.ceil(self._jobs * self._mean_s / self._threads)))
            raise Overloaded("the queue for decoding is full", retry_after=seconds)
        loop = asyncio.get_running_loop()
        futures = [loop.run_in_executor(self._executor, self._timed, job) for job in jobs]
        self._jobs += len(jobs)
        for future in futures:
            future.add_done_callback(self._done)
        try:
            results = []
            for future in futures:
                seconds, result = await future
                self._mean_s += _WEIGHT * (seconds - self._mean_s)
                results.append(result)
            return results
        finally:
            for future in futures:
                future.cancel()

    def _timed(self, job: Callable[[], T]) -> tuple[float, T]:
        started = time.monotonic()
        result = job()
        return time.monotonic() - started, result

    def _done(self, future: "asyncio.Future[tuple[float, T]]") -> None:
        self._jobs -= 1
        if not future.cancelled():
            future.exception()  # read, so that a second failing job is not reported as never retrieved

    def close(self) -> None:
        """Drop what waits."""
        self._executor.shutdown(wait=False, cancel_futures=True)
