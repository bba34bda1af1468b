"""Around every request that goes through ASGI: what `exchange.py` does for each. Pure ASGI, so that a client that goes
is still seen by the route. Called by the app for each request.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Forbidden, Unauthorized, Unavailable
from service.exchange import UNANSWERED, Requests, headers_of
from service.logs import request_id
from service.routes.responses import refusal
from service.tracing import current


class RequestMiddleware:
    """Wraps the whole app."""

    def __init__(self, app: ASGIApp, requests: Requests) -> None:
        self._app = app
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, in a task of its own."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = self._requests.of(scope)
        token = request_id.set(exchange.identity)
        current.set(exchange.span)  # of this request's task alone

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                if (
                    exchange.status == UNANSWERED
                ):  # else the connection has answered; nothing of this reaches the client
                    exchange.status = message["status"]
                message["headers"] += exchange.own_headers(message["headers"])
            await send(message)

        try:
            self._requests.check(scope["method"], scope["path"], headers_of(scope["headers"]))
            await self._app(scope, receive, send_with_id)
        except (Unauthorized, Forbidden) as refused:
            await refusal(refused, scope["path"])(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the server cancels what is still running when its drain time is over
            if exchange.status == UNANSWERED:
                error = Unavailable("the server shut down before the request was done")
                await refusal(error, scope["path"])(scope, receive, send_with_id)
        finally:
            exchange.end(getattr(scope.get("route"), "path", "unmatched"))
            request_id.reset(token)
