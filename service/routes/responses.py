"""What all routes share: the JSON answer, and the running service behind the app."""

from collections.abc import Mapping
from typing import Annotated, Any

import orjson
from fastapi import Depends, Request
from starlette.responses import Response

from service.errors import ErrorRow, document
from service.serving import Serving


class JsonResponse(Response):
    """JSON through orjson; numpy arrays are written without a detour over lists (NaN and infinity become null)."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def error_response(message: str, row: ErrorRow, path: str, headers: Mapping[str, str] | None = None) -> JsonResponse:
    """An error in the form that the clients of `path` read."""
    return JsonResponse(document(message, row, path), row.status, headers)


async def get_serving(request: Request) -> Serving:
    """The service that an app serves."""
    serving: Serving = request.app.state.serving
    return serving


ServingOf = Annotated[Serving, Depends(get_serving)]
