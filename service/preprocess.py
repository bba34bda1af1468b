"""The threads that decode images, tokenize long texts, read long bodies and write long answers: a bounded queue whose
overflow is refused at once.

Owned by `Serving`; called from the event loop, by routes through `run` and by `direct.py`, which has no task to wait
in, through `begin`.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

from service.errors import DeadlineExceeded, Overloaded

T = TypeVar("T")

_WEIGHT = 0.1  # of the newest call in the running mean
_LATE = "the deadline passed before the request was read or its answer written"


class PreprocessPool:
    """`threads` threads, at most `limit` calls waiting or running."""

    def __init__(self, threads: int, limit: int) -> None:
        self._executor = ThreadPoolExecutor(threads, "preprocess")
        self._threads = threads
        self._lanes = min(2, max(1, threads - 1))  # per request: a thread stays free for the others
        self._limit = limit
        self._jobs = 0
        self._mean_s = 0.0

    def begin(
        self,
        calls: Sequence[Callable[[], T]],
        done: Callable[[list[T] | Exception], None],
        deadline: float = math.inf,
    ) -> "Preprocessing[T]":
        """Make the calls of one request, one or two of them at a time, so that others come in between. `done` gets the
        results in order, what the first failing call raised, or DeadlineExceeded at `deadline` (of `time.monotonic()`;
        no call begins after it), unless the request is cancelled before. Raises Overloaded when the queue is full."""
        if self._jobs and self._jobs + len(calls) > self._limit:
            seconds = float(max(1, math.ceil(self._jobs * self._mean_s / self._threads)))
            raise Overloaded("the queue for decoding is full", retry_after=seconds)
        begun = Preprocessing(self, calls, done, deadline)
        for _ in range(min(self._lanes, len(calls))):
            begun.go_on()
        return begun

    async def run(self, calls: Sequence[Callable[[], T]], deadline: float = math.inf) -> list[T]:
        """The results of `begin`. Raises what it raises and what `done` would get."""
        future: asyncio.Future[list[T]] = asyncio.get_running_loop().create_future()
        begun = self.begin(calls, partial(_settle, future), deadline)
        try:
            return await future
        finally:
            begun.cancel()

    def submit(self, call: Callable[[], None]) -> None:
        """Have a thread make a call."""
        self._executor.submit(call)

    def count(self, change: int) -> None:
        """So many calls more wait or run."""
        self._jobs += change

    def took(self, seconds: float) -> None:
        """A call has come to its end."""
        self._mean_s += _WEIGHT * (seconds - self._mean_s)

    def close(self) -> None:
        """Drop what waits."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class Preprocessing(Generic[T]):
    """The calls of one request; made by `PreprocessPool.begin`. `_left` of them have no result yet and count in the
    pool; 0 once the request is over."""

    __slots__ = ("_calls", "_deadline", "_done", "_left", "_loop", "_next", "_pool", "_results", "_timer")

    def __init__(
        self,
        pool: PreprocessPool,
        calls: Sequence[Callable[[], T]],
        done: Callable[[list[T] | Exception], None],
        deadline: float,
    ) -> None:
        self._pool, self._calls, self._done, self._deadline = pool, calls, done, deadline
        self._loop = asyncio.get_running_loop()
        self._next = 0
        self._results: dict[int, T] = {}
        self._left = len(calls)
        pool.count(self._left)
        self._timer: asyncio.TimerHandle | None = None
        if deadline != math.inf:
            self._timer = self._loop.call_later(deadline - time.monotonic(), self._expire)

    def go_on(self) -> None:
        """Have the next call made, if there is one."""
        if self._next < len(self._calls):
            self._pool.submit(partial(self._call, self._next))
            self._next += 1

    def _call(self, position: int) -> None:
        """One call, on a thread of the pool."""
        if not self._left:
            return
        started = time.monotonic()
        outcome: T | Exception
        try:
            if started >= self._deadline:
                raise DeadlineExceeded(_LATE)
            outcome = self._calls[position]()
        except Exception as error:
            outcome = error
        seconds = time.monotonic() - started
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits
            self._loop.call_soon_threadsafe(self._returned, position, seconds, outcome)

    def _returned(self, position: int, seconds: float, outcome: T | Exception) -> None:
        if not self._left:
            return
        if isinstance(outcome, Exception):
            self._end(outcome)
            return
        self._pool.took(seconds)
        self._pool.count(-1)
        self._left -= 1
        self._results[position] = outcome
        if self._left:
            self.go_on()
        else:
            self._end([self._results[position] for position in range(len(self._calls))])

    def _expire(self) -> None:
        self._end(DeadlineExceeded(_LATE))

    def _end(self, outcome: list[T] | Exception) -> None:
        self.cancel()
        self._done(outcome)

    def cancel(self) -> None:
        """Nobody waits any more: what has not begun never does."""
        self._pool.count(-self._left)
        self._left = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _settle(future: asyncio.Future[list[T]], outcome: list[T] | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
