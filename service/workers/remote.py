"""A worker in another process, as the event loop of a front end sees it: commands out, reports in, and what its end
means. How the connection comes about is for process.py, which starts the worker itself, and guest.py, whose worker is
shared with other front ends.

What a worker's end means: requests in flight fail at once, `WorkerLost` tells the service that no model is loaded, and
the next worker gets the same models to load. A model whose loading ends the worker again and again is given up, so that
the others can be served.
"""

import asyncio
import gc
import logging
import time
from collections.abc import Callable

from service.workers.counters import retired
from service.workers.link import Link
from service.workers.messages import (
    Cancel,
    Command,
    FailureCode,
    Infer,
    InferFailed,
    InferResult,
    LoadFailed,
    LoadModel,
    ModelKey,
    ModelReady,
    ModelStats,
    Profile,
    ProfileReport,
    Report,
    Stats,
    StatsReport,
    Stop,
    Stopped,
    Unload,
    Unloaded,
    WorkerLost,
    WorkerSilent,
)
from service.workers.shared_memory import Blocks, Bytes, RegionFull
from service.workers.wire import Beat, Dying, FromEngine, LogLine, Release, Starved

log = logging.getLogger(__name__)

_MOST_CRASHES = 3  # while loading the same model
_WATCH_EVERY_S = 1.0
_SILENT_S = 4.0  # a worker that lives is heard every second


