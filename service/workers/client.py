"""Requests on the HTTP side: who gets each answer, its deadline, and the messages to and from one worker.

Runs on the event loop alone.
"""

import asyncio
import itertools
import time
from collections.abc import Callable

from service.errors import DeadlineExceeded, ServiceError, from_engine
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

Done = Callable[[InferResult | ServiceError], None]
"""What becomes of a request; called once."""


class EngineClient:
    """One worker as the service uses it. `on_report` gets the reports that answer no request."""

    def __init__(self, transport: Transport, on_report: Callable[[Report], None], first_id: int = 1) -> None:
        self._transport = transport
        self._on_report = on_report
        self._ids = itertools.count(first_id)
        self._pending: dict[int, tuple[float, Done]] = {}
        self._alarm: asyncio.TimerHandle | None = None  # for the first deadline there may be
        self._alarm_at = 0.0
        self._statistics: dict[int, asyncio.Future[StatsReport]] = {}
        self._profiles: dict[int, asyncio.Future[ProfileReport]] = {}
        self._stopped: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Start the worker; needs a running event loop."""
        self._transport.start(self._receive)

    def send(self, command: Command) -> None:
        """Send a command whose report comes through `on_report`."""
        self._transport.send(command)

    def begin(
        self,
        key: ModelKey,
        inputs: NamedTensors,
        outputs: tuple[str, ...],
        lengths: tuple[int, ...],
        deadline: float,
        priority: int,
        done: Done,
    ) -> int:
        """Run one request; its number. `deadline` is in `time.monotonic()`. `done` gets the answer, or the exception of
        service.errors that stands for it, unless `abandon` comes before."""
        request = Infer(next(self._ids), key, inputs, outputs, lengths, time.monotonic(), deadline, priority)
        self._pending[request.id] = deadline, done
        if self._alarm is None or deadline < self._alarm_at:
            self._set_alarm(deadline)
        self._transport.send(request)
        return request.id

    def abandon(self, number: int) -> None:
        """Nobody waits for a request any more: it is dropped from the queue, if it has no answer yet."""
        if self._pending.pop(number, None) is not None:
            self._transport.send(Cancel(number))

    def _set_alarm(self, deadline: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = deadline
        self._alarm = asyncio.get_running_loop().call_later(max(deadline - time.monotonic(), 0.0), self._expire)

    def _expire(self) -> None:
        """End what is past its deadline. One timer for all requests: nearly all are answered long before theirs."""
        self._alarm = None
        now = time.monotonic()
        for number in [number for number, (deadline, _) in self._pending.items() if deadline <= now]:
            pending = self._pending.pop(number, None)  # an end of another may have been its, too
            if pending is None:
                continue
            self._transport.send(Cancel(number))
            pending[1](DeadlineExceeded("the deadline passed before the answer was there"))
        if self._pending and self._alarm is None:
            self._set_alarm(min(deadline for deadline, _ in self._pending.values()))

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
                pending = self._pending.pop(report.id, None)
                if pending is not None:
                    pending[1](report)
            case InferFailed():
                pending = self._pending.pop(report.id, None)
                if pending is not None:
                    pending[1](from_engine(report.code, report.reason, report.retry_after))
            case StatsReport():
                waiting = self._statistics.pop(report.id, None)
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
