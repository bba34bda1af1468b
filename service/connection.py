"""One HTTP connection: uvicorn's protocol with bounds on what comes before a body, errors in our form, and answers for
clients that have closed their sending side, offer another protocol or are still sending.

Made by uvicorn for every connection; event loop only. uvicorn itself bounds neither the bytes of a header nor the time
it takes to arrive, closes a connection when its client has nothing more to send, and loses the body of a request that
offers to go on in HTTP/2, as Java's client does with every request.

TCP tells a client that has said all it wanted (and reads on) from one that is gone only when something is sent to it:
the system of the latter answers with a reset. So a client that waits for its answer with its sending side closed is
sent a "100 Continue" now and then, which every HTTP/1.1 client passes over.

Closing a connection on which more arrives resets it, and a reset takes the answer from a client that has not read it.
So where a request is refused before all of it is there, only our sending side is closed at first; what comes is thrown
away. Answers come in the order of the requests: bytes that are no request are refused when those before them have
theirs.

Requests may be sent before the answers to those before them are there. Each that is parsed takes some kilobytes, a
hundred times what it may have on the wire, and parsing all that can be read at once takes a second. So bytes behind
requests that wait are kept as they came, and nothing more is read meanwhile.

What a connection answers by itself is counted, logged and given an id like any answer: as that of the request whose
body is broken, else under the route `connection`.
"""

import asyncio
import socket
from http import HTTPStatus
from typing import cast

import httptools
import orjson
from starlette.types import Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.errors import ErrorRow, Outcome, document
from service.exchange import Exchange, Requests, headers_of
from service.keep_alive import KeptConnection
from service.logs import request_id

# Most answers are there before the first question is asked. A reset takes a round trip.
_FIRST_QUESTION_S, _NEXT_QUESTION_S, _RESET_S = 0.01, 1.0, 0.02
_OFFER = (b"upgrade", b"http2-settings")
_QUIET_S = 2.0  # a refused client that sends nothing for so long has stopped
_STILL_THERE = b"HTTP/1.1 100 Continue\r\n\r\n"
_SHORT = 2048  # bytes that are parsed at once, however many requests they are
_END_OF_HEADER = b"\r\n\r\n"
_ROUTE = "connection"  # of answers to what is no request
_MOST_REFUSED = 256  # connections over the limit that may read why; more are closed at once


class _HeaderTooLarge(Exception):
    """Ends the parser; `send_400_response` makes the answer."""


class _Flow(FlowControl):
    """uvicorn's, which reads on with every answer and whenever a request asks for its body; not while it is `held`."""

    held = False

    def hold(self) -> None:
        """Read no more for now."""
        self.pause_reading()
        self.held = True

    def let_go(self) -> None:
        """Read on."""
        self.held = False
        self.resume_reading()

    def resume_reading(self) -> None:
        """Read on, unless held."""
        if not self.held:
            super().resume_reading()


class _AnswerTransport(asyncio.Transport):
    """What uvicorn writes one answer to, and closes after an answer that is the connection's last."""

    def __init__(self, connection: "Connection", cycle: RequestResponseCycle) -> None:
        super().__init__()
        self._connection = connection
        self._cycle = cycle

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """A piece of the answer."""
        self._connection.transport.write(data)

    def is_closing(self) -> bool:
        """Whether the connection is."""
        return self._connection.transport.is_closing()

    def close(self) -> None:
        """The answer is over; not so the request, perhaps."""
        if self._cycle.more_body and self._cycle.response_complete:
            self._connection.linger()
        else:
            self._connection.transport.close()


