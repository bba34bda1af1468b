"""`python -m service`: settings, socket, uvicorn, signals. Exit status 0 after a drain, 2 for a wrong setting, 1 for a
taken port or a GPU that was asked for and cannot be used."""

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Generator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.connection import limited
from service.logs import configure
from service.serving import Serving
from service.settings import Settings, SettingsError, read_settings, unknown_variables
from service.workers.engine_api import EngineModule, real_engine, why_unusable

log = logging.getLogger("service")

# Engine and HTTP share this process on a CPU. The default of 5 ms is how long a thread that wants the interpreter
# waits for one that is busy; answers of a few milliseconds need less.
_SWITCH_INTERVAL_S = 0.0005


class _Server(uvicorn.Server):
    """uvicorn, with a drain that begins at the signal and ends with exit status 0."""

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self._serving = serving

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle SIGTERM and SIGINT; unlike uvicorn's own, do not raise them again at the end."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second SIGINT ends at once."""
        log.info("%s: finishing accepted requests", signal.Signals(sig).name)
        self._serving.begin_drain()
        super().handle_exit(sig, frame)


def _spare_the_collector() -> None:
    """Take what loading left behind out of garbage collection: going over it again and again stops all threads for
    tens of milliseconds."""
    gc.collect()
    gc.freeze()


def _bind(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((settings.host, settings.port))
    return listener


def serve(settings: Settings, engine: Callable[[], EngineModule] = real_engine) -> int:
    """Serve until SIGTERM or SIGINT; the process's exit status."""
    configure(settings.log_level, settings.log_format)
    for name, closest in unknown_variables(os.environ).items():
        hint = f"did you mean {closest}?" if closest else "see --help"
        log.warning("environment variable %s is no setting of this service; %s", name, hint)
    problem = why_unusable(settings.device, engine)
    if problem:
        print(f"--device {settings.device}: {problem}", file=sys.stderr)
        return 1
    try:
        listener = _bind(settings)
    except OSError as error:
        print(
            f"--host/--port: cannot listen on {settings.host}:{settings.port}: {error.strerror}; choose another",
            file=sys.stderr,
        )
        return 1
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    app: FastAPI = create_app(settings, engine, _spare_the_collector)
    config = uvicorn.Config(
        app,
        http=limited(settings),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.drain_timeout,
    )
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    _Server(config, app.state.serving).run(sockets=[listener])
    if not app.state.serving.finished:
        logging.shutdown()
        os._exit(0)  # a run or a load of the engine cannot be interrupted, and Python would wait for its thread
    return 0


def main() -> int:
    """Read the settings and serve."""
    try:
        settings = read_settings(sys.argv[1:])
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    return serve(settings)


if __name__ == "__main__":
    sys.exit(main())
