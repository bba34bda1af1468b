"""What operators and newcomers look at: `/metrics`, `/v1/models`. The page at `/` is in page.py."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.model import ServedModel
from service.routes.documents import METRICS_ANSWER, MODEL_ANSWER, MODELS_ANSWER
from service.routes.responses import JsonResponse, ServingOf

router = APIRouter(tags=["operations"])


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
