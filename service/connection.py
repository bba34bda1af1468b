"""One HTTP connection: uvicorn's protocol with bounds on what comes before a body, and errors in our form.

Made by uvicorn for every connection; event loop only. uvicorn itself bounds neither the bytes of a header nor the time
it takes to arrive.
"""

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.settings import Settings


class _HeaderTooLarge(Exception):
    """Ends the parser; `send_400_response` makes the answer."""


class Connection(HttpToolsProtocol):
    """A connection with the bounds of `limited`."""

    max_header_bytes: int
    header_timeout: float

    _timer: asyncio.TimerHandle | None = None
    _in_header = True  # from the end of a request to the end of the next one's header
    _unread = 0  # bytes since the parser last got to the end of a header or to a piece of a body
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The header's time begins: a client that connects and says nothing goes too."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        if self.transport.is_closing():
            return
        if self._in_header and self._timer is None:
            self._start_timer()
        self._unread += len(data)
        super().data_received(data)
        if self._unread > self.max_header_bytes and not self.transport.is_closing():
            self._refuse_header()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the request's path."""
        super().on_url(url)
        self._header_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One line of the header, or of a trailer."""
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value) + 4

    def on_headers_complete(self) -> None:
        """The header is there. Raises _HeaderTooLarge where it came in one piece that was over the limit."""
        if self._header_bytes > self.max_header_bytes:
            raise _HeaderTooLarge
        self._unread = 0
        self._in_header = False
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._unread = 0
        self._in_header = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Bytes that are not HTTP get our error form too."""
        if self._header_bytes > self.max_header_bytes:
            self._refuse_header()
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, "not a valid HTTP request")

    def _refuse_header(self) -> None:
        text = f"the header has more than {self.max_header_bytes} bytes"
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text)

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self._stop_timer()
        body = f'{{"error":"{text}"}}'
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode())
        self.transport.close()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.header_timeout, self._too_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        if self._unread and self.cycle is None:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the header did not arrive within {self.header_timeout:g} s")
        elif self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def limited(settings: Settings) -> type[Connection]:
    """The class that uvicorn makes connections of."""

    class Limited(Connection):
        max_header_bytes = settings.max_header_bytes
        header_timeout = settings.header_timeout

    return Limited
