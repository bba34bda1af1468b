"""Around every request: its API key, its id, its time, the count of answers by route and status, one log line. Pure
ASGI, so that a client that goes is still seen by the route. Called by the app for each request.
"""

import asyncio
import itertools
import logging
import re
import secrets
import time

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access import Access
from service.errors import Forbidden, Unauthorized, Unavailable, describe
from service.logs import request_id
from service.metrics import Metrics
from service.routes.responses import error_response, refusal
from service.tracing import Tracer, current

log = logging.getLogger("service.access")

_UNANSWERED = 499  # what is counted where no answer began: the client had gone
_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class RequestMiddleware:
    """Wraps the whole app."""

    def __init__(self, app: ASGIApp, metrics: Metrics, access: Access, access_log: bool, tracer: Tracer | None) -> None:
        self._app = app
        self._access = access
        self._responses = metrics.responses
        self._counters: dict[tuple[str, int], Counter] = {}  # routes and statuses are few
        self._access_log = access_log
        self._tracer = tracer
        self._prefix = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    def _counter(self, route: str, status: int) -> Counter:
        """The child of a route and a status; looking it up by its labels takes long."""
        found = self._counters.get((route, status))
        if found is None:
            found = self._counters[route, status] = self._responses.labels(route, str(status))
        return found

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        identity = given if _ID.fullmatch(given) else f"{self._prefix}-{next(self._numbers):x}"
        token = request_id.set(identity)
        span = None
        if self._tracer is not None:
            span = self._tracer.begin(scope["method"], scope["path"], headers)
            current.set(span)  # of this request's task alone
        status = _UNANSWERED

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", identity.encode()))
                if not any(name == b"server-timing" for name, _ in message["headers"]):
                    total = f"total;dur={(time.monotonic() - started) * 1e3:.3f}"
                    message["headers"].append((b"server-timing", total.encode()))
            await send(message)

        try:
            self._access.check(scope["path"], headers.get(b"authorization", b"").decode("latin-1"))
            await self._app(scope, receive, send_with_id)
        except (Unauthorized, Forbidden) as refused:
            await refusal(refused, scope["path"])(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the server cancels what is still running when its drain time is over
            if status == _UNANSWERED:
                error = Unavailable("the server shut down before the request was done")
                answer = error_response(str(error), describe(error), scope["path"])
                await answer(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self._counter(route, status).inc()
            if span is not None:
                span.finish(scope["method"], route, status)
            if self._access_log:
                seconds = time.monotonic() - started
                log.info("%s %s %d %.1f ms", scope["method"], scope["path"][:200], status, seconds * 1e3)
            request_id.reset(token)
