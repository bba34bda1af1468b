"""The worker in a process of its own: starts it, talks to it, notices its end, starts it again. Event loop only.

What a child's end means: requests in flight fail at once, `WorkerLost` tells the service that no model is loaded, and
after a pause that grows with every failure a new child gets the same models to load. A model whose loading ends the
child again and again is given up, so that the others can be served.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.workers.child import ChildArguments
from service.workers.counters import LastingCounters
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
    Report,
    Stats,
    StatsReport,
    Stop,
    Stopped,
    Unload,
    WorkerLost,
)
from service.workers.shared_memory import Blocks, RegionFull, create_region, map_region
from service.workers.wire import Beat, Dying, FromEngine, LogLine, Release, Starved

log = logging.getLogger(__name__)

_ROOT = Path(__file__).parent.parent.parent
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 30.0
_HEALTHY_S = 60.0  # a child that lived this long had no trouble of its own starting
_MOST_CRASHES = 3  # while loading the same model
_WATCH_EVERY_S = 1.0
_LAST_WAIT_S = 3.0  # a driver needs a while to let go of a GPU
_LONGEST_LINE = 4000


@dataclass(frozen=True, slots=True)
class ProcessOptions:
    """`engine` is "module:callable"; `transfer_bytes` bounds the shared memory of each direction. A child that says
    nothing for `silence_s`, or computes one batch for `stuck_s`, is ended."""

    engine: str
    transfer_bytes: int
    silence_s: float = 30.0
    stuck_s: float = 120.0


class ProcessTransport:
    """One worker in a child process."""

    def __init__(self, options: ProcessOptions) -> None:
        self._options = options
        self._receive: Callable[[Report], None] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._blocks: Blocks | None = None
        self._models: dict[ModelKey, LoadModel] = {}
        self._loading: dict[ModelKey, None] = {}
        self._crashes: dict[ModelKey, int] = {}
        self._in_flight: set[int] = set()
        self._counters = LastingCounters()
        self._heard = 0.0
        self._last_words = ""
        self._killed = self._crashed = False  # this child: by us; before it was to end
        self._stopping = False
        self._stopped = False

    # ---- the service's side

    def start(self, receive: Callable[[Report], None]) -> None:
        """Begin on the running event loop."""
        self._receive = receive
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise())

    def send(self, command: Command) -> None:
        """Hand a command over, or answer it here where there is no child."""
        match command:
            case LoadModel():
                self._models[command.key] = command
            case Unload():
                self._models.pop(command.key, None)
                self._counters.forget(command.key)
            case Stop():
                self._stopping = True
            case Cancel():
                self._in_flight.discard(command.id)
        if self._link is None:
            self._answer_alone(command)
        else:
            self._forward(self._link, command)

    def close(self) -> None:
        """End the child, whatever it is doing."""
        self._stopping = self._stopped = True
        if self._supervisor is not None:
            self._supervisor.cancel()
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            self._reap(self._process)  # it goes by itself when its socket ends
            self._tell_end(self._process)

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        return self._process.pid if self._process is not None and self._link is not None else None

    @property
    def shared_bytes(self) -> int:
        """Bytes of tensors on their way to the child or in use there."""
        return self._blocks.used if self._blocks is not None else 0

    def _answer_alone(self, command: Command) -> None:
        match command:
            case Infer():
                reason = "the engine process is being restarted"
                self._deliver(InferFailed(command.id, FailureCode.WORKER_LOST, reason, 1.0))
            case Stats():
                self._deliver(self._counters.report(StatsReport(command.id, ())))
            case Stop():
                self._stopped = True
                self._deliver(Stopped())

    def _forward(self, link: Link, command: Command) -> None:
        if isinstance(command, Infer):
            self._in_flight.add(command.id)
        elif isinstance(command, LoadModel):
            self._loading[command.key] = None
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

    # ---- the child's side

    def _hear(self, message: FromEngine) -> None:
        """A message of the child."""
        self._heard = time.monotonic()
        match message:
            case Release():
                if self._blocks is not None:
                    self._blocks.give_back(message.start)
                return
            case Beat():
                if message.busy_seconds > self._options.stuck_s:
                    self._kill(f"one batch has been computing for {message.busy_seconds:.0f} s")
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
            case StatsReport():
                message = self._counters.report(message)
            case Stopped():
                self._stopped = True
        self._deliver(message)

    def _kill(self, reason: str) -> None:
        log.error("the engine process hangs and is ended: %s", reason)
        self._last_words = reason
        if self._process is not None:
            self._killed = True
            self._process.kill()

    def _lost(self) -> None:
        """The socket has ended, and the child with it or soon."""
        self._link = self._blocks = None
        self._counters.retire()
        if self._stopped:
            return
        self._crashed = True
        cause = f": {self._last_words}" if self._last_words else ""
        reason = f"the engine process ended unexpectedly{cause}"
        next_ = "the server is shutting down" if self._stopping else "it is being restarted"
        for request in sorted(self._in_flight):
            self._deliver(InferFailed(request, FailureCode.WORKER_LOST, f"{reason}; {next_}", 1.0))
        self._in_flight.clear()
        self._deliver(WorkerLost(reason, restarting=not self._stopping))
        if self._stopping:
            self._stopped = True
            self._deliver(Stopped())
        else:
            self._blame()

    def _blame(self) -> None:
        """The child loads one model at a time: the first without a report was at it when the child ended."""
        suspect = next(iter(self._loading), None)
        self._loading.clear()
        if suspect is None:
            return
        self._crashes[suspect] = self._crashes.get(suspect, 0) + 1
        if self._crashes[suspect] >= _MOST_CRASHES and self._models.pop(suspect, None) is not None:
            self._deliver(LoadFailed(suspect, f"loading it ended the engine process {_MOST_CRASHES} times"))

    # ---- its life

    async def _supervise(self) -> None:
        failures = 0
        while not self._stopped:
            began = time.monotonic()
            self._last_words = ""
            self._killed = self._crashed = False
            try:
                await self._live()
            except OSError as error:
                log.error("the engine process cannot be started: %s", error)
            failures = 1 if time.monotonic() - began > _HEALTHY_S else failures + 1
            if not self._stopped:
                await asyncio.sleep(min(_FIRST_PAUSE_S * 2 ** (failures - 1), _LONGEST_PAUSE_S))

    async def _live(self) -> None:
        """One child from its start to its end."""
        loop = asyncio.get_running_loop()
        near, far = socket.socketpair()
        with far, contextlib.ExitStack() as opened:
            inward, outward = (create_region(self._options.transfer_bytes) for _ in range(2))
            for descriptor in (inward, outward):
                opened.callback(os.close, descriptor)
            requests, answers = map_region(inward), map_region(outward)
            level = logging.getLogger().level
            arguments = ChildArguments(far.fileno(), inward, outward, self._options.engine, level)
            process = self._process = await loop.run_in_executor(None, _spawn, arguments)
        self._blocks = Blocks(requests)
        ended = asyncio.Event()
        link = Link(self._blocks, answers, self._hear, ended.set)
        await loop.create_unix_connection(lambda: link, sock=near)
        self._link, self._heard = link, time.monotonic()
        threading.Thread(target=_log_output, args=(process,), name="engine output", daemon=True).start()
        log.info("engine process %d started", process.pid)
        for command in self._models.values():
            self._forward(link, command)
        watch = loop.create_task(self._watch())
        try:
            await ended.wait()
        finally:
            watch.cancel()
            self._lost()
            await loop.run_in_executor(None, self._reap, process)
            self._tell_end(process)

    def _reap(self, process: "subprocess.Popen[bytes]") -> None:
        """Wait for a child whose socket has ended, not for ever. May run on two threads at once."""
        try:
            process.wait(_LAST_WAIT_S)
        except subprocess.TimeoutExpired:
            self._killed = True
            process.kill()
            process.wait()

    def _tell_end(self, process: "subprocess.Popen[bytes]") -> None:
        """Log how a child ended, once, whoever sees it first. One that crashes while it finishes was not stopped."""
        if process is not self._process:
            return
        self._process = None
        if self._crashed or (process.returncode and not self._killed):
            hint = "" if self._killed else "; the kernel does this where memory runs out"
            log.error("engine process %d ended: %s", process.pid, _said(process.returncode, hint))
        else:
            log.info("engine process %d was stopped", process.pid)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            silent = time.monotonic() - self._heard
            if silent > self._options.silence_s:
                self._kill(f"it has said nothing for {silent:.0f} s")
                return


def _spawn(arguments: ChildArguments) -> "subprocess.Popen[bytes]":
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    return subprocess.Popen(
        [sys.executable, "-m", "service.workers.child", *arguments.to_list()],
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(arguments.socket, arguments.requests, arguments.answers),
    )


def _said(status: int, after_kill: str) -> str:
    if status >= 0:
        return f"exit status {status}"
    return f"{signal.Signals(-status).name}{after_kill if -status == signal.SIGKILL else ''}"


def _log_output(process: "subprocess.Popen[bytes]") -> None:
    """What the child prints, most of all when it crashes, as lines of the log."""
    output = logging.getLogger("engine.output")
    assert process.stdout is not None
    with process.stdout as stream:
        while line := stream.readline(_LONGEST_LINE):
            output.warning("%s", line.decode(errors="replace").rstrip())
