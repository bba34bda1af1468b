"""What administrators change through the Open Inference Protocol v2: models that come and go, and system shared
memory."""

from typing import Any

from fastapi import APIRouter, Request

from service.codecs.body import parse_object, read_body
from service.codecs.json_values import shown
from service.codecs.parameters import integer, member
from service.errors import InvalidRequest, Unsupported
from service.model import ModelState
from service.routes.protocol_documents import (
    DONE_ANSWER,
    INDEX_ANSWER,
    INDEX_BODY,
    LOAD_BODY,
    REGIONS_ANSWER,
    REGISTER_BODY,
    UNLOAD_BODY,
)
from service.routes.responses import JsonResponse, ServingOf
from service.serving import Serving
from service.siblings import Action, Change

router = APIRouter(prefix="/v2", tags=["administration"])


@router.post("/repository/index", responses=INDEX_ANSWER, openapi_extra={"requestBody": INDEX_BODY})
async def repository_index(request: Request, serving: ServingOf) -> JsonResponse:
    """Every model and its state; an optional body `{"ready": true}` leaves only what can be served."""
    document = await _document(request, serving)
    only_ready = document.get("ready", False)
    if type(only_ready) is not bool:
        raise InvalidRequest("'ready' is not a boolean")
    models = serving.models
    unusable = {**dict.fromkeys(models.unknown(), "it is not loaded"), **models.broken()}
    entries = [
        {"name": name, "version": "", "state": ModelState.UNAVAILABLE, "reason": reason}
        for name, reason in unusable.items()
    ] + [
        {"name": m.key.name, "version": str(m.key.version), "state": m.state, "reason": m.reason}
        for m in models.all_models()
    ]
    wanted = (entry for entry in entries if not only_ready or entry["state"] is ModelState.READY)
    return JsonResponse(sorted(wanted, key=lambda entry: (entry["name"], entry["version"])))


@router.post("/repository/models/{model}/load", responses=DONE_ANSWER, openapi_extra={"requestBody": LOAD_BODY})
async def load_model(request: Request, serving: ServingOf, model: str) -> JsonResponse:
    """Load a model from its folder, or what of it has changed since it was loaded; answers when it is served."""
    document = await _document(request, serving)
    for key in member(document, "parameters"):
        raise Unsupported(f"parameter '{key[:64]}' is not supported; models and settings come from the repository only")
    await serving.change(Action(Change.LOAD, model))
    return JsonResponse({})


@router.post("/repository/models/{model}/unload", responses=DONE_ANSWER, openapi_extra={"requestBody": UNLOAD_BODY})
async def unload_model(request: Request, serving: ServingOf, model: str) -> JsonResponse:
    """Serve a model no more; answers when its requests are done and its memory is back."""
    document = await _document(request, serving)
    if type(member(document, "parameters").get("unload_dependents", False)) is not bool:
        raise InvalidRequest("parameter 'unload_dependents' is not a boolean")  # nothing depends on a model here
    await serving.change(Action(Change.UNLOAD, model))
    return JsonResponse({})


@router.get("/systemsharedmemory/status", responses=REGIONS_ANSWER)
@router.get("/systemsharedmemory/region/{region}/status", responses=REGIONS_ANSWER)
async def shared_memory_status(serving: ServingOf, region: str | None = None) -> JsonResponse:
    """The registered regions of system shared memory, or one of them."""
    return JsonResponse([found.document() for found in serving.client_memory.regions(region)])


@router.post(
    "/systemsharedmemory/region/{region}/register", responses=DONE_ANSWER, openapi_extra={"requestBody": REGISTER_BODY}
)
async def register_shared_memory(request: Request, serving: ServingOf, region: str) -> JsonResponse:
    """Let clients read and write a part of a POSIX shared-memory segment of this machine."""
    document = await _document(request, serving)
    key = document.get("key")
    if not isinstance(key, str):
        raise InvalidRequest(f"'key' is {shown(key)}; send the name of a shared-memory segment")
    place = (integer(document, "offset"), integer(document, "byte_size"))
    await serving.change(Action(Change.REGISTER, region, key, *place))
    return JsonResponse({})


@router.post("/systemsharedmemory/unregister", responses=DONE_ANSWER)
@router.post("/systemsharedmemory/region/{region}/unregister", responses=DONE_ANSWER)
async def unregister_shared_memory(serving: ServingOf, region: str | None = None) -> JsonResponse:
    """Forget a region, or all of them; the segments are their owners'."""
    await serving.change(Action(Change.UNREGISTER, region))
    return JsonResponse({})


async def _document(request: Request, serving: Serving) -> dict[str, Any]:
    """The body, which may be missing."""
    body = await read_body(request, serving.settings)
    return parse_object(body) if body else {}
