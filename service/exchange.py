"""What is done for every request, whichever way it goes: its API key, its id, its time, the count of answers by route
and status, one log line.

`Requests` is made with the app. The middleware calls it for what goes through ASGI, `direct.py` for what does not, and
`connection.py` for what is answered before it is a request.
"""

import itertools
import logging
import re
import secrets
import time
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from service.access import Access
from service.errors import Forbidden
from service.metrics import Metrics
from service.numbers import Number
from service.tracing import RequestSpan, Tracer

log = logging.getLogger("service.access")

UNANSWERED = 499
"""What is counted where no answer began: the client had gone."""

_KEY = "tilewave.exchange"  # in an ASGI scope
_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

RawHeaders = Iterable[tuple[bytes, bytes]]
Headers = Mapping[bytes, bytes]


def headers_of(raw: list[tuple[bytes, bytes]]) -> Headers:
    """Headers by their names in lower case; of several with one name the first."""
    return dict(reversed(raw))


class Exchange:
    """One request. `started` is of `time.monotonic()`; `status` is that of the answer, once it begins."""

    __slots__ = ("_requests", "identity", "method", "path", "span", "started", "status")

    def __init__(self, requests: "Requests", method: str, path: str, headers: Headers) -> None:
        self._requests = requests
        self.started = time.monotonic()
        self.method, self.path = method, path
        given = headers.get(b"x-request-id")
        text = given.decode("latin-1") if given is not None else ""
        self.identity = text if text and _ID.fullmatch(text) else requests.new_id()
        self.status = UNANSWERED
        self.span: RequestSpan | None = None

    def own_headers(self, answer: RawHeaders) -> list[tuple[bytes, bytes]]:
        """What every answer says besides its own headers."""
        own = [(b"x-request-id", self.identity.encode())]
        for name, _ in answer:
            if name == b"server-timing":
                return own
        total = (time.monotonic() - self.started) * 1e3
        own.append((b"server-timing", b"total;dur=%.3f" % total))
        return own

    def end(self, route: str) -> None:
        """The answer is written, or the client has gone."""
        self._requests.count(route, self.status)
        if self.span is not None:
            self.span.finish(self.method, route, self.status)
        if self._requests.access_log:
            seconds = time.monotonic() - self.started
            log.info("%s %s %d %.1f ms", self.method, self.path[:200], self.status, seconds * 1e3)


class Requests:
    """All requests of one app. Where there is a tracer, each is a span."""

    def __init__(self, metrics: Metrics, access: Access, access_log: bool, tracer: Tracer | None) -> None:
        self.access = access
        self.access_log = access_log
        self.tracer = tracer
        self._responses = metrics.responses
        self._counters: dict[tuple[str, int], Number] = {}  # routes and statuses are few
        self._prefix = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    def begin(self, method: str, path: str, headers: Headers) -> Exchange:
        """A request is there; `end` of what this returns has to follow."""
        exchange = Exchange(self, method, path, headers)
        if self.tracer is not None:
            exchange.span = self.tracer.begin(method, path, headers)
        return exchange

    def of(self, scope: MutableMapping[str, Any]) -> Exchange:
        """The request with this ASGI scope, begun unless it is already: by its task, or by its connection, which may
        find its body broken before the task has run."""
        exchange = scope.get(_KEY)
        if exchange is None:
            exchange = scope[_KEY] = self.begin(scope["method"], scope["path"], headers_of(scope["headers"]))
        assert isinstance(exchange, Exchange)
        return exchange

    def unread(self, headers: Headers, waited: float) -> Exchange:
        """A request of which no more than some headers are known, and that began `waited` seconds ago."""
        exchange = Exchange(self, "-", "-", headers)
        exchange.started -= waited
        return exchange

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raises Unauthorized or Forbidden unless the request may go on. Where no key is asked for, whoever reaches the
        server may do everything; but a page of another site, which somebody on this machine looks at, sends its
        requests from here, too. Browsers say so, and pages cannot keep them from it."""
        if self.access.asks:
            self.access.check(path, headers.get(b"authorization", b"").decode("latin-1"))
        elif method == "POST" and headers.get(b"sec-fetch-site") == b"cross-site":
            raise Forbidden(
                "pages of other sites may send nothing here; ask from a program, or from a page of this site"
            )

    def new_id(self) -> str:
        """For a request that brings none."""
        return f"{self._prefix}-{next(self._numbers):x}"

    def count(self, route: str, status: int) -> None:
        """One answer."""
        found = self._counters.get((route, status))
        if found is None:
            found = self._counters[route, status] = self._responses.labels(route, str(status))
        found.inc()
