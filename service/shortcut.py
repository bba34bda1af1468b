"""Infer requests on a way of their own: FastAPI's routing takes longer than all the rest of a small request.

Between the middleware and FastAPI's router. It calls the very function that is also FastAPI's route, which documents it
and answers for other methods; errors become answers by the same table.
"""

import re
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.routes.responses import failure

Handler = Callable[[Request], Awaitable[Response]]

_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")


class Route:
    """What the middleware names a request by."""

    def __init__(self, path: str) -> None:
        self.path = path


_PLAIN, _VERSIONED = Route("/v2/models/{model}/infer"), Route("/v2/models/{model}/versions/{version}/infer")


class Shortcut:
    """ASGI: infer requests to `infer`, everything else to `app`."""

    def __init__(self, app: ASGIApp, infer: Handler) -> None:
        self._app = app
        self._infer = infer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        found = _INFER.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        model, version = found.groups()
        if version is None:
            scope["route"], scope["path_params"] = _PLAIN, {"model": model}
        else:
            scope["route"], scope["path_params"] = _VERSIONED, {"model": model, "version": version}
        try:
            response = await self._infer(Request(scope, receive))
        except Exception as error:
            response = failure(error, scope["path"])
        await response(scope, receive, send)