class RemoteTransport:
    """One worker in another process. Event loop only."""

    def __init__(self) -> None:
        self._receive: Callable[[Report], None] | None = None
        self._link: Link | None = None
        self._blocks: Blocks | None = None
        self._models: dict[ModelKey, LoadModel] = {}
        self._loading: dict[ModelKey, None] = {}
        self._unloading: dict[ModelKey, None] = {}
        self._crashes: dict[ModelKey, int] = {}
        self._in_flight: set[int] = set()
        self._counted: tuple[ModelStats, ...] = ()
        self._heard = self._begun = 0.0
        self._is_silent = False
        self._last_words = ""
        self._stopping = False
        self._stopped = False

    # ---- the service's side

    def send(self, command: Command) -> None:
        """Hand a command over, or answer it here where there is no worker."""
        match command:
            case LoadModel():
                self._models[command.key] = command
            case Unload():
                self._models.pop(command.key, None)
                self._crashes.pop(command.key, None)
                self._forget(command.key)
            case Stop():
                self._stopping = True
            case Cancel():
                self._in_flight.discard(command.id)
        if self._link is None:
            self._answer_alone(command)
        else:
            self._forward(self._link, command)

    @property
    def shared_bytes(self) -> int:
        """Bytes of tensors on their way to the worker or in use there."""
        return self._blocks.used if self._blocks is not None else 0

    def _answer_alone(self, command: Command) -> None:
        match command:
            case Infer():
                reason = f"the engine process is being {'restarted' if self._begun else 'started'}"
                self._deliver(InferFailed(command.id, FailureCode.WORKER_LOST, reason, 1.0))
            case Stats():
                self._deliver(StatsReport(command.id, self._counted))
            case Profile():
                self._deliver(ProfileReport(command.id, (), None, ()))
            case Unload():
                self._deliver(Unloaded(command.key))
            case Stop():
                self._stopped = True
                self._deliver(Stopped())

    def _forget(self, key: ModelKey) -> None:
        """A model is unloaded on purpose: its counters end."""
        self._counted = tuple(stats for stats in self._counted if stats.key != key)

    def _forward(self, link: Link, command: Command) -> None:
        if isinstance(command, Infer):
            self._in_flight.add(command.id)
        elif isinstance(command, LoadModel):
            self._loading[command.key] = None
        elif isinstance(command, Unload):
            self._unloading[command.key] = None
        try:
            link.send(command)
        except RegionFull as error:
            assert isinstance(command, Infer), "only requests are large"
            self._in_flight.discard(command.id)
            if error.never:
                reason = f"the request has {error.nbytes} bytes of tensors; send less or raise --transfer-bytes"
                self._deliver(InferFailed(command.id, FailureCode.TOO_LARGE, reason))
            else:
                reason = "the shared memory is full of requests that wait"
                self._deliver(InferFailed(command.id, FailureCode.OVERLOADED, reason, 1.0))

    def _deliver(self, report: Report) -> None:
        if self._receive is not None:
            self._receive(report)

    # ---- the worker's side

    def _make_link(self, requests: Bytes, answers: Bytes, on_end: Callable[[], object]) -> Link:
        """A protocol for the connection over these regions; `_use` has to follow."""
        self._blocks = Blocks(requests)
        return Link(self._blocks, answers, self._hear, on_end)

    def _begin(self, link: Link) -> None:
        """The connection is there: the worker gets the models that were loaded, or were to be."""
        self._link, self._begun = link, time.monotonic()
        self._heard, self._is_silent, self._last_words = self._begun, False, ""
        for command in self._models.values():
            self._forward(link, command)

    async def _use(self, link: Link, ended: asyncio.Event, on_begun: Callable[[], object] = lambda: None) -> None:
        """The connection from its beginning until `ended`."""
        watch = asyncio.get_running_loop().create_task(self._watch())
        try:
            self._begin(link)
            on_begun()
            await ended.wait()
        finally:
            watch.cancel()
            link.close()
            self._lost()

    def _hear(self, message: FromEngine) -> None:
        """A message of the worker."""
        self._heard = time.monotonic()
        match message:
            case Release():
                if self._blocks is not None:
                    self._blocks.give_back(message.start)
                return
            case Beat():
                self._beat(message.busy_seconds)
                return
            case Starved():
                gc.collect()  # an answer in a reference cycle lives until then
                return
            case LogLine():
                logging.getLogger(message.logger).log(message.level, "%s", message.text)
                return
            case Dying():
                self._last_words = message.reason
                return
            case InferResult() | InferFailed():
                self._in_flight.discard(message.id)
            case ModelReady():
                self._loading.pop(message.key, None)
                self._crashes.pop(message.key, None)
            case LoadFailed():
                self._loading.pop(message.key, None)
                self._models.pop(message.key, None)
            case Unloaded():
                self._unloading.pop(message.key, None)
                self._forget(message.key)
            case StatsReport():
                self._counted = message.models
            case Stopped():
                self._stopped = True
        self._deliver(message)

    async def _watch(self) -> None:
        """Tell the service when the worker falls silent, and when it speaks again; as long as there is a connection.
        One that has just been started has to come up first."""
        looked, heard, silent_s = time.monotonic(), self._heard, 0.0
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            before, looked = looked, time.monotonic()
            # Of a time that this process stood still itself, it has not read yet what it was told in it.
            silent_s += min(looked - before, 2 * _WATCH_EVERY_S)
            if self._heard > heard:
                heard, silent_s = self._heard, min(looked - self._heard, 2 * _WATCH_EVERY_S)
            is_silent = silent_s > _SILENT_S and heard > self._begun
            if is_silent is not self._is_silent:
                self._is_silent = is_silent
                self._deliver(WorkerSilent(silent_s if is_silent else 0.0))
            self._endure(silent_s)

    def _endure(self, silent_s: float) -> None:
        """The worker has said nothing for so long."""

    def _beat(self, busy_seconds: float) -> None:
        """The worker lives; one batch has been running for so long."""

    def _lost(self) -> None:
        """The socket has ended, and the worker with it or soon, unless it is shared."""
        fault = self._link.fault if self._link is not None else ""
        self._link = self._blocks = None
        self._counted = retired(self._counted)
        if self._stopped:
            return
        what = "the connection to the engine process broke" if fault else "the engine process ended unexpectedly"
        cause = fault or self._last_words
        reason = f"{what}: {cause}" if cause else what
        next_ = "the server is shutting down" if self._stopping else "it is being restarted"
        for request in sorted(self._in_flight):
            self._deliver(InferFailed(request, FailureCode.WORKER_LOST, f"{reason}; {next_}", 1.0))
        self._in_flight.clear()
        for key in list(self._unloading):
            self._deliver(Unloaded(key))
        self._unloading.clear()
        self._deliver(WorkerLost(reason, restarting=not self._stopping))
        if self._stopping:
            self._stopped = True
            self._deliver(Stopped())
        else:
            self._blame()

    def _blame(self) -> None:
        """The worker loads one model at a time: the first without a report was at it when the worker ended."""
        suspect = next(iter(self._loading), None)
        self._loading.clear()
        if suspect is None:
            return
        self._crashes[suspect] = self._crashes.get(suspect, 0) + 1
        if self._crashes[suspect] >= _MOST_CRASHES and self._models.pop(suspect, None) is not None:
            self._deliver(LoadFailed(suspect, f"loading it ended the engine process {_MOST_CRASHES} times"))
