"""A connection whose small requests go directly (`direct.py`): it holds them back from ASGI until their body is there,
and writes an answer in one piece.

Most bodies come with the header. One that takes longer goes through ASGI, with what has come of it: there are the
limits of time, the back pressure, the answers to `Expect: 100-continue`.

Most clients send the same header with every request of a connection, but for the length of the body. One that is, byte
for byte, that of the request before, but for these digits, says what that one said: it is not parsed again.
"""

import asyncio
import re
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from service.connection import Connection
from service.direct import Direct, DirectRequest
from service.exchange import RawHeaders
from service.settings import Settings

_BODY_S = 0.05  # how long a request is held back at most
_LARGEST_KNOWN = 2048  # bytes of a header that a connection remembers
_MOST_DIGITS = 7  # of a body that goes directly
_END_OF_HEADER = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)[ \t]*\r\n", re.IGNORECASE)


class _NoWaiter:
    """In the place of an event that nobody waits for."""

    def set(self) -> None:
        """Nothing to tell."""


class _Cycle:
    """What uvicorn and `Connection` ask of the request that a connection is at, where it goes directly."""

    __slots__ = ("disconnected", "keep_alive", "more_body", "response_complete", "response_started")
    scope: ClassVar = {"http_version": "1.1"}
    message_event: ClassVar = _NoWaiter()

    def __init__(self, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.more_body = True
        self.disconnected = self.response_started = self.response_complete = False


@dataclass(frozen=True, slots=True)
class _Known:
    """A request that went directly: its header as it was sent, up to the length of the body and from there on, and as
    it was understood. `request` never begins itself."""

    start: bytes
    rest: bytes
    request: DirectRequest

    @classmethod
    def of(cls, header: bytes, request: DirectRequest) -> "_Known | None":
        """None where the length is written in an odd way. The parser has seen to it that there is one."""
        found = _LENGTH.search(header)
        return cls(header[: found.start(1)], header[found.end(1) :], request) if found is not None else None

    def body(self, data: bytes) -> bytes | None:
        """The body, if `data` is a request with the same header and all of its body, which has another length
        perhaps."""
        if not data.startswith(self.start):
            return None
        begin = len(self.start)
        end = data.find(b"\r", begin, begin + _MOST_DIGITS + 1)
        digits = data[begin:end]
        if end < 0 or not digits.isdigit() or not data.startswith(self.rest, end):
            return None
        body = data[end + len(self.rest) :]
        return body if len(body) == int(digits) and self.request.takes(len(body)) else None


class DirectConnection(Connection):
    """A connection with a direct way to `direct`."""

    direct: Direct

    _known: _Known | None = None
    _data = b""  # what the parser is at, where a request begins with its first byte
    _held: DirectRequest | None = None
    _body: list[bytes]  # what there is of its body
    _patience: asyncio.TimerHandle | None = None
    _running: DirectRequest | None = None
    _idle_since = 0.0  # of the loop's time; 0 while there is a request
    _idle_timer: asyncio.TimerHandle | None = None

    def on_headers_complete(self) -> None:
        """The header is there."""
        held = self._find()
        if held is None:
            super().on_headers_complete()
            return
        self.begin_body()
        self._held, self._body = held, []
        self.cycle = _Cycle(self.parser.should_keep_alive() and not self.shutting_down)  # type: ignore[assignment]

    def _find(self) -> DirectRequest | None:
        parser = self.parser
        if parser.get_method() != b"POST" or parser.get_http_version() != "1.1" or parser.should_upgrade():
            return None
        if self._header_bytes > self.max_header_bytes or self.expect_100_continue or self.flow.write_paused:
            return None
        if self.cycle is not None and not self.cycle.response_complete:
            return None
        return self.direct.find(self.url, self.headers)

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        known = self._known
        if known is not None and self._is_free():
            body = known.body(data)
            if body is not None:
                self._begin_again(known, body)
                return
        self._data = b"" if self._begun or self._backlog else data
        super().data_received(data)
        self._data = b""

    def _take(self, data: bytes) -> None:
        super()._take(data)
        if self._held is not None and self._patience is None:
            self._patience = self.loop.call_later(_BODY_S, self._let_go)

    def _begin_again(self, known: _Known, body: bytes) -> None:
        """A request with a known header."""
        self._unset_keepalive_if_required()
        cycle = _Cycle(keep_alive=True)
        self.cycle = cycle  # type: ignore[assignment]
        self._begin(known.request.again(), cycle, body)

    def _is_free(self) -> bool:
        """Whether the connection is between two requests, and nothing is known that would make the next one another
        than the one before."""
        if self._begun or self._backlog or self.shutting_down:
            return False
        if self.flow.write_paused or self.transport.is_closing():
            return False
        if self._timer is not None or self._is_ending():
            return False
        return bool(self.cycle.response_complete)

    def _remember(self, request: DirectRequest, body: bytes) -> None:
        """The request that is whole now, if it is all that came with its first byte."""
        data = self._data
        header = data[: len(data) - len(body)]
        is_alone = header.endswith(_END_OF_HEADER) and header.count(_END_OF_HEADER) == 1 and data.endswith(body)
        if is_alone and len(header) <= _LARGEST_KNOWN:
            self._known = _Known.of(header, request.again())  # which holds neither tensors nor an answer

    def begin_body(self) -> None:
        """The header's time is over, and the pause that began with the answer to a request that came with this one."""
        self._idle_since = 0.0
        super().begin_body()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self._held is None:
            super().on_body(body)
        else:
            self._unread = 0
            self._body_bytes += len(body)
            self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        request = self._held
        if request is None:
            super().on_message_complete()
            return
        self.end_message()
        cycle: _Cycle = self.cycle  # type: ignore[assignment]
        self._stop_holding()
        body, self._body = b"".join(self._body), []
        if cycle.keep_alive:
            self._remember(request, body)
        self._begin(request, cycle, body)

    def _begin(self, request: DirectRequest, cycle: _Cycle, body: bytes) -> None:
        cycle.more_body = False
        self._running = request
        request.begin(body, partial(self._answer, cycle))

    def _let_go(self) -> None:
        """The body takes its time, or will never be whole: uvicorn's own cycle begins where the direct one was."""
        if self._held is not None:
            self._stop_holding()
            self.cycle = None  # type: ignore[assignment]
            super().on_headers_complete()
            self.cycle.body += b"".join(self._body)
            self._body = []

    def _stop_holding(self) -> None:
        self._held = None
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _answer(self, cycle: _Cycle, status: int, headers: RawHeaders, body: bytes) -> None:
        """Write an answer, and be ready for the next request."""
        self._running = None
        transport = self.transport
        if transport.is_closing():
            return
        lines = [STATUS_LINE[status]]
        for name, value in (*self.server_state.default_headers, *headers):
            lines += (name, b": ", value, b"\r\n")
            if name == b"connection":
                cycle.keep_alive = False  # "close" is all that an answer says there
        if not cycle.keep_alive and (b"connection", b"close") not in headers:
            lines.append(b"connection: close\r\n")
        lines += (b"content-length: %d\r\n\r\n" % len(body), body)
        transport.write(b"".join(lines))
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            transport.close()
        if self.pipeline or self.has_refused() or self._backlog:
            self.on_response_complete()
        else:
            self.server_state.total_requests += 1
            self.watch_reader()
            self._be_idle()

    # ---- keep-alive: one timer for all pauses of a connection, which are short

    def _be_idle(self) -> None:
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._look_whether_idle)

    def _look_whether_idle(self) -> None:
        self._idle_timer = None
        if not self._idle_since or self.transport.is_closing():
            return
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._idle_timer = self.loop.call_later(left, self._look_whether_idle)
        else:
            self.timeout_keep_alive_handler()

    def end_of_pause(self) -> float | None:
        """When the time between two requests is over; None within a request."""
        if self._idle_since:
            return self._idle_since + self.timeout_keep_alive
        return super().end_of_pause()

    def _refuse(self, status: HTTPStatus, text: str, waited: float = 0.0) -> None:
        self._let_go()  # what is broken is the body that it waits for
        super()._refuse(status, text, waited)

    def _unset_keepalive_if_required(self) -> None:
        """Something came."""
        self._idle_since = 0.0
        super()._unset_keepalive_if_required()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._let_go()
        super().connection_lost(exc)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._running is not None:
            self._running.gone()
            self._running = None


def connections(settings: Settings, direct: Direct) -> type[DirectConnection]:
    """The class that uvicorn makes connections of."""

    class Limited(DirectConnection):
        max_connections = settings.max_connections
        max_header_bytes = settings.max_header_bytes
        header_timeout = settings.header_timeout
        keep_alive_timeout = settings.keep_alive_timeout
        reading_timeout = settings.body_timeout
        linger_bytes = 2 * settings.max_body_bytes
        linger_timeout = settings.body_timeout

    Limited.direct, Limited.requests = direct, direct.requests
    return Limited
