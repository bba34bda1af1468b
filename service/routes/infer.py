"""`POST /v2/models/{model}[/versions/{version}]/infer`: tensors in and out, as JSON or as binary data."""

from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from service.codecs.compression import asked_for, compress
from service.codecs.outputs import Classes, format_outputs
from service.codecs.tensors import InferDocument, parse_infer
from service.inference import InferenceRequest, open_request
from service.model_config import Task
from service.routes.protocol_documents import INFER_ANSWER, infer_operation
from service.serving import Serving
from service.workers.messages import BatchingMode, LocalTensor

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
        source = serving.tensor_source
        document = parse_infer(body, request.headers.get(_LENGTH_HEADER), specs.inputs, specs.outputs, source)
        if served.tokens is not None and served.task is not Task.TENSORS:
            served.tokens.check_masks(document.inputs)
        if document.timeout_us:
            inference.limit_time(document.timeout_us / 1e6)
        if document.priority:
            inference.set_priority(document.priority)
        inputs = tuple((name, LocalTensor(array)) for name, array in document.inputs)
        outputs = await inference.run(inputs, tuple(output.name for output in document.outputs))
        answer, headers = _answer(inference, document, outputs)
        encoding = asked_for(request.headers.get("accept-encoding", ""))
        if encoding is not None:
            (answer,) = await serving.preprocess.run([lambda: compress(answer, encoding)], inference.deadline)
            headers["content-encoding"] = encoding
        return Response(answer, headers={**headers, **inference.headers()})


def _answer(
    inference: InferenceRequest, document: InferDocument, outputs: dict[str, Any]
) -> tuple[bytes, dict[str, str]]:
    """The body of an answer, and its headers."""
    wanted = [(output, outputs[output.name]) for output in document.outputs]
    model = inference.model
    classes = Classes(model.specs.batching is not BatchingMode.NONE, model.folder.labels)
    tensors, buffers = format_outputs(wanted, classes, inference.serving.client_memory)
    answer: dict[str, Any] = {"model_name": model.key.name, "model_version": str(model.key.version)}
    if document.id:
        answer["id"] = document.id
    answer["outputs"] = tensors
    header = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if not buffers:
        return header, {"content-type": "application/json"}
    binary = {"content-type": "application/octet-stream", _LENGTH_HEADER: str(len(header))}
    return b"".join((header, *buffers)), binary
