"""One HTTP process from its listening socket to its exit: uvicorn, signals, garbage collection. Called by `__main__`
for a server that is one process, and by `frontend.py` for each of several."""

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Generator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.access import Access
from service.direct_connection import connections
from service.serving import Serving
from service.settings import Settings

log = logging.getLogger(__name__)

# Engine and HTTP share this process on a CPU. The default of 5 ms is how long a thread that wants the interpreter
# waits for one that is busy; answers of a few milliseconds need less.
_SWITCH_INTERVAL_S = 0.0005
# More than the requests of many connections make before they are answered. With the default, 700, the collector went
# over all that had come every sixteen requests: a tenth of what they cost this thread (measured with 64 connections).
_YOUNG_OBJECTS = 10_000
_OTHER_FILES = 512  # models, libraries, connections that are being refused


class _Server(uvicorn.Server):
    """uvicorn, with a drain that begins at the signal and ends with exit status 0."""

    def __init__(self, config: uvicorn.Config, serving: Serving, access: Access) -> None:
        super().__init__(config)
        self._serving = serving
        self._access = access

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle SIGTERM and SIGINT; unlike uvicorn's own, do not raise them again at the end."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self.handle_reload)
        self._serving.end_server = lambda: self.handle_exit(signal.SIGTERM, None)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_reload(self, sig: int, frame: FrameType | None) -> None:
        """Follow the model repository's folder, and read the API keys again."""
        log.info("%s: looking for changes in the model repository and the API keys", signal.Signals(sig).name)
        loop = asyncio.get_running_loop()
        for call in (self._access.reload, self._serving.refresh):
            loop.call_soon_threadsafe(call)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second SIGINT ends at once."""
        log.info("%s: finishing accepted requests", signal.Signals(sig).name)
        self._serving.begin_drain()
        super().handle_exit(sig, frame)


def spare_the_collector() -> None:
    """Take what loading left behind out of garbage collection: going over it again and again stops all threads for
    tens of milliseconds. What an unloaded model left is looked at once more."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def allow_connections(count: int) -> int:
    """Raise this process's limit on open files, which is often 1,024, to what `count` connections need. How many it can
    have; where those are fewer than `count`, that is said aloud."""
    needed = count + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return count
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    possible = max(allowed - _OTHER_FILES, allowed // 2)
    if possible < count:
        log.warning(
            "this process may open %d files, too few for --max-connections %d: it takes %d connections; raise the "
            "limit (ulimit -Hn)",
            allowed,
            count,
            possible,
        )
    return min(count, possible)


def run_server(app: FastAPI, settings: Settings, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT. Does not return where a run of the engine outlasts the drain."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    settings = settings.model_copy(update={"max_connections": allow_connections(settings.max_connections)})
    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])
    config = uvicorn.Config(
        app,
        http=connections(settings, app.state.direct),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.drain_timeout,
    )
    _Server(config, app.state.serving, app.state.access).run(sockets=[listener])
    if not app.state.serving.finished:
        logging.shutdown()
        os._exit(0)  # a run or a load of the engine cannot be interrupted, and Python would wait for its thread