class Connection(KeptConnection):
    """A connection with bounds; `direct_connection.py` sets them."""

    requests: Requests
    max_connections: int
    max_header_bytes: int
    header_timeout: float
    linger_bytes: int  # what is thrown away at most, and for how long, of a body that was refused
    linger_timeout: float

    _timer: asyncio.TimerHandle | None = None  # of a header, or of a body that was answered before it was there
    _in_header = True  # from the end of a request to the end of the next one's header
    _begun = False  # whether something of a request has come that has not come to its end
    _unread = 0  # bytes since the parser last got to the end of a header or to a piece of a body
    _header_bytes = 0
    _lingering: asyncio.TimerHandle | None = None  # a request was refused: until the connection is closed
    _linger_end = 0.0  # of the loop's time
    _thrown_away = 0
    flow: _Flow
    _backlog = b""  # came behind requests that wait
    _taking = False
    _body_bytes = 0  # of the body that is coming
    _refusal: tuple[HTTPStatus, str] | None = None  # of what follows on the requests that have no answer yet
    _half_closed: asyncio.TimerHandle | None = None  # until the client is asked, or looked at, the next time

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The header's time begins: a client that connects and says nothing goes too."""
        super().connection_made(transport)
        self.flow = _Flow(transport)
        if len(self.connections) > self.max_connections and not self.make_room():
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, f"the server has its {self.max_connections} connections")
            return
        self._start_timer(self.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        self._stop_timer()
        self._backlog = b""
        for timer in (self._half_closed, self._lingering):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more; one that has an answer to come may still read it. True keeps the connection."""
        if self.pipeline and self.cycle.more_body:
            self._refuse(HTTPStatus.BAD_REQUEST, "the request is not all there")
        if self._refusal is not None:
            return True
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        self._half_closed = self.loop.call_later(_FIRST_QUESTION_S, self._ask)
        return True

    def _ask(self) -> None:
        """Send what makes a client that is gone known. Not into an answer that has begun, not to HTTP/1.0."""
        cycle = self.cycle
        if self.transport.is_closing() or cycle.response_started or self.pipeline:
            return
        if cycle.scope["http_version"] == "1.1":
            self.transport.write(_STILL_THERE)
        self._half_closed = self.loop.call_later(_RESET_S, self._look)

    def _look(self) -> None:
        """End the connection if the client's system has reset it: nobody reads from it, so nobody else would notice."""
        if self.transport.is_closing():
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            self._half_closed = self.loop.call_later(_NEXT_QUESTION_S, self._ask)

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        if self.transport.is_closing():
            return
        if self._lingering is not None:
            self._throw_away(len(data))
            return
        if self._refusal is not None:
            return
        if self._backlog:
            self._backlog += data
        else:
            self._take(data)

    def _take(self, data: bytes) -> None:
        """Parse what has come, up to the first request that has to wait for others."""
        self._unset_keepalive_if_required()
        self._taking = True
        begin = 0
        while begin < len(data) and not self.pipeline and not self._is_over():
            end = len(data)
            if end - begin > _SHORT and not self._is_of_body(end - begin):
                found = data.find(_END_OF_HEADER, begin)
                end = found + len(_END_OF_HEADER) if found >= 0 else end
            self._feed(data[begin:end])
            begin = end
        self._taking = False
        self._backlog = b"" if self._is_over() else data[begin:]
        if self._backlog:
            self.flow.hold()

    def _go_on(self) -> None:
        """Parse what has come behind requests that are answered now."""
        if not self._backlog or self._taking or self.pipeline or self._is_over():
            return
        data, self._backlog = self._backlog, b""
        self.flow.let_go()
        self._take(data)

    def _is_over(self) -> bool:
        return self.transport.is_closing() or self._is_ending()

    def _is_of_body(self, count: int) -> bool:
        """Whether so many bytes to come are all of one body."""
        if self._in_header:
            return False
        length = next((value for name, value in self.headers if name == b"content-length"), b"0")
        return int(length) - self._body_bytes >= count

    def _feed(self, data: bytes) -> None:
        self._unread += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        if self._unread or self._begun:
            self._check_header()

    def _check_header(self) -> None:
        """Something has begun that is not whole: a header is not too large yet, and not given for ever."""
        if self._lingering is not None or self._refusal is not None or self.transport.is_closing():
            return
        if self._unread > self.max_header_bytes or (self._in_header and self._header_bytes > self.max_header_bytes):
            self._refuse_header()
        elif self._in_header and self._timer is None:
            self._start_timer(self.header_timeout)

    def linger(self) -> None:
        """Close our sending side now, the connection when the client does, is quiet, or has sent too much."""
        self._linger_end = self.loop.time() + self.linger_timeout
        self._lingering = self.loop.call_later(min(_QUIET_S, self.linger_timeout), self.transport.close)
        self.transport.write_eof()
        self._backlog = b""
        self.flow.let_go()

    def on_response_complete(self) -> None:
        """The answer is written. Where the request is not all there, the rest of it gets the time of a body; the time
        of an idle connection does not run where a refused body is thrown away."""
        is_last = not self.pipeline
        super().on_response_complete()
        if self._refusal is not None and is_last and not self.transport.is_closing():
            self._refuse(*self._refusal)
        if self._lingering is not None:
            self._unset_keepalive_if_required()
        elif self.cycle.more_body and self._timer is None:
            self._start_timer(self.linger_timeout)
        self._go_on()

    def _throw_away(self, count: int) -> None:
        assert self._lingering is not None
        self._lingering.cancel()
        self._thrown_away += count
        left = self._linger_end - self.loop.time()
        if self._thrown_away > self.linger_bytes or left <= 0:
            self.transport.close()
        else:
            self._lingering = self.loop.call_later(min(_QUIET_S, left), self.transport.close)

    def _parse(self, data: bytes) -> None:
        """Feed the parser. It stops after the header of a request that offers another protocol: such a request goes
        through a new one without the offer, which is how HTTP declines it."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self.parser.get_method() == b"CONNECT":
                    raise httptools.HttpParserError("no proxy") from None
                data = self._header_without_offer() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own

    def _header_without_offer(self) -> bytes:
        first = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = [first]
        for name, value in self.headers:
            if name == b"connection":
                tokens = (token.strip() for token in value.lower().split(b","))
                value = b", ".join(token for token in tokens if token not in _OFFER)
            if name not in _OFFER:
                kept.append(b"%b: %b" % (name, value))
        return b"\r\n".join((*kept, b"", b""))

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._header_bytes = 0
        self._begun = True

    def _make_scope(self) -> None:
        """What uvicorn makes at the first byte, for the requests that go through ASGI."""
        url, headers, expect_100_continue = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect_100_continue
        self.headers += headers  # the scope has this very list

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
        if self.parser.should_upgrade():
            return
        self.begin_body()
        self._make_scope()
        super().on_headers_complete()
        self.cycle.transport = _AnswerTransport(self, self.cycle)  # its task has not begun

    def begin_body(self) -> None:
        """The header's time is over."""
        self._unread = self._body_bytes = 0
        self._in_header = False
        self._stop_timer()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._unread = 0
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self.parser.should_upgrade():
            return
        self.end_message()
        super().on_message_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self.arm_keep_alive()

    def end_message(self) -> None:
        """What comes next is a header."""
        self._unread = 0
        self._in_header = True
        self._begun = False
        self._header_bytes = 0
        if self._timer is not None:
            self._stop_timer()

    def send_400_response(self, msg: str) -> None:
        """Bytes that are not HTTP get our error form too."""
        if self._header_bytes > self.max_header_bytes:
            self._refuse_header()
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, "not a valid HTTP request")

    def _refuse_header(self) -> None:
        text = f"the header has more than {self.max_header_bytes} bytes"
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text)

    def _refuse(self, status: HTTPStatus, text: str, waited: float = 0.0) -> None:
        """Answer, when the requests before have their answers, and close when the client has had the time to read.
        `waited` is for how many seconds something was due."""
        self._stop_timer()
        if self._is_due():
            self._refusal = status, text
            return
        is_broken = self.cycle is not None and not self.cycle.response_complete  # its body is
        exchange = self._broken_exchange() if is_broken else self._unread_exchange(waited)
        exchange.status = status.value
        if is_broken:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = orjson.dumps(document(text, ErrorRow(status.value, Outcome.INVALID), exchange.path))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if status is HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append((b"retry-after", b"1"))
        headers += [(b"connection", b"close"), *exchange.own_headers(())]
        lines = [f"HTTP/1.1 {status.value} {status.phrase}".encode(), *(b"%b: %b" % header for header in headers)]
        self.transport.write(b"\r\n".join((*lines, b"", body)))
        if not is_broken:  # else its task ends it
            token = request_id.set(exchange.identity)
            exchange.end(_ROUTE)
            request_id.reset(token)
        if len(self.connections) > self.max_connections + _MOST_REFUSED:
            self.transport.close()
        else:
            self.linger()

    def _broken_exchange(self) -> Exchange:
        """The request whose body is broken."""
        return self.requests.of(cast("Scope", self.cycle.scope))

    def _unread_exchange(self, waited: float) -> Exchange:
        """A request of which nobody knows more than a part of its header, if anything came at all."""
        return self.requests.unread(headers_of(self.headers) if self._in_header and self._begun else {}, waited)

    def _is_ending(self) -> bool:
        """Whether what comes is not read any more, or not to be answered."""
        return self._lingering is not None or self._refusal is not None

    def has_refused(self) -> bool:
        """Whether what follows on the requests under way is refused when they have their answers."""
        return self._refusal is not None

    def _is_due(self) -> bool:
        """Whether an answer to an earlier request comes first. A request that is broken itself is not answered but
        refused; one that waits behind others is forgotten."""
        if self.pipeline and self.pipeline[0][0].more_body:
            self.pipeline.popleft()
            return True
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        return bool(self.pipeline) or cycle.response_started or not cycle.more_body

    def _start_timer(self, seconds: float) -> None:
        self._timer = self.loop.call_later(seconds, self._too_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        """The header, or what is left of a body that has been answered, did not arrive."""
        self._timer = None
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            if self._in_header:
                self._start_timer(self.header_timeout)  # an answer is due first
        elif self._in_header and self._begun:
            text = f"the header did not arrive within {self.header_timeout:g} s"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, text, self.header_timeout)
        elif self._in_header and self.has_unread():
            self._start_timer(self.header_timeout)
        else:
            self.transport.close()
