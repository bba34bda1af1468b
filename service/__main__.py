"""`python -m service`: settings, sockets, one HTTP process or several. Exit status 0 after a drain, 2 for a wrong
setting, 1 for a taken port or a GPU that was asked for and cannot be used."""

import logging
import os
import socket
import sys
from collections.abc import Callable

from service.access import read_access
from service.app import create_app
from service.logs import configure
from service.server import run_server, spare_the_collector
from service.settings import Settings, SettingsError, read_settings, unknown_variables
from service.supervisor import supervise
from service.tracing import Tracer
from service.workers.engine_api import EngineModule, import_path, real_engine, why_unusable

log = logging.getLogger("service")


def _bind(settings: Settings) -> list[socket.socket]:
    """A socket for each HTTP process, all at the same address. Of several the kernel gives each its share of the
    connections; those of one that is started again wait for it. Raises OSError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    first = socket.socket(family, socket.SOCK_STREAM)
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    first.bind((settings.host, settings.port))
    if settings.frontends < 2:
        return [first]
    address = first.getsockname()
    first.close()  # it had to be free: sockets that share a port would share it with another server's, too
    sockets = []
    for _ in range(settings.frontends):
        shared = socket.socket(family, socket.SOCK_STREAM)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind(address)
        sockets.append(shared)
    return sockets


def serve(settings: Settings, engine: Callable[[], EngineModule] = real_engine) -> int:
    """Serve until SIGTERM or SIGINT; the process's exit status. Raises SettingsError."""
    configure(settings.log_level, settings.log_format)
    for name, closest in unknown_variables(os.environ).items():
        hint = f"did you mean {closest}?" if closest else "see --help"
        log.warning("environment variable %s is no setting of this service; %s", name, hint)
    access = read_access(settings)
    if settings.frontends and settings.traces_endpoint:
        Tracer(settings.traces_endpoint).close()  # or every front end would find out that packages are missing
    problem = why_unusable(settings.device, engine)
    if problem:
        print(f"--device {settings.device}: {problem}", file=sys.stderr)
        return 1
    try:
        listeners = _bind(settings)
    except OSError as error:
        print(
            f"--host/--port: cannot listen on {settings.host}:{settings.port}: {error.strerror}; choose another",
            file=sys.stderr,
        )
        return 1
    host, port = listeners[0].getsockname()[:2]
    if settings.frontends:
        log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        return supervise(settings, access, import_path(engine), listeners)
    app = create_app(settings, engine, spare_the_collector)
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    run_server(app, settings, listeners[0])
    return 0


def main() -> int:
    """Read the settings and serve."""
    try:
        return serve(read_settings(sys.argv[1:]))
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
