"""How commands get to a worker and reports come back: the interface, and the worker in this process. process.py has the
worker in a process of its own."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from service.workers.engine_api import EngineModule
from service.workers.engine_worker import EngineWorker
from service.workers.messages import Command, Infer, Report


class Transport(Protocol):
    """One worker as the HTTP side sees it."""

    def start(self, receive: Callable[[Report], None]) -> None:
        """Begin; `receive` is called on the running event loop, in the order of the worker's reports."""
        ...

    def send(self, command: Command) -> None:
        """Hand a command over; never blocks the event loop."""
        ...

    def close(self) -> None:
        """End what is left of the worker, whether or not it has stopped."""
        ...


class LocalTransport:
    """A worker in this process: commands are method calls, reports come back in bundles through the event loop. What
    came in one turn of the loop is looked at together, at its end. Batches that take less than `light_s` run on the
    loop itself."""

    def __init__(self, engine: Callable[[], EngineModule], light_s: float = 0.0) -> None:
        self._worker = EngineWorker(engine, self._report, light_s=light_s)
        self._reports: list[Report] = []
        self._lock = threading.Lock()
        self._scheduled = False  # to deliver
        self._accepted = False  # requests that the worker has not looked at
        self._loop: asyncio.AbstractEventLoop | None = None
        self._receive: Callable[[Report], None] | None = None

    def start(self, receive: Callable[[Report], None]) -> None:
        """Begin on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._receive = receive
        self._worker.start()

    def send(self, command: Command) -> None:
        """Hand a command to the worker."""
        if not isinstance(command, Infer):
            self._worker.handle(command)
            return
        self._worker.accept(command)
        if not self._accepted and self._loop is not None:
            self._accepted = True
            self._loop.call_soon(self._work_off)

    def close(self) -> None:
        """Nothing to do: a worker in this process ends with it."""

    def _work_off(self) -> None:
        self._accepted = False
        self._scheduled = True  # an engine thread that sees the old value wakes the loop for nothing
        try:
            self._worker.work_off(lambda: self._deliver(more=True))
        finally:
            self._deliver()

    def _report(self, reports: Sequence[Report]) -> None:
        """Any thread of the worker, or the loop's: queue the reports and wake the loop once per bundle."""
        with self._lock:
            self._reports.extend(reports)
            if self._scheduled:
                return
            self._scheduled = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self, more: bool = False) -> None:
        """What was reported; whether it is called again without being asked to."""
        with self._lock:
            reports, self._reports = self._reports, []
            self._scheduled = more
        if self._receive is not None:
            for report in reports:
                self._receive(report)
