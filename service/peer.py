"""Questions and answers between the supervisor and a front end: JSON lines over a socket, both sides may ask. Event
loop only; nothing of a request passes here.
"""

import asyncio
import itertools
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

log = logging.getLogger(__name__)

_LONGEST_LINE = 256 << 20  # the metrics of thousands of models

Handler = Callable[[str, Any], Awaitable[Any]]


class PeerGone(Exception):
    """The other side does not answer any more."""


class Peer:
    """One side. `handle` answers the other side's questions; an exception of it is the other side's `PeerError`."""

    def __init__(self, handle: Handler) -> None:
        self._handle = handle
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self, end: socket.socket) -> None:
        """Take this side's end of the socket: `ask` can be called from now on."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=end, limit=_LONGEST_LINE)

    async def run(self) -> None:
        """Talk until the other side is gone; after `connect`."""
        assert self._reader is not None
        try:
            while line := await self._reader.readline():
                self._receive(orjson.loads(line))
        except (ConnectionError, ValueError):
            pass
        finally:
            self.close()

    def close(self) -> None:
        """End the conversation."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(PeerGone())
                future.exception()  # nobody may wait any more
        self._waiting.clear()

    async def ask(self, kind: str, content: Any = None, timeout: float | None = None) -> Any:
        """The other side's answer. Raises PeerGone, TimeoutError, RuntimeError with the other side's error."""
        if self._writer is None:
            raise PeerGone
        number = next(self._ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._send([number, kind, content])
        try:
            async with asyncio.timeout(timeout):
                return await future
        finally:
            self._waiting.pop(number, None)

    def tell(self, kind: str, content: Any = None) -> None:
        """Like `ask`, for what needs no answer."""
        self._send([0, kind, content])

    def _send(self, message: list[Any]) -> None:
        if self._writer is not None:
            self._writer.write(orjson.dumps(message) + b"\n")

    def _receive(self, message: list[Any]) -> None:
        number, kind, content = message
        if kind in ("answer", "error"):
            future = self._waiting.get(number)
            if future is not None and not future.done():
                if kind == "answer":
                    future.set_result(content)
                else:
                    future.set_exception(RuntimeError(content))
            return
        task = asyncio.get_running_loop().create_task(self._answer(number, kind, content))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, number: int, kind: str, content: Any) -> None:
        try:
            result = await self._handle(kind, content)
        except Exception as error:
            if not number:
                log.error("a message of another process could not be handled", exc_info=error)
            self._send([number, "error", f"{type(error).__name__}: {error}"])
            return
        if number:
            self._send([number, "answer", result])
