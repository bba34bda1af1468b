"""`POST /v1/embeddings`: the OpenAI shape, so that unmodified OpenAI clients work."""

import base64
import time
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from starlette.responses import Response

from service.codecs.body import Bytes, parse_object, read_body
from service.codecs.tokens import TokenBatch, check_ids, check_texts
from service.errors import InvalidRequest
from service.exchange import headers_of
from service.inference import Answer, Job, Outputs, open_request
from service.model import ServedModel
from service.model_config import Task
from service.routes.documents import EMBEDDINGS_ANSWER, EMBEDDINGS_BODY, REQUEST_HEADERS
from service.routes.responses import AnswerResponse, ServingOf, json_answer
from service.routes.tokens import embed, engine_lengths, make_batch, token_codec
from service.settings import Settings

router = APIRouter()

_FORMATS = ("float", "base64")


@router.post(
    "/v1/embeddings",
    tags=["inference"],
    openapi_extra={"requestBody": EMBEDDINGS_BODY, "parameters": REQUEST_HEADERS},
    responses=EMBEDDINGS_ANSWER,
)
async def create_embeddings(request: Request, serving: ServingOf) -> Response:
    """Embed a text, texts, a list of token ids or several. Texts are cut to the model's length."""
    settings = serving.settings
    deadline = time.monotonic() + settings.request_timeout
    body = await read_body(request, settings)
    document, ids, texts = await body.read(partial(_parse, settings=settings), serving.preprocess, deadline)
    name = document.get("model")
    if not isinstance(name, str):
        raise InvalidRequest("'model' is missing or no string; send the name of an embedding model")
    served = serving.accepting(name)
    with open_request(serving, served, headers_of(request.scope["headers"])) as inference:
        inference.received()
        codec = token_codec(served)
        if served.task is not Task.SENTENCE_EMBEDDING:
            raise InvalidRequest(f"model '{name}' makes no embeddings (its task is '{served.task}')")
        encoding = document.get("encoding_format", "float")
        if encoding not in _FORMATS:
            raise InvalidRequest("'encoding_format' is neither 'float' nor 'base64'")
        batch = await make_batch(serving, codec, ids, texts, inference.deadline)
        job = _job(served, batch, encoding, document.get("dimensions"))
        return AnswerResponse(inference.answer(job, await inference.run(job, request)))


def _job(served: ServedModel, batch: TokenBatch, encoding: str, dimensions: Any) -> Job:
    name, output = served.key.name, served.main_output().name

    def answer(outputs: Outputs) -> Answer:
        vectors = embed(served, batch, outputs[output], output)
        if dimensions is not None and dimensions != vectors.shape[1]:
            raise InvalidRequest(f"'dimensions': the vectors of model '{name}' have {vectors.shape[1]}; leave it out")
        tokens = sum(batch.lengths)
        data = [
            {"object": "embedding", "index": index, "embedding": _encode(vector, encoding)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_answer({"object": "list", "data": data, "model": name, "usage": usage})

    return Job(batch.inputs, (output,), answer, engine_lengths(served, batch), independent=True)


def _parse(body: Bytes, settings: Settings) -> tuple[dict[str, Any], list[list[int]], list[str]]:
    """The document, and of it the rows of ids, or the texts. Raises InvalidRequest, TooLarge."""
    document = parse_object(body, partial(_read, settings=settings))
    return document, *_read(document, settings)


def _read(document: dict[str, Any], settings: Settings) -> tuple[list[list[int]], list[str]]:
    """The rows of ids, or the texts, of a request. Raises InvalidRequest, TooLarge."""
    value = document.get("input")
    if isinstance(value, list) and value and type(value[0]) is not str:
        return check_ids(value if isinstance(value[0], list) else [value], "input", settings.max_inputs), []
    texts = [value] if isinstance(value, str) else value
    return [], check_texts(texts, "input", settings.max_inputs, settings.max_text_bytes)


def _encode(vector: NDArray[np.float32], encoding: str) -> Any:
    return vector if encoding == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
