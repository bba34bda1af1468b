"""`python -m service.workers.child`: the engine worker in a process of its own. Started by process.py alone.

Threads besides the worker's own: the main one reads the commands of the process that started this one, one more each
those of a front end; both queue all requests that came together before anybody looks at them, and run light batches
themselves. `pulse`, and a thread for each front end, send heartbeats and give shared memory back, `attach` takes new
front ends in. The process ends when its first socket does, whatever the reason; signals are for the HTTP process, which
decides what they mean. Several front ends hold the same models: one is loaded when the first asks for it and unloaded
when the last lets it go.
"""

import gc
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from service.workers.clients import FIRST_CLIENT, Client, Connection, client_of
from service.workers.counters import LastingCounters
from service.workers.engine_api import EngineModule
from service.workers.engine_worker import EngineWorker
from service.workers.messages import (
    BatchDone,
    Cancel,
    Infer,
    InferFailed,
    InferResult,
    LoadFailed,
    LoadModel,
    ModelKey,
    ModelReady,
    ProfileReport,
    Report,
    StatsReport,
    Stop,
    Stopped,
    Unload,
    Unloaded,
)
from service.workers.wire import Beat, Counted, Dying, FromEngine, LogLine, Release, ToEngine

BEAT_S = 1.0
EXIT_LOST = 70  # EX_SOFTWARE
_SWITCH_INTERVAL_S = 0.0005
_ORPHANED_S = 60.0  # how long a model waits for a front end that comes back

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChildArguments:
    """The command line: file descriptors it inherits (its connection, and the socket that brings those of front ends),
    the engine as "module:callable", the level of the log, how many microseconds a light batch takes at most."""

    connection: Connection
    attach: int
    engine: str
    log_level: int
    light_run_us: int

    def to_list(self) -> list[str]:
        """As command-line arguments."""
        c = self.connection
        descriptors = map(str, (c.socket, c.requests, c.answers, self.attach))
        return [*descriptors, self.engine, str(self.log_level), str(self.light_run_us)]

    @classmethod
    def from_list(cls, arguments: Sequence[str]) -> "ChildArguments":
        """From command-line arguments."""
        *descriptors, engine, level, light = arguments
        socket_, requests, answers, attach = map(int, descriptors)
        return cls(Connection(socket_, requests, answers), attach, engine, int(level), int(light))


@dataclass(slots=True)
class _Model:
    """A model that is loading or loaded: the clients that hold it, and what became of it."""

    holders: set[int]
    ready: ModelReady | None = None
    orphaned_since: float | None = None


@dataclass(slots=True)
class _Books:
    """Who has what; behind the child's lock."""

    clients: dict[int, Client] = field(default_factory=dict)
    models: dict[ModelKey, _Model] = field(default_factory=dict)
    leaving: defaultdict[ModelKey, set[int]] = field(default_factory=lambda: defaultdict(set))


