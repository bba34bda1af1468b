"""`POST /v2/models/{model}[/versions/{version}]/infer`: tensors in and out, as JSON or as binary data."""

from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from service.codecs.tensors import InferDocument, format_outputs, parse_infer
from service.inference import InferenceRequest, open_request
from service.model_config import Task
from service.routes.documents import INFER_ANSWER, infer_operation
from service.routes.responses import JsonResponse
from service.serving import Serving
from service.workers.messages import LocalTensor

router = APIRouter(tags=["open inference protocol v2"])

_LENGTH_HEADER = "inference-header-content-length"


# Path parameters are read by hand: resolving them would take FastAPI longer than all the rest of a small request.
@router.post("/v2/models/{model}/infer", openapi_extra=infer_operation("model"), responses=INFER_ANSWER)
@router.post(
    "/v2/models/{model}/versions/{version}/infer",
    openapi_extra=infer_operation("model", "version"),
    responses=INFER_ANSWER,
)
async def infer(request: Request) -> Response:
    """Run a model on tensors."""
    serving: Serving = request.app.state.serving
    served = serving.accepting(request.path_params["model"], request.path_params.get("version"))
    with open_request(serving, served, request) as inference:
        specs = served.specs
        body = await inference.body()
        document = parse_infer(body, request.headers.get(_LENGTH_HEADER), specs.inputs, specs.outputs)
        if served.tokens is not None and served.task is not Task.TENSORS:
            served.tokens.check_masks(document.inputs)
        if document.timeout_us:
            inference.limit_time(document.timeout_us / 1e6)
        if document.priority:
            inference.set_priority(document.priority)
        inputs = tuple((name, LocalTensor(array)) for name, array in document.inputs)
        outputs = await inference.run(inputs, tuple(output.name for output in document.outputs))
        return _answer(inference, document, outputs)


def _answer(inference: InferenceRequest, document: InferDocument, outputs: dict[str, Any]) -> Response:
    wanted = [(output, outputs[output.name]) for output in document.outputs]
    tensors, buffers = format_outputs(wanted)
    key = inference.model.key
    answer: dict[str, Any] = {"model_name": key.name, "model_version": str(key.version)}
    if document.id:
        answer["id"] = document.id
    answer["outputs"] = tensors
    if not buffers:
        return JsonResponse(answer, headers=inference.headers())
    header = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    headers = {**inference.headers(), _LENGTH_HEADER: str(len(header))}
    return Response(b"".join((header, *buffers)), headers=headers, media_type="application/octet-stream")
