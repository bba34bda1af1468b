"""Open Inference Protocol v2, all but infer: health, metadata, configuration, statistics, repository index."""

from typing import Any

from fastapi import APIRouter

from service import __version__
from service.codecs.tensor_types import datatype_of
from service.errors import Unavailable
from service.model import ModelState, ServedModel
from service.routes.protocol_documents import (
    ALL_STATISTICS_ANSWER,
    CONFIG_ANSWER,
    LIVE_ANSWER,
    METADATA_ANSWER,
    MODEL_READY_ANSWER,
    READY_ANSWER,
    SERVER_ANSWER,
    STATISTICS_ANSWER,
)
from service.routes.responses import JsonResponse, ServingOf
from service.serving import Serving
from service.workers.messages import BatchingMode, TensorInfo

router = APIRouter(prefix="/v2", tags=["open inference protocol v2"])

# Only what works: perf_analyzer and the clients read this list.
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "statistics",
)


@router.get("", responses=SERVER_ANSWER)
async def server_metadata(serving: ServingOf) -> JsonResponse:
    """Name, version and protocol extensions of the server."""
    shared = ("system_shared_memory",) if serving.client_memory.enabled else ()
    return JsonResponse({"name": "tilewave", "version": __version__, "extensions": [*EXTENSIONS, *shared]})


@router.get("/health/live", responses=LIVE_ANSWER)
async def server_live() -> JsonResponse:
    """200 as soon as the server answers at all."""
    return JsonResponse({"live": True})


@router.get("/health/ready", responses=READY_ANSWER)
async def server_ready(serving: ServingOf) -> JsonResponse:
    """200 when every model that can be loaded is loaded and warm, and the server is not shutting down; else 503."""
    reason = serving.not_ready()
    if reason:
        raise Unavailable(f"not ready: {reason}")
    return JsonResponse({"ready": True})


@router.get("/models/stats", responses=ALL_STATISTICS_ANSWER)
async def all_statistics(serving: ServingOf) -> JsonResponse:
    """Counters of every model."""
    return await _statistics(
        serving, [model for model in serving.models.all_models() if model.state is ModelState.READY]
    )


@router.get("/models/{model}", responses=METADATA_ANSWER)
@router.get("/models/{model}/versions/{version}", responses=METADATA_ANSWER)
async def model_metadata(serving: ServingOf, model: str, version: str | None = None) -> JsonResponse:
    """Inputs and outputs of a model; open dims are -1."""
    served = serving.models.find(model, version)
    served.check_ready()
    specs = served.specs
    return JsonResponse(
        {
            "name": served.key.name,
            "versions": [str(other.key.version) for other in serving.models.versions(model)],
            "platform": "tilewave_onnx",
            "inputs": [_tensor(spec) for spec in specs.inputs],
            "outputs": [_tensor(spec) for spec in specs.outputs],
        }
    )


@router.get("/models/{model}/ready", responses=MODEL_READY_ANSWER)
@router.get("/models/{model}/versions/{version}/ready", responses=MODEL_READY_ANSWER)
async def model_ready(serving: ServingOf, model: str, version: str | None = None) -> JsonResponse:
    """200 when this model answers; 503 with the reason when it does not."""
    served = serving.accepting(model, version)
    return JsonResponse({"name": served.key.name, "ready": True})


@router.get("/models/{model}/config", responses=CONFIG_ANSWER)
@router.get("/models/{model}/versions/{version}/config", responses=CONFIG_ANSWER)
async def model_configuration(serving: ServingOf, model: str, version: str | None = None) -> JsonResponse:
    """The model's configuration in the form of the protocol's clients."""
    served = serving.models.find(model, version)
    served.check_ready()
    specs = served.specs
    batched = specs.batching is not BatchingMode.NONE
    document: dict[str, Any] = {
        "name": served.key.name,
        "platform": "tilewave_onnx",
        "backend": "tilewave",
        "max_batch_size": served.options.max_batch if batched else 0,
        "input": [_config_tensor(spec, batched) for spec in specs.inputs],
        "output": [_config_tensor(spec, batched) for spec in specs.outputs],
        "model_transaction_policy": {"decoupled": False},
        "response_cache": {"enable": False},
    }
    if batched:
        delay = round(served.options.max_delay_s * 1e6)
        document["dynamic_batching"] = {"max_queue_delay_microseconds": delay}
    return JsonResponse(document)


@router.get("/models/{model}/stats", responses=STATISTICS_ANSWER)
@router.get("/models/{model}/versions/{version}/stats", responses=STATISTICS_ANSWER)
async def model_statistics(serving: ServingOf, model: str, version: str | None = None) -> JsonResponse:
    """Counters of one model: all versions, or the one named."""
    models = serving.models.versions(model) if version is None else [serving.models.find(model, version)]
    return await _statistics(serving, models)


async def _statistics(serving: Serving, models: list[ServedModel]) -> JsonResponse:
    totals = await serving.totals()
    if totals is not None:
        return JsonResponse({"model_stats": [totals["statistics"][str(model.key)] for model in models]})
    return JsonResponse({"model_stats": [m.metrics.statistics.document(m.key.name, m.key.version) for m in models]})


def _dims(shape: tuple[int | str, ...]) -> list[int]:
    return [dim if isinstance(dim, int) else -1 for dim in shape]


def _tensor(spec: TensorInfo) -> dict[str, Any]:
    return {"name": spec.name, "datatype": datatype_of(spec.dtype), "shape": _dims(spec.shape)}


def _config_tensor(spec: TensorInfo, batched: bool) -> dict[str, Any]:
    datatype = datatype_of(spec.dtype)
    kind = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
    return {"name": spec.name, "data_type": kind, "dims": _dims(spec.shape[1:] if batched else spec.shape)}
