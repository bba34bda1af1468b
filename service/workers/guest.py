"""A worker that several front ends share: this end's connections come from the supervisor, one after the other as
engine processes live and die, or as this end asks for another one. Event loop only; what is said to the worker is in
remote.py.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable

from service.workers.clients import Connection
from service.workers.messages import Report
from service.workers.remote import RemoteTransport
from service.workers.shared_memory import map_region

log = logging.getLogger(__name__)

_LONG_PAUSE_S = 1.0
_PAUSE_S = 0.1  # before another connection is asked for: an engine process that dies takes a moment to be seen to


class GuestTransport(RemoteTransport):
    """One front end's way to the engine process. `connections` is where the supervisor's descriptors arrive, with the
    number of the connection, which `on_end` gets when it has ended. Where the engine process lives on (it said what
    this process cannot read, or could not read what this one said), nobody else can know that another is needed."""

    def __init__(self, connections: socket.socket, on_end: Callable[[int], None]) -> None:
        super().__init__()
        self._connections = connections
        self._on_end = on_end
        self._waiter: asyncio.Task[None] | None = None

    def start(self, receive: Callable[[Report], None]) -> None:
        """Begin on the running event loop."""
        self._receive = receive
        self._waiter = asyncio.get_running_loop().create_task(self._wait())

    def close(self) -> None:
        """Leave the worker to the others."""
        self._stopping = self._stopped = True
        if self._waiter is not None:
            self._waiter.cancel()
        if self._link is not None:
            self._link.close()

    async def _wait(self) -> None:
        """One connection after the other. One that cannot be used, whatever the reason, costs a pause."""
        loop = asyncio.get_running_loop()
        while (found := await self._next()) is not None:  # None: the supervisor is gone, and this process goes, too
            number, descriptors = found
            pause = _PAUSE_S
            try:
                await self._join(Connection.of(descriptors))
            except OSError as error:
                log.error("there is no connection to the engine process: %s", error)
                pause = _LONG_PAUSE_S
            except Exception:  # a bug must not leave this process without a connection for ever
                log.exception("the connection to the engine process is given up")
                pause = _LONG_PAUSE_S
            loop.call_later(pause, self._on_end, number)

    async def _join(self, connection: Connection) -> None:
        """One connection to its end. Raises OSError where this process may open no more files."""
        end = socket.socket(fileno=connection.socket)
        try:
            requests, answers = map_region(connection.requests), map_region(connection.answers)
        except OSError:
            end.close()
            raise
        finally:
            for descriptor in (connection.requests, connection.answers):
                os.close(descriptor)
        ended = asyncio.Event()
        link = self._make_link(requests, answers, ended.set)
        await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=end)
        await self._use(link, ended)

    def _lost(self) -> None:
        super()._lost()
        self._counted = ()  # others may have heard of more since; the next engine process knows

    async def _next(self) -> tuple[int, list[int]] | None:
        """The next connection's number and the descriptors that have come of it."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._connections.fileno(), readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._connections.fileno())
        data, descriptors, _, _ = socket.recv_fds(self._connections, 64, 3)
        return (int(data), descriptors) if data else None
