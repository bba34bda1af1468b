"""`POST /v2/models/{model}[/versions/{version}]/infer`: tensors in and out, as JSON or as binary data."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.codecs.body import INLINE_BYTES, Bytes
from service.codecs.compression import asked_for, compress
from service.codecs.outputs import Classes, format_outputs, to_json
from service.codecs.tensors import InferDocument, parse_infer
from service.exchange import Headers, headers_of
from service.inference import Answer, InferenceRequest, Job, Outputs, Preparation, open_request
from service.model import ServedModel
from service.model_config import Task
from service.routes.protocol_documents import INFER_ANSWER, infer_operation
from service.routes.responses import AnswerResponse
from service.serving import Serving
from service.workers.messages import BatchingMode, LocalTensor

router = APIRouter(tags=["open inference protocol v2"])

_LENGTH_HEADER = b"inference-header-content-length"
_JSON = ((b"content-type", b"application/json"),)
_BINARY = (b"content-type", b"application/octet-stream")
_MOST_DIGITS = 15


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
        body = await inference.body(request)
        length = headers.get(_LENGTH_HEADER)
        inline = not _is_long(body.data, length, served)
        document = await body.read(partial(_read, inference, length), serving.preprocess, inference.deadline, inline)
        job = _job(inference, document)
        outputs = await inference.run(job, request)
        if job.is_long(outputs):
            (answer,) = await serving.preprocess.run([lambda: job.answer(outputs)], inference.deadline)
        else:
            answer = job.answer(outputs)
        encoding = asked_for(headers.get(b"accept-encoding", b""))
        if encoding is not None:
            (packed,) = await serving.preprocess.run([lambda: compress(answer.body, encoding)], inference.deadline)
            answer = Answer(packed, (*answer.headers, (b"content-encoding", encoding.encode())))
        return AnswerResponse(inference.timed(answer))


def infer_job(inference: InferenceRequest, body: bytes, headers: Headers) -> Job | Preparation:
    """What an infer request asks for. Raises InvalidRequest, TooLarge, and what the shared memory raises."""
    length = headers.get(_LENGTH_HEADER)
    if len(body) > INLINE_BYTES and _is_long(body, length, inference.model):
        call = partial(_read, inference, length, body)
        return Preparation((call,), lambda documents: _job(inference, documents[0]))
    return _job(inference, _read(inference, length, body))


def _is_long(body: Bytes, length: bytes | None, served: ServedModel) -> bool:
    """Whether it takes long to read a body that is not compressed; binary data does not, but strings do."""
    if len(body) <= INLINE_BYTES:
        return False
    has_short_json = length is not None and length.isdigit() and len(length) <= _MOST_DIGITS
    if not has_short_json or int(length or b"0") > INLINE_BYTES:
        return True
    return any(spec.dtype == object for spec in served.specs.inputs)


def _read(inference: InferenceRequest, length: bytes | None, body: Bytes) -> InferDocument:
    """What is in the body; long ones on a preprocessing thread."""
    served = inference.model
    specs = served.specs
    document = parse_infer(body, length, specs.inputs, specs.outputs, inference.serving.tensor_source)
    if served.tokens is not None and served.task is not Task.TENSORS:
        served.tokens.check_masks(document.inputs)
    return document


def _job(inference: InferenceRequest, document: InferDocument) -> Job:
    if document.timeout_us:
        inference.limit_time(document.timeout_us / 1e6)
    if document.priority:
        inference.set_priority(document.priority)
    inputs = tuple((name, LocalTensor(array)) for name, array in document.inputs)
    names = tuple(output.name for output in document.outputs)
    return Job(inputs, names, partial(_answer, inference, document), wanted=document.outputs)


def _answer(inference: InferenceRequest, document: InferDocument, outputs: Outputs) -> Answer:
    wanted = [(output, outputs[output.name]) for output in document.outputs]
    model = inference.model
    classes = Classes(model.specs.batching is not BatchingMode.NONE, model.folder.labels)
    tensors, buffers, long = format_outputs(wanted, classes, inference.serving.client_memory)
    answer: dict[str, Any] = {"model_name": model.key.name, "model_version": str(model.key.version)}
    if document.id:
        answer["id"] = document.id
    answer["outputs"] = tensors
    header = to_json(answer, long)
    if not buffers:
        return Answer(header, _JSON)
    return Answer(b"".join((header, *buffers)), (_BINARY, (_LENGTH_HEADER, b"%d" % len(header))))
