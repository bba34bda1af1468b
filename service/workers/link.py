"""The HTTP process's end of the socket to an engine process: bytes in, messages out, shared memory both ways.

Runs on the event loop; arrays of answers may die on any thread.
"""

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import cast

from service.workers.shared_memory import Blocks, Bytes, Leases
from service.workers.wire import FrameReader, FromEngine, Release, ToEngine, WireError, decode_report, encode

log = logging.getLogger(__name__)


class Link(asyncio.Protocol):
    """One connection. `on_message` gets what comes, `on_end` is called once when it is over."""

    def __init__(
        self, blocks: Blocks, answers: Bytes, on_message: Callable[[FromEngine], None], on_end: Callable[[], object]
    ) -> None:
        self._blocks = blocks
        self._leases = Leases(answers, self._answer_read)
        self._on_message = on_message
        self._on_end = on_end
        self._frames = FrameReader()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._read: deque[int] = deque()
        self.fault = ""
        """What of the other side's could not be read, where that has ended the connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is ours."""
        self._transport = cast(asyncio.Transport, transport)  # which uvloop's only looks like

    def data_received(self, data: bytes) -> None:
        """Bytes of the child."""
        try:
            for text, payload in self._frames.feed(data):
                self._on_message(decode_report(text, payload, self._leases))
        except WireError as error:
            self.fault = f"what it says cannot be read: {error}"
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """The child has closed its end, or died."""
        self._transport = None
        self._on_end()

    def send(self, message: ToEngine) -> None:
        """Send a message. Raises RegionFull where its tensors do not fit the shared memory now."""
        if self._transport is not None:
            self._transport.write(encode(message, self._blocks))

    def close(self) -> None:
        """End the connection, and with it the child: now, not when the event loop comes to it."""
        if self._transport is not None:
            with socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)
            self._transport.abort()

    def _answer_read(self, start: int) -> None:
        """Nobody looks at a block of answers any more; may be called on any thread, within anything."""
        self._read.append(start)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._release)

    def _release(self) -> None:
        while self._read:
            self.send(Release(self._read.popleft()))
