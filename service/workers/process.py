"""The worker in a process of its own: starts it, notices its end, starts it again after a pause that grows with every
failure. Event loop only; what is said to it is in remote.py.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

from service.workers.child import ChildArguments
from service.workers.clients import Connection
from service.workers.link import Link
from service.workers.messages import Report
from service.workers.remote import RemoteTransport
from service.workers.shared_memory import create_region, map_region
from service.workers.wire import Counted

log = logging.getLogger(__name__)

_ROOT = Path(__file__).parent.parent.parent
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 30.0
_HEALTHY_S = 60.0  # a child that lived this long had no trouble of its own starting
_LAST_WAIT_S = 3.0  # a driver needs a while to let go of a GPU
_LONGEST_LINE = 4000


@dataclass(frozen=True, slots=True)
class ProcessOptions:
    """`engine` is "module:callable"; `transfer_bytes` bounds the shared memory of each direction; a light batch takes
    `light_run_us` microseconds at most. A child that says nothing for `silence_s`, or computes one batch for
    `stuck_s`, is ended."""

    engine: str
    transfer_bytes: int
    light_run_us: int = 0
    silence_s: float = 30.0
    stuck_s: float = 120.0


class ProcessTransport(RemoteTransport):
    """One worker in a child process. `on_started` gets the socket through which a child takes in front ends."""

    def __init__(self, options: ProcessOptions, on_started: Callable[[socket.socket], None] = lambda _: None) -> None:
        super().__init__()
        self._options = options
        self._on_started = on_started
        self._supervisor: asyncio.Task[None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = self._crashed = False  # this child: by us; before it was to end

    def start(self, receive: Callable[[Report], None]) -> None:
        """Begin on the running event loop."""
        self._receive = receive
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise())

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

    def _begin(self, link: Link) -> None:
        """The first thing that a child is told is what those before it have counted."""
        link.send(Counted(self._counted))
        super()._begin(link)

    def _beat(self, busy_seconds: float) -> None:
        if busy_seconds > self._options.stuck_s:
            self._kill(f"one batch has been computing for {busy_seconds:.0f} s")

    def _kill(self, reason: str) -> None:
        log.error("the engine process hangs and is ended: %s", reason)
        self._last_words = reason
        if self._process is not None:
            self._killed = True
            self._process.kill()

    def _lost(self) -> None:
        self._crashed = not self._stopped  # before what is delivered makes the server close this
        super()._lost()

    # ---- its life

    async def _supervise(self) -> None:
        failures = 0
        while not self._stopped:
            began = time.monotonic()
            self._killed = self._crashed = False
            try:
                await self._live()
            except OSError as error:
                log.error("the engine process cannot be started: %s", error)
            except Exception:  # a bug must not leave the server without an engine process
                log.exception("the engine process is given up and another one is started")
            failures = 1 if time.monotonic() - began > _HEALTHY_S else failures + 1
            if not self._stopped:
                await asyncio.sleep(min(_FIRST_PAUSE_S * 2 ** (failures - 1), _LONGEST_PAUSE_S))

    async def _live(self) -> None:
        """One child from its start to its end."""
        loop = asyncio.get_running_loop()
        near, far = socket.socketpair()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far, theirs, contextlib.ExitStack() as opened:
            inward, outward = (create_region(self._options.transfer_bytes) for _ in range(2))
            for descriptor in (inward, outward):
                opened.callback(os.close, descriptor)
            requests, answers = map_region(inward), map_region(outward)
            level = logging.getLogger().level
            connection = Connection(far.fileno(), inward, outward)
            options = self._options
            arguments = ChildArguments(connection, theirs.fileno(), options.engine, level, options.light_run_us)
            process = self._process = await loop.run_in_executor(None, _spawn, arguments)
        ended = asyncio.Event()
        link = self._make_link(requests, answers, ended.set)
        await loop.create_unix_connection(lambda: link, sock=near)
        threading.Thread(target=_log_output, args=(process,), name="engine output", daemon=True).start()
        log.info("engine process %d started", process.pid)
        try:
            await self._use(link, ended, lambda: self._on_started(ours))
        finally:
            ours.close()
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
            log.error("engine process %d ended: %s", process.pid, said(process.returncode, self._killed))
        else:
            log.info("engine process %d was stopped", process.pid)

    def _endure(self, silent_s: float) -> None:
        if silent_s > self._options.silence_s and not self._killed:
            self._kill(f"it has said nothing for {silent_s:.0f} s")


def search_path() -> str:
    """Where a process that is started finds this package, and what this one finds."""
    return os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))


def _spawn(arguments: ChildArguments) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "service.workers.child", *arguments.to_list()],
        env={**os.environ, "PYTHONPATH": search_path(), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(*astuple(arguments.connection), arguments.attach),
    )


def said(status: int, killed: bool = False) -> str:
    """An exit status in words; `killed`: by this server."""
    if status >= 0:
        return f"exit status {status}"
    hint = "; the kernel does this where memory runs out" if -status == signal.SIGKILL and not killed else ""
    return f"{signal.Signals(-status).name}{hint}"


def _log_output(process: "subprocess.Popen[bytes]") -> None:
    """What the child prints, most of all when it crashes, as lines of the log."""
    output = logging.getLogger("engine.output")
    assert process.stdout is not None
    with process.stdout as stream:
        while line := stream.readline(_LONGEST_LINE):
            output.warning("%s", line.decode(errors="replace").rstrip())
