"""`python -m service.workers.child`: the engine worker in a process of its own. Started by process.py alone.

Threads besides the worker's own: the main one reads commands, `pulse` sends heartbeats and gives shared memory back.
The process ends when its socket does, whatever the reason; signals are for the HTTP process, which decides what they
mean.
"""

import gc
import importlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.workers.engine_api import EngineModule
from service.workers.engine_worker import EngineWorker
from service.workers.messages import FailureCode, InferFailed, InferResult, ModelReady, Report, Unloaded
from service.workers.shared_memory import Blocks, Leases, RegionFull, map_region
from service.workers.wire import Beat, Dying, FrameReader, FromEngine, LogLine, Release, Starved, decode_command, encode

BEAT_S = 1.0
EXIT_LOST = 70  # EX_SOFTWARE
_RECEIVE_BYTES = 256 << 10
_WAIT_FOR_MEMORY_S = 30.0
_SWITCH_INTERVAL_S = 0.0005

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChildArguments:
    """The command line: file descriptors it inherits, the engine as "module:callable", the level of the log."""

    socket: int
    requests: int
    answers: int
    engine: str
    log_level: int

    def to_list(self) -> list[str]:
        """As command-line arguments."""
        return [str(self.socket), str(self.requests), str(self.answers), self.engine, str(self.log_level)]

    @classmethod
    def from_list(cls, arguments: Sequence[str]) -> "ChildArguments":
        """From command-line arguments."""
        socket_, requests, answers, engine, level = arguments
        return cls(int(socket_), int(requests), int(answers), engine, int(level))


class Child:
    """The worker and its end of the socket."""

    def __init__(self, arguments: ChildArguments) -> None:
        self._socket = socket.socket(fileno=arguments.socket)
        self._sending = threading.Lock()
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()  # its put() is safe wherever an array dies
        self._leases = Leases(map_region(arguments.requests), self._ended.put)
        self._blocks = Blocks(map_region(arguments.answers))
        os.close(arguments.requests)
        os.close(arguments.answers)
        self._worker = EngineWorker(_named(arguments.engine), self._report, self._lost)

    def run(self) -> None:
        """Serve until the socket ends."""
        logging.getLogger().addHandler(_Forward(self._send))
        self._worker.start()
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()
        frames = FrameReader()
        while data := self._socket.recv(_RECEIVE_BYTES):
            for text, payload in frames.feed(data):
                self._handle(text, payload)

    def _handle(self, text: bytes, payload: bytes) -> None:
        """One command; nothing here keeps its tensors alive until the next one comes."""
        command = decode_command(text, payload, self._leases)
        if isinstance(command, Release):
            self._blocks.give_back(command.start)
        else:
            self._worker.handle(command)

    def _pulse(self) -> None:
        while True:
            try:
                self._send(Release(self._ended.get(timeout=BEAT_S)))
            except queue.Empty:
                self._send(Beat(self._worker.busy_seconds))

    def _report(self, reports: Sequence[Report]) -> None:
        """Any thread of the worker: all reports in one write, unless answers have to wait for memory, which may be that
        of answers before them."""
        if isinstance(reports[0], ModelReady | Unloaded):
            gc.unfreeze()
            gc.collect()
            gc.freeze()  # what loading left behind is not looked at again and again
        ready: list[bytes] = []
        for report in reports:
            try:
                ready.append(encode(report, self._blocks))
            except RegionFull:
                self._send_bytes(b"".join((*ready, encode(Starved(), self._blocks))))
                ready = [self._encoded_late(report)]
        self._send_bytes(b"".join(ready))

    def _encoded_late(self, report: Report) -> bytes:
        """The report once there is memory for it; where there never is, that the request failed."""
        try:
            return encode(report, self._blocks, _WAIT_FOR_MEMORY_S)
        except RegionFull as error:
            assert isinstance(report, InferResult), "only answers are large"
            reason = f"the answer needs {error.nbytes} bytes of shared memory; raise --transfer-bytes or ask for less"
            if not error.never:
                reason = "the shared memory is full of answers that are not sent yet"
            code = FailureCode.TOO_LARGE if error.never else FailureCode.OVERLOADED
            return encode(InferFailed(report.id, code, reason, None if error.never else 1.0), self._blocks)

    def _send(self, message: FromEngine) -> None:
        self._send_bytes(encode(message, self._blocks))

    def _send_bytes(self, data: bytes) -> None:
        try:
            with self._sending:
                self._socket.sendall(data)
        except OSError:
            os._exit(0)  # the HTTP process is gone

    def _lost(self, reason: str) -> None:
        """The device has failed for good, and what is in flight fails when this process ends; a new one may use it."""
        self._send(Dying(reason))
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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    arguments = ChildArguments.from_list(sys.argv[1:])
    logging.basicConfig(level=arguments.log_level, handlers=[])
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    Child(arguments).run()
    os._exit(0)  # a run of the engine cannot be interrupted, and Python would wait for its thread


if __name__ == "__main__":
    main()
