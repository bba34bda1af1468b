"""A connection whose small requests go directly (`direct.py`): it holds them back from ASGI until their body is there,
and writes an answer in one piece.

Most bodies come with the header. One that takes longer goes through ASGI, with what has come of it: there are the
limits of time, the back pressure, the answers to `Expect: 100-continue`.
"""

import asyncio
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from service.connection import Connection
from service.direct import Direct, DirectRequest
from service.exchange import RawHeaders
from service.settings import Settings

_BODY_S = 0.05  # how long a request is held back at most


class DirectConnection(Connection):
    """A connection with a direct way to `direct`."""

    direct: Direct

    _held: tuple[DirectRequest, RequestResponseCycle, Any] | None = None  # with the app it may go to
    _body = b""  # what there is of its body
    _patience: asyncio.TimerHandle | None = None
    _running: DirectRequest | None = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """A header is there, or a pipelined request has its turn."""
        if cycle is self.cycle and cycle.more_body and not (cycle.body or cycle.waiting_for_100_continue):
            found = None if self.flow.write_paused else self.direct.find(cycle.scope)
            if found is not None:
                self._held = found, cycle, app
                self._body = b""
                return
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        super().data_received(data)
        if self._held is not None and self._patience is None:
            self._patience = self.loop.call_later(_BODY_S, self._let_go)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self._held is None:
            super().on_body(body)
        else:
            self._unread = 0
            self._body = self._body + body if self._body else body

    def on_message_complete(self) -> None:
        """The request is whole."""
        super().on_message_complete()
        if self._held is None:
            return
        request, cycle, _ = self._held
        self._stop_holding()
        self._running, body, self._body = request, self._body, b""
        request.begin(body, partial(self._answer, cycle))

    def _let_go(self) -> None:
        """The body takes its time, or will never be whole."""
        if self._held is not None:
            _, cycle, app = self._held
            self._stop_holding()
            cycle.body += self._body
            self._body = b""
            super()._start_asgi_task(cycle, app)

    def _stop_holding(self) -> None:
        self._held = None
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _answer(self, cycle: RequestResponseCycle, status: int, headers: RawHeaders, body: bytes) -> None:
        """Write an answer, and be ready for the next request."""
        self._running = None
        if self.transport.is_closing():
            return
        lines = [STATUS_LINE[status]]
        for name, value in (*self.server_state.default_headers, *headers):
            lines += (name, b": ", value, b"\r\n")
            if name == b"connection":
                cycle.keep_alive = False  # "close" is all that an answer says there
        if not cycle.keep_alive and (b"connection", b"close") not in headers:
            lines.append(b"connection: close\r\n")
        self.transport.write(b"".join((*lines, b"content-length: %d\r\n\r\n" % len(body), body)))
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            cycle.transport.close()
        self.on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        super().connection_lost(exc)
        self._let_go()
        if self._running is not None:
            self._running.gone()
            self._running = None


def connections(settings: Settings, direct: Direct) -> type[DirectConnection]:
    """The class that uvicorn makes connections of."""

    class Limited(DirectConnection):
        max_connections = settings.max_connections
        max_header_bytes = settings.max_header_bytes
        header_timeout = settings.header_timeout
        linger_bytes = 2 * settings.max_body_bytes
        linger_timeout = settings.body_timeout

    Limited.direct = direct
    return Limited
