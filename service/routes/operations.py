"""What operators and newcomers look at: `/metrics`, `/v1/models`, `/`."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service import __version__
from service.model import ServedModel
from service.routes.documents import LANDING_ANSWER, METRICS_ANSWER, MODEL_ANSWER, MODELS_ANSWER
from service.routes.responses import JsonResponse, ServingOf

router = APIRouter(tags=["operations"])


@router.get("/", responses=LANDING_ANSWER)
async def landing(serving: ServingOf) -> JsonResponse:
    """What this server is and where to go on."""
    links = {"models": "/v1/models", "metrics": "/metrics", "documentation": "/docs", "protocol": "/v2"}
    models = sorted({model.key.name for model in serving.models.all_models()})
    return JsonResponse({"name": "tilewave", "version": __version__, "models": models, "links": links})


@router.get("/v1/models", responses=MODELS_ANSWER)
async def list_models(serving: ServingOf) -> JsonResponse:
    """Every model version, in the OpenAI list shape with what we know beside it."""
    return JsonResponse({"object": "list", "data": [_entry(model) for model in serving.models.all_models()]})


@router.get("/v1/models/{model}", responses=MODEL_ANSWER)
async def retrieve_model(serving: ServingOf, model: str) -> JsonResponse:
    """The entry of the list for the version that a request without one gets."""
    return JsonResponse(_entry(serving.models.find(model)))


def _entry(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.key.name,
        "object": "model",
        "created": 0,
        "owned_by": "tilewave",
        "version": str(model.key.version),
        "state": model.state,
        "reason": model.reason,
        "task": model.task if model.ready else None,
        "source": model.folder.config.source,
        "license": model.folder.config.license,
        "batching": model.ready.batching_reason if model.ready else None,
    }


@router.get("/metrics", response_class=Response, responses=METRICS_ANSWER)
async def metrics(request: Request, serving: ServingOf) -> Response:
    """Prometheus metrics; docs/metrics.md explains each."""
    await serving.refresh_statistics()
    body, content_type = serving.metrics.render(request.headers.get("accept", ""), await serving.totals())
    return Response(body, headers={"content-type": content_type})
