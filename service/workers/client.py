"""Requests on the HTTP side: a future per request, its deadline, and the messages to and from one worker.

Runs on the event loop alone.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable

from service.errors import ClientGone, DeadlineExceeded, from_engine
from service.workers.messages import (
    Cancel,
    Command,
    Infer,
    InferFailed,
    InferResult,
    ModelKey,
    ModelStats,
    NamedTensors,
    Profile,
    ProfileReport,
    Report,
    Stats,
    StatsReport,
    Stop,
    Stopped,
)
from service.workers.transport import Transport

# How long a request waits before its connection is watched: most are answered by then and never pay for it.
_WATCH_AFTER_S = 0.01


class EngineClient:
    """One worker as the service uses it. `on_report` gets the reports that answer no request."""

    def __init__(self, transport: Transport, on_report: Callable[[Report], None], first_id: int = 1) -> None:
        self._transport = transport
        self._on_report = on_report
        self._ids = itertools.count(first_id)
        self._pending: dict[int, asyncio.Future[InferResult]] = {}
        self._statistics: dict[int, asyncio.Future[StatsReport]] = {}
        self._profiles: dict[int, asyncio.Future[ProfileReport]] = {}
        self._stopped: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Start the worker; needs a running event loop."""
        self._transport.start(self._receive)

    def send(self, command: Command) -> None:
        """Send a command whose report comes through `on_report`."""
        self._transport.send(command)

    async def infer(
        self,
        key: ModelKey,
        inputs: NamedTensors,
        outputs: tuple[str, ...],
        lengths: tuple[int, ...],
        deadline: float,
        priority: int,
        disconnected: Callable[[], Awaitable[None]],
    ) -> InferResult:
        """Run one request. `deadline` is in `time.monotonic()`; `disconnected` returns when the client has gone.

        Raises the exceptions of service.errors; whatever ends the wait early also drops the request from the queue.
        """
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        request = Infer(next(self._ids), key, inputs, outputs, lengths, now, deadline, priority)
        future: asyncio.Future[InferResult] = loop.create_future()
        self._pending[request.id] = future
        watch = _Watch(loop, future, deadline - now, disconnected)
        try:
            self._transport.send(request)
            return await future
        finally:
            watch.cancel()
            if self._pending.pop(request.id, None) is not None:
                self._transport.send(Cancel(request.id))

    async def statistics(self, timeout: float) -> tuple[ModelStats, ...]:
        """Counters of all loaded models. Raises TimeoutError."""
        number = next(self._ids)
        future: asyncio.Future[StatsReport] = asyncio.get_running_loop().create_future()
        self._statistics[number] = future
        try:
            self._transport.send(Stats(number))
            async with asyncio.timeout(timeout):
                return (await future).models
        finally:
            self._statistics.pop(number, None)

    async def profile(self, key: ModelKey, plan: str | None, timeout: float) -> ProfileReport:
        """The plans of a model and the steps of one of them. Raises TimeoutError."""
        number = next(self._ids)
        future: asyncio.Future[ProfileReport] = asyncio.get_running_loop().create_future()
        self._profiles[number] = future
        try:
            self._transport.send(Profile(number, key, plan))
            async with asyncio.timeout(timeout):
                return await future
        finally:
            self._profiles.pop(number, None)

    async def stop(self, timeout: float) -> None:
        """Let the worker finish what it accepted and close its models. Raises TimeoutError."""
        self._stopped = asyncio.get_running_loop().create_future()
        self._transport.send(Stop())
        async with asyncio.timeout(timeout):
            await self._stopped

    def close(self) -> None:
        """End what is left of the worker."""
        self._transport.close()

    def _receive(self, report: Report) -> None:
        match report:
            case InferResult():
                self._settle(report.id, lambda future: future.set_result(report))
            case InferFailed():
                error = from_engine(report.code, report.reason, report.retry_after)
                self._settle(report.id, lambda future: future.set_exception(error))
            case StatsReport():
                waiting = self._statistics.get(report.id)
                if waiting is not None and not waiting.done():
                    waiting.set_result(report)
            case ProfileReport():
                profile = self._profiles.get(report.id)
                if profile is not None and not profile.done():
                    profile.set_result(report)
            case Stopped():
                if self._stopped is not None and not self._stopped.done():
                    self._stopped.set_result(None)
            case _:
                self._on_report(report)

    def _settle(self, request_id: int, settle: Callable[[asyncio.Future[InferResult]], None]) -> None:
        future = self._pending.pop(request_id, None)
        if future is not None and not future.done():
            settle(future)


class _Watch:
    """Ends a request at its deadline, or when its client goes. For all but the first milliseconds: most requests are
    answered by then, and cost one timer."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        future: asyncio.Future[InferResult],
        seconds: float,
        disconnected: Callable[[], Awaitable[None]],
    ) -> None:
        self._loop = loop
        self._future = future
        self._left = seconds - _WATCH_AFTER_S
        self._disconnected = disconnected
        self._task: asyncio.Task[None] | None = None
        if self._left <= 0:
            self._timer = loop.call_later(max(seconds, 0.0), self._expire)
        else:
            self._timer = loop.call_later(_WATCH_AFTER_S, self._begin)

    def _begin(self) -> None:
        self._timer = self._loop.call_later(self._left, self._expire)
        self._task = self._loop.create_task(self._wait())

    def _expire(self) -> None:
        if not self._future.done():
            self._future.set_exception(DeadlineExceeded("the deadline passed before the answer was there"))

    async def _wait(self) -> None:
        await self._disconnected()
        if not self._future.done():
            self._future.set_exception(ClientGone("the client closed the connection"))

    def cancel(self) -> None:
        """Stop watching."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            self._task = None  # its traceback leads back here: a cycle would keep the answer until it is collected