class Child:
    """The worker and its clients."""

    def __init__(self, arguments: ChildArguments) -> None:
        self._first = Client(FIRST_CLIENT, arguments.connection)
        self._attach = socket.socket(fileno=arguments.attach)
        self._lock = threading.RLock()
        self._counters = LastingCounters()
        self._books = _Books(clients={FIRST_CLIENT: self._first})
        self._worker = EngineWorker(_named(arguments.engine), self._report, self._lost, arguments.light_run_us / 1e6)

    def run(self) -> None:
        """Serve until the first socket ends."""
        logging.getLogger().addHandler(_Forward(self._first.send))
        self._worker.start()
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()
        self._first.serve(self._handle, self._worker.work_off)

    # ---- clients

    def _take_in(self) -> None:
        """Connections of front ends, as they come."""
        threads: dict[int, threading.Thread] = {}
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._attach, 64, 3)
            if not data:
                return
            try:
                client = Client(int(data), Connection.of(descriptors))
            except OSError as error:  # the front end sees the connection end, and asks for another one
                log.error("front end %d is not connected: %s", int(data), error)
                continue
            threads = {number: thread for number, thread in threads.items() if thread.is_alive()}
            before = threads.get(client.number)
            arguments, name = (client, before), f"client {client.number}"
            threads[client.number] = threading.Thread(target=self._serve, args=arguments, name=name, daemon=True)
            threads[client.number].start()

    def _serve(self, client: Client, before: threading.Thread | None) -> None:
        """One front end's connection to its end: what it asked for is dropped, what it held is let go. The thread of
        its connection before, if any, does so first."""
        if before is not None:
            before.join()
        with self._lock:
            self._books.clients[client.number] = client
        releasing = threading.Thread(target=self._release, args=(client,), name="release", daemon=True)
        releasing.start()
        try:
            client.serve(self._handle, self._worker.work_off)
        finally:
            client.disconnect()
            with self._lock:
                del self._books.clients[client.number]
                for model in self._books.models.values():
                    model.holders.discard(client.number)
                    if not model.holders:
                        model.orphaned_since = time.monotonic()
                for leaving in self._books.leaving.values():
                    leaving.discard(client.number)
            for request in client.abandoned():
                self._worker.handle(Cancel(request))

    def _release(self, client: Client) -> None:
        while self._books.clients.get(client.number) is client:
            if not client.wait_for_release(BEAT_S):
                client.send(Beat(self._worker.busy_seconds))

    def _pulse(self) -> None:
        while True:
            if self._first.wait_for_release(BEAT_S):
                continue
            self._first.send(Beat(self._worker.busy_seconds))
            self._unload_orphans()

    def _unload_orphans(self) -> None:
        with self._lock:
            before = time.monotonic() - _ORPHANED_S
            models = self._books.models
            for key in [key for key, model in models.items() if (model.orphaned_since or before) < before]:
                del models[key]
                self._worker.handle(Unload(key))

    # ---- commands

    def _handle(self, client: Client, command: ToEngine) -> None:
        match command:
            case LoadModel():
                self._load(client, command)
            case Unload():
                self._unload(client, command)
            case Stop() if client is not self._first:
                client.stop()
                self._finish(client)
            case Infer():
                self._worker.accept(command)
            case Counted():  # before anybody else can ask
                self._counters.begin(command.models)
                threading.Thread(target=self._take_in, name="attach", daemon=True).start()
            case Release():
                raise TypeError("the client's own business")
            case _:
                self._worker.handle(command)
                if isinstance(command, Cancel):
                    self._finish(client)

    def _finish(self, client: Client) -> None:
        if client.is_finished():
            client.send(Stopped())

    def _load(self, client: Client, command: LoadModel) -> None:
        with self._lock:
            model = self._books.models.get(command.key)
            if model is None:
                self._books.models[command.key] = _Model({client.number})
                self._worker.handle(command)
                return
            model.holders.add(client.number)
            model.orphaned_since = None
            if model.ready is not None:
                client.send(model.ready)

    def _unload(self, client: Client, command: Unload) -> None:
        with self._lock:
            model = self._books.models.get(command.key)
            if model is not None:
                model.holders.discard(client.number)
                if model.holders:  # the memory is theirs; who has let it go waits for nobody, and may come back
                    client.send(Unloaded(command.key))
                    return
                del self._books.models[command.key]
            self._books.leaving[command.key].add(client.number)
            self._worker.handle(command)

    # ---- reports

    def _report(self, reports: Sequence[Report]) -> None:
        """Any thread of the worker: to each client what is for it, in one write."""
        if isinstance(reports[0], ModelReady | Unloaded):
            gc.unfreeze()
            gc.collect()
            gc.freeze()  # what loading left behind is not looked at again and again
        with self._lock:
            clients = dict(self._books.clients)
            sorted_: defaultdict[int, list[Report]] = defaultdict(list)
            if isinstance(reports[0], StatsReport | Unloaded):  # results come by many, these alone
                reports = [self._lasting(report) for report in reports]
            for report in reports:
                for number in self._addressees(report):
                    sorted_[number].append(report)
        for number, own in sorted(sorted_.items()):  # the first client knows of every count before others do
            client = clients.get(number)
            if client is None:
                continue
            client.report(own)
            client.settle(own)
            self._finish(client)

    def _lasting(self, report: Report) -> Report:
        """The report, counts with those of the processes before. Called with the lock."""
        if isinstance(report, Unloaded):
            self._counters.forget(report.key)
        return self._counters.report(report) if isinstance(report, StatsReport) else report

    def _addressees(self, report: Report) -> list[int]:
        """Who a report is for. Called with the lock."""
        books = self._books
        match report:
            case InferResult() | InferFailed() | ProfileReport():
                return [client_of(report.id)]
            case StatsReport():
                return sorted({FIRST_CLIENT, client_of(report.id)})
            case BatchDone():
                return [client_of(report.request)]
            case ModelReady():
                model = books.models.get(report.key)
                if model is not None:
                    model.ready = report
                return sorted(model.holders) if model is not None else []
            case LoadFailed():
                model = books.models.pop(report.key, None)
                return sorted(model.holders) if model is not None else []
            case Unloaded():
                return sorted(books.leaving.pop(report.key, set()))
            case _:
                return [FIRST_CLIENT]

    def _lost(self, reason: str) -> None:
        """The device has failed for good, and what is in flight fails when this process ends; a new one may use it."""
        for client in list(self._books.clients.values()):
            client.send(Dying(reason))
        os._exit(EXIT_LOST)


class _Forward(logging.Handler):
    """Sends log records to the HTTP process, which writes them in its own format."""

    def __init__(self, send: Callable[[FromEngine], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        self._send(LogLine(record.levelno, record.name, text))


def _named(path: str) -> Callable[[], EngineModule]:
    """The engine behind "module:callable", imported when it is first called, and called once."""
    found: list[EngineModule] = []

    def engine() -> EngineModule:
        if not found:
            module, _, name = path.partition(":")
            found.append(getattr(importlib.import_module(module), name)())
        return found[0]

    return engine


def main() -> None:
    """Serve the process that started this one; never returns."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    arguments = ChildArguments.from_list(sys.argv[1:])
    logging.basicConfig(level=arguments.log_level, handlers=[])
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    Child(arguments).run()
    os._exit(0)  # a run of the engine cannot be interrupted, and Python would wait for its thread


if __name__ == "__main__":
    main()
