"""`POST /v2/models/{model}[/versions/{version}]/infer`: tensors in and out, as JSON or as binary data."""

from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from service.codecs.compression import asked_for, compress
from service.codecs.outputs import Classes, format_outputs
from service.codecs.tensors import InferDocument, parse_infer
from service.exchange import Headers, headers_of
from service.inference import Answer, InferenceRequest, Job, Outputs, open_request
from service.model_config import Task
from service.routes.protocol_documents import INFER_ANSWER, infer_operation
from service.routes.responses import AnswerResponse
from service.serving import Serving
from service.workers.messages import BatchingMode, LocalTensor

router = APIRouter(tags=["open inference protocol v2"])

_LENGTH_HEADER = b"inference-header-content-length"
_JSON = ((b"content-type", b"application/json"),)
_BINARY = (b"content-type", b"application/octet-stream")


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
    headers = headers_of(request.scope["headers"])
    served = serving.accepting(request.path_params["model"], request.path_params.get("version"))
    with open_request(serving, served, headers) as inference:
        job = infer_job(inference, await inference.body(request), headers)
        answer = job.answer(await inference.run(job, request))
        encoding = asked_for(headers.get(b"accept-encoding", b""))
        if encoding is not None:
            (body,) = await serving.preprocess.run([lambda: compress(answer.body, encoding)], inference.deadline)
            answer = Answer(body, (*answer.headers, (b"content-encoding", encoding.encode())))
        return AnswerResponse(inference.timed(answer))


def infer_job(inference: InferenceRequest, body: bytes, headers: Headers) -> Job:
    """What an infer request asks for. Raises InvalidRequest, TooLarge, and what the shared memory raises."""
    served, source = inference.model, inference.serving.tensor_source
    specs = served.specs
    document = parse_infer(body, headers.get(_LENGTH_HEADER), specs.inputs, specs.outputs, source)
    if served.tokens is not None and served.task is not Task.TENSORS:
        served.tokens.check_masks(document.inputs)
    if document.timeout_us:
        inference.limit_time(document.timeout_us / 1e6)
    if document.priority:
        inference.set_priority(document.priority)
    inputs = tuple((name, LocalTensor(array)) for name, array in document.inputs)
    names = tuple(output.name for output in document.outputs)
    return Job(inputs, names, partial(_answer, inference, document))


def _answer(inference: InferenceRequest, document: InferDocument, outputs: Outputs) -> Answer:
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
        return Answer(header, _JSON)
    return Answer(b"".join((header, *buffers)), (_BINARY, (_LENGTH_HEADER, b"%d" % len(header))))
