"""The FastAPI app: routes, the one place where errors become answers, start and end of the service.

`create_app` is called by `__main__` and by tests, which put another engine behind it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service import __version__
from service.access import Access, read_access
from service.direct import Direct
from service.errors import InvalidRequest, ServiceError, describe
from service.exchange import Requests
from service.middleware import RequestMiddleware
from service.openapi import describe as describe_api
from service.routes import (
    embeddings,
    images,
    infer,
    operations,
    page,
    profile,
    protocol,
    reference,
    repository,
    tokens,
)
from service.routes.responses import error_response, failure
from service.serving import Serving
from service.settings import EngineProcess, Settings
from service.shortcut import IMAGES, INFER, VERSIONED_INFER, Route, Shortcut
from service.siblings import Alone, Siblings
from service.tracing import Tracer
from service.workers.clients import FIRST_CLIENT
from service.workers.engine_api import EngineModule, import_path, real_engine, uses_gpu
from service.workers.process import ProcessOptions, ProcessTransport
from service.workers.transport import LocalTransport, Transport


class Place(Protocol):
    """Where an app stands among several front ends; frontend.py has it."""

    number: int
    transport: Transport
    siblings: Siblings
    access: Access

    async def join(self, serving: Serving) -> None:
        """Start serving."""
        ...


def create_app(
    settings: Settings,
    engine: Callable[[], EngineModule] = real_engine,
    on_settled: Callable[[], None] = lambda: None,
    front_end: Place | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """The app. `engine` returns the module that loads models, and is first called on the loading thread, or in the
    engine's process; `on_settled` is called whenever no model is loading any more, and after each
    unloading. Raises SettingsError for settings that contradict each other."""
    access = read_access(settings) if front_end is None else front_end.access
    if tracer is None and settings.traces_endpoint:
        tracer = Tracer(settings.traces_endpoint)
    if front_end is None:
        serving = Serving(settings, _transport(settings, engine), on_settled, Alone(), FIRST_CLIENT)
    else:
        serving = Serving(settings, front_end.transport, on_settled, front_end.siblings, front_end.number)

    requests = Requests(serving.metrics, access, settings.access_log, tracer)
    direct = Direct(serving, requests)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if front_end is None:
            serving.start()
        else:
            await front_end.join(serving)
        yield
        direct.shut_down()
        await serving.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    app = FastAPI(
        title="Tilewave",
        version=__version__,
        summary="HTTP inference for ONNX models on an engine of our own.",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # theirs have scripts of another host; reference.py has ours
        redoc_url=None,
    )
    app.state.serving, app.state.access, app.state.direct = serving, access, direct
    for routes in (
        infer,
        images,
        tokens,
        embeddings,
        protocol,
        operations,
        page,
        profile,
        repository,
        reference,
    ):  # the busiest first: matching is linear
        app.include_router(routes.router)
    app.state.reference = reference.render(describe_api(app))
    app.add_exception_handler(ServiceError, _failure)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _failure)
    shortcuts = (
        Route(INFER, infer.infer, with_query=True),
        Route(IMAGES, images.classify_plainly),
        Route(VERSIONED_INFER, infer.infer, with_query=True),
    )
    app.add_middleware(Shortcut, routes=shortcuts)
    app.add_middleware(RequestMiddleware, requests=requests)
    return app


def _transport(settings: Settings, engine: Callable[[], EngineModule]) -> Transport:
    """The worker where the settings want it: a GPU that fails takes its whole process with it."""
    where = settings.engine_process
    if where is EngineProcess.ALWAYS or (where is EngineProcess.AUTO and uses_gpu(settings.device)):
        return ProcessTransport(ProcessOptions(import_path(engine), settings.transfer_bytes, settings.light_run_us))
    return LocalTransport(engine, settings.light_run_us / 1e6)


async def _failure(request: Request, error: Exception) -> Response:
    return failure(error, request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {404: f"there is nothing at {request.url.path[:200]}", 405: f"{request.method} is not allowed here"}
    message = text.get(error.status_code, HTTPStatus(error.status_code).phrase)
    return error_response(message, describe(error), request.url.path, error.headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return failure(InvalidRequest(f"parameter '{first['loc'][-1]}': {first['msg']}"), request.url.path)
