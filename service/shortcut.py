"""Requests on a way of their own: FastAPI's routing takes longer than all the rest of a small infer request, and as
long as what is done for a photo beside its decoding.

Between the middleware and FastAPI's router. It calls the very functions that are also FastAPI's routes, which documents
them and answers for other methods and for queries; errors become answers by the same table.
"""

import re
from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.routes.responses import failure

Handler = Callable[[Request], Awaitable[Response]]

INFER, VERSIONED_INFER = "/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer"
IMAGES = "/v1/models/{model}/images"


class Route:
    """A route of the app, by whose path the middleware names a request; `with_query` where its query says nothing."""

    def __init__(self, path: str, handler: Handler, with_query: bool = False) -> None:
        self.path = path
        self.handler = handler
        self.with_query = with_query
        self.pattern = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path))


class Shortcut:
    """ASGI: POST requests for these routes to their handlers, everything else to `app`."""

    def __init__(self, app: ASGIApp, routes: Sequence[Route]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        route = self._find(scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        try:
            response = await route.handler(Request(scope, receive))
        except Exception as error:
            response = failure(error, scope["path"])
        await response(scope, receive, send)

    def _find(self, scope: Scope) -> Route | None:
        """The route of a request, which is written into its scope as FastAPI does it."""
        for route in self._routes:
            found = route.pattern.fullmatch(scope["path"])
            if found is not None and (route.with_query or not scope["query_string"]):
                scope["route"], scope["path_params"] = route, found.groupdict()
                return route
        return None
