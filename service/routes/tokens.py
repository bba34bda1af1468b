"""`POST /v1/models/{model}/tokens`: texts or token ids in; embeddings, logits or per-token outputs out, by the model's
task."""

from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from numpy.typing import NDArray
from starlette.responses import Response

from service.codecs.body import Bytes, parse_object
from service.codecs.classify import probabilities, top_labels
from service.codecs.finite import require_finite
from service.codecs.tokens import TokenBatch, TokenCodec, check_ids, check_texts, pool
from service.errors import InvalidRequest
from service.exchange import Headers, headers_of
from service.inference import Answer, InferenceRequest, Job, Outputs, open_request
from service.model import ServedModel
from service.model_config import Task
from service.routes.documents import REQUEST_HEADERS, TOKENS_ANSWER, TOKENS_BODY
from service.routes.images import TOP_K, Raw, TopK, Version
from service.routes.responses import AnswerResponse, ServingOf, check_query, json_answer
from service.serving import Serving
from service.settings import Settings

router = APIRouter(tags=["inference"])

INLINE_CHARACTERS = 2000
"""Above this, tokenizing takes long enough to be moved off the event loop."""

_INLINE_IDS = 10_000  # which become tensors within a millisecond


@router.post(
    "/v1/models/{model}/tokens",
    openapi_extra={"requestBody": TOKENS_BODY, "parameters": REQUEST_HEADERS},
    responses=TOKENS_ANSWER,
    dependencies=[Depends(check_query)],
)
async def run_tokens(
    request: Request, serving: ServingOf, model: str, top_k: TopK = TOP_K, raw: Raw = False, version: Version = None
) -> Response:
    """Run texts, or rows of token ids of any lengths. Texts are cut to the model's length; ids never are."""
    served = serving.accepting(model, version)
    with open_request(serving, served, headers_of(request.scope["headers"])) as inference:
        codec = token_codec(served)
        body = await inference.body(request)
        parse = partial(_parse, settings=serving.settings)
        ids, texts = await body.read(parse, serving.preprocess, inference.deadline)
        job = _job(served, await make_batch(serving, codec, ids, texts, inference.deadline), raw, top_k)
        return AnswerResponse(inference.answer(job, await inference.run(job, request)))


def tokens_job(inference: InferenceRequest, body: bytes, _: Headers) -> Job:
    """What a request of at most INLINE_CHARACTERS bytes and no query asks for. Raises InvalidRequest, TooLarge."""
    codec = token_codec(inference.model)
    ids, texts = _parse(body, inference.serving.settings)
    return _job(inference.model, codec.batch(ids or codec.encode_texts(texts)), raw=False, top_k=TOP_K)


def _job(served: ServedModel, batch: TokenBatch, raw: bool, top_k: int) -> Job:
    names = _outputs(served, raw)

    def answer(outputs: Outputs) -> Answer:
        content: dict[str, Any] = {"model": served.key.name, "version": str(served.key.version)}
        content.update(_answer(served, batch, outputs, names[0], raw, top_k))
        content["usage"] = {"tokens": sum(batch.lengths)}
        return json_answer(content)

    return Job(batch.inputs, names, answer, engine_lengths(served, batch), independent=True)


def token_codec(served: ServedModel) -> TokenCodec:
    """The codec of a token model. Raises InvalidRequest."""
    if served.tokens is None:
        name = served.key.name
        why = served.not_tokens or f"its task is '{served.task}'"
        raise InvalidRequest(f"model '{name}' takes no tokens: {why}; POST its tensors to /v2/models/{name}/infer")
    return served.tokens


async def make_batch(
    serving: Serving, codec: TokenCodec, ids: list[list[int]], texts: list[str], deadline: float
) -> TokenBatch:
    """Tensors for checked rows of ids, or for checked texts where there are none; off the event loop where there is
    much of either. Raises InvalidRequest, Overloaded, DeadlineExceeded."""

    def make() -> TokenBatch:
        return codec.batch(ids or codec.encode_texts(texts))

    if sum(map(len, texts)) <= INLINE_CHARACTERS and sum(map(len, ids)) <= _INLINE_IDS:
        return make()
    return (await serving.preprocess.run([make], deadline))[0]


def engine_lengths(served: ServedModel, batch: TokenBatch) -> tuple[int, ...]:
    """Row lengths for the engine, where the model's sequence dim is open; else the rows are padded to its fixed one."""
    return batch.lengths if isinstance(served.specs.inputs[0].shape[1], str) else ()


def embed(served: ServedModel, batch: TokenBatch, values: NDArray[Any], output: str) -> NDArray[np.float32]:
    """Sentence vectors (rows, hidden) of what a model answers in `output`. Raises EngineFailed."""
    config = served.folder.config.tokens
    return require_finite(pool(values, batch.lengths, config.pooling, config.normalize), served.key.name, output)


def _parse(body: Bytes, settings: Settings) -> tuple[list[list[int]], list[str]]:
    return _read(parse_object(body, partial(_read, settings=settings)), settings)


def _read(document: dict[str, Any], settings: Settings) -> tuple[list[list[int]], list[str]]:
    """The rows of ids, or the texts, of a request. Raises InvalidRequest, TooLarge."""
    unknown = [key for key in document if key not in ("ids", "text")]
    if unknown or len(document) != 1:
        what = f"unknown key '{unknown[0][:64]}'" if unknown else f"{len(document)} keys"
        raise InvalidRequest(f"the body has {what}; send either 'ids' or 'text'")
    if "ids" in document:
        return check_ids(document["ids"], "ids", settings.max_inputs), []
    value = document["text"]
    texts = [value] if isinstance(value, str) else value
    return [], check_texts(texts, "text", settings.max_inputs, settings.max_text_bytes)


def _outputs(served: ServedModel, raw: bool) -> tuple[str, ...]:
    if raw or served.task is Task.TENSORS:
        return tuple(spec.name for spec in served.specs.outputs)
    return (served.main_output().name,)


def _answer(
    served: ServedModel, batch: TokenBatch, outputs: Outputs, main: str, raw: bool, top_k: int
) -> dict[str, Any]:
    labels = served.folder.labels
    if raw or served.task is Task.TENSORS:
        return {"outputs": {name: _ragged(served, name, array, batch.lengths) for name, array in outputs.items()}}
    model = served.key.name
    if served.task is Task.TEXT_CLASSIFICATION:
        scores = require_finite(probabilities(outputs[main]), model, main)
        logits = np.ascontiguousarray(outputs[main])
        return {"predictions": [{"labels": top_labels(row, labels, top_k)} for row in scores], "logits": logits}
    if served.task is Task.TOKEN_CLASSIFICATION:
        scores = probabilities(outputs[main])
        rows = [
            require_finite(scores[row : row + 1, :length], model, main)[0] for row, length in enumerate(batch.lengths)
        ]
        return {"predictions": [{"tokens": [top_labels(token, labels, 1)[0] for token in row]} for row in rows]}
    return {"embeddings": embed(served, batch, outputs[main], main)}


def _ragged(served: ServedModel, name: str, array: NDArray[Any], lengths: tuple[int, ...]) -> list[NDArray[Any]]:
    """An output row by row, each cut to its own length along the axes that carry the sequence."""
    symbol = served.specs.inputs[0].shape[1]
    shape = next(spec.shape for spec in served.specs.outputs if spec.name == name)
    cuts = [tuple(slice(length) if dim == symbol else slice(None) for dim in shape[1:]) for length in lengths]
    return [np.ascontiguousarray(row[cut]) for row, cut in zip(array, cuts, strict=True)]
