"""What routes share: the JSON answer, the running service behind the app, the check of a query's keys."""

import logging
import math
from collections.abc import Mapping
from typing import Annotated, Any

import orjson
from fastapi import Depends, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from service.errors import ErrorRow, InvalidRequest, ServiceError, SlowBody, TooLarge, Unauthorized, describe, document
from service.inference import Answer
from service.serving import Serving

log = logging.getLogger(__name__)


_JSON = ((b"content-type", b"application/json"),)


def to_json(content: Any) -> bytes:
    """JSON through orjson; numpy arrays are written without a detour over lists (NaN and infinity become null)."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def json_answer(content: Any) -> Answer:
    """A good answer in JSON."""
    return Answer(to_json(content), _JSON)


class JsonResponse(Response):
    """A response of any status in JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return to_json(content)


class AnswerResponse(Response):
    """A good answer for ASGI."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.body)
        self.raw_headers.extend(answer.headers)


def error_response(message: str, row: ErrorRow, path: str, headers: Mapping[str, str] | None = None) -> JsonResponse:
    """An error in the form that the clients of `path` read."""
    return JsonResponse(document(message, row, path), row.status, headers)


def refusal(error: ServiceError, path: str) -> JsonResponse:
    """The answer that an error of the service becomes."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, TooLarge | SlowBody):
        headers["connection"] = "close"  # the rest of the body may still be on its way
    elif isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return error_response(str(error), describe(error), path, headers)


def failure(error: Exception, path: str) -> JsonResponse:
    """The answer that any exception of a route becomes."""
    if isinstance(error, ServiceError):
        return refusal(error, path)
    log.error("unhandled error", exc_info=error)
    return error_response("internal error; the server's log has it under this request's id", describe(error), path)


async def get_serving(request: Request) -> Serving:
    """The service that an app serves."""
    serving: Serving = request.app.state.serving
    return serving


ServingOf = Annotated[Serving, Depends(get_serving)]


async def check_query(request: Request) -> None:
    """A dependency of our own routes: refuse keys of the query that the route does not take. Raises InvalidRequest."""
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    known = [parameter.alias for parameter in route.dependant.query_params]
    unknown = next((key for key in request.query_params if key not in known), None)
    if unknown is not None:
        raise InvalidRequest(f"there is no parameter '{unknown[:64]}'; the query takes {', '.join(known)}")
