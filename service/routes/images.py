"""`POST /v1/models/{model}/images`: pictures in, labels out."""

import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from numpy.typing import NDArray
from starlette.datastructures import Headers as StarletteHeaders
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import Response

from service.codecs.body import Bytes
from service.codecs.classify import probabilities, top_labels
from service.codecs.finite import require_finite
from service.codecs.images import ImageSpec, decode
from service.errors import DeadlineExceeded, InvalidRequest, TooLarge
from service.exchange import Headers, headers_of
from service.inference import Answer, InferenceRequest, Job, Outputs, Preparation, open_request
from service.model import ServedModel
from service.model_config import Task
from service.routes.documents import IMAGES_ANSWER, IMAGES_BODY, REQUEST_HEADERS
from service.routes.responses import AnswerResponse, ServingOf, check_query, json_answer
from service.serving import Serving
from service.workers.messages import LocalTensor

router = APIRouter(tags=["inference"])

TOP_K = 5
TopK = Annotated[int, Query(ge=1, le=1000, description="How many labels, most probable first.")]
Raw = Annotated[bool, Query(description="Answer with the model's outputs as they are.")]
Version = Annotated[str | None, Query(description="A version of the model; the highest when not given.")]


@router.post(
    "/v1/models/{model}/images",
    openapi_extra={"requestBody": IMAGES_BODY, "parameters": REQUEST_HEADERS},
    responses=IMAGES_ANSWER,
    dependencies=[Depends(check_query)],
)
async def classify_images(
    request: Request, serving: ServingOf, model: str, top_k: TopK = TOP_K, raw: Raw = False, version: Version = None
) -> Response:
    """Classify the image in the body (JPEG, PNG, WebP), or every file of a multipart form."""
    return await _classify(request, serving, model, top_k, raw, version)


async def classify_plainly(request: Request) -> Response:
    """The same for a request without a query, which shortcut.py brings."""
    return await _classify(request, request.app.state.serving, request.path_params["model"], TOP_K, False, None)


async def _classify(
    request: Request, serving: Serving, model: str, top_k: int, raw: bool, version: str | None
) -> Response:
    served = serving.accepting(model, version)
    headers = headers_of(request.scope["headers"])
    with open_request(serving, served, headers) as inference:
        _image_spec(served)  # before a body that nobody can use
        body = await inference.body(request)
        pool, deadline = serving.preprocess, inference.deadline
        prepare = partial(_prepare, inference, raw=raw, top_k=top_k)
        split = partial(_form_files, headers=request.headers, max_images=serving.settings.max_images)
        if body.encoding:  # unpacked files are large, so only what is decoded of them leaves the thread
            files = split if is_form(headers) else _alone
            prepared, arrays = await body.read(
                lambda content: _decode(prepare(files(content)), deadline), pool, deadline
            )
        else:
            prepared = prepare(await body.read(split, pool, deadline) if is_form(headers) else [body.data])
            arrays = await pool.run(prepared.calls, deadline)
        job = prepared.job(arrays)
        return AnswerResponse(inference.answer(job, await inference.run(job, request)))


def _alone(content: Bytes) -> list[Bytes]:
    return [content]


def _decode(prepared: Preparation, deadline: float) -> tuple[Preparation, list[NDArray[Any]]]:
    """All of a request's files, one after the other."""
    arrays = []
    for call in prepared.calls:
        if time.monotonic() >= deadline:
            raise DeadlineExceeded("the deadline passed while the images were decoded")
        arrays.append(call())
    return prepared, arrays


def images_job(inference: InferenceRequest, body: bytes, _: Headers) -> Preparation:
    """What a request that is one file, without a query, asks for. Raises InvalidRequest."""
    return _prepare(inference, [body], raw=False, top_k=TOP_K)


def _prepare(inference: InferenceRequest, files: Sequence[Bytes], raw: bool, top_k: int) -> Preparation:
    served, settings = inference.model, inference.serving.settings
    spec = _image_spec(served)
    if not files[0]:
        raise InvalidRequest("the body is empty; send the bytes of a JPEG, PNG or WebP file")
    limits = (settings.max_image_bytes, settings.max_image_pixels)
    calls = tuple([partial(decode, data, spec, *limits) for data in files])
    return Preparation(calls, lambda arrays: _job(served, spec, arrays, raw, top_k))


def _image_spec(served: ServedModel) -> ImageSpec:
    """How images become tensors. Raises InvalidRequest."""
    if served.images is None:
        name = served.key.name
        raise InvalidRequest(
            f"model '{name}' takes no images (its task is '{served.task}'): images go into one 4-D input with "
            f"1 or 3 channels; POST its tensors to /v2/models/{name}/infer"
        )
    return served.images


def _job(served: ServedModel, spec: ImageSpec, arrays: list[NDArray[Any]], raw: bool, top_k: int) -> Job:
    names = tuple(o.name for o in served.specs.outputs) if raw else (served.main_output().name,)
    batch = arrays[0][None] if len(arrays) == 1 else np.stack(arrays)

    def answer(outputs: Outputs) -> Answer:
        content: dict[str, Any] = {"model": served.key.name, "version": str(served.key.version)}
        if raw:
            content["outputs"] = {name: np.ascontiguousarray(array) for name, array in outputs.items()}
        else:
            content["predictions"] = _predictions(served, names[0], outputs[names[0]], top_k)
        return json_answer(content)

    if not raw and served.task is not Task.IMAGE_CLASSIFICATION:
        raise InvalidRequest(f"model '{served.key.name}' does not classify; ask for ?raw=true")
    return Job(((spec.input, LocalTensor(batch)),), names, answer, independent=True)


def _predictions(served: ServedModel, output: str, scores: NDArray[Any], top_k: int) -> list[dict[str, Any]]:
    rows = require_finite(probabilities(scores.reshape(scores.shape[0], -1)), served.key.name, output)
    return [{"labels": top_labels(row, served.folder.labels, top_k)} for row in rows]


def is_form(headers: Headers) -> bool:
    """Whether the body is not one file but a form with some."""
    return headers.get(b"content-type", b"").lower().startswith(b"multipart/form-data")


def _form_files(body: Bytes, headers: StarletteHeaders, max_images: int) -> list[Bytes]:
    """The images of a form. Raises InvalidRequest, TooLarge."""
    return _run(_read_form(bytes(body), headers, max_images))


def _run(coroutine: Coroutine[Any, Any, list[Bytes]]) -> list[Bytes]:
    """What a coroutine returns that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as returned:
        files: list[Bytes] = returned.value
        return files
    raise RuntimeError("the parser of forms waits for something")


async def _read_form(body: bytes, headers: StarletteHeaders, max_images: int) -> list[Bytes]:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    parser = MultiPartParser(headers, stream(), max_files=max_images, max_fields=16)  # type: ignore[arg-type]
    parser.spool_max_size = len(body) + 1  # never a temporary file: the body is in memory already
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise TooLarge(f"the form has more than {max_images} images; send them in parts") from None
        raise InvalidRequest(f"the multipart form cannot be read: {error.message}") from None
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the multipart form cannot be read: {error}") from None
    files: list[Bytes] = []
    for name, value in form.multi_items():
        if not isinstance(value, UploadFile):
            raise InvalidRequest(f"form field '{name[:64]}' is no file; send images as files")
        files.append(await value.read())
    if not files:
        raise InvalidRequest("the form holds no file; send at least one image")
    return files
