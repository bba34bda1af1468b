"""`POST /v1/models/{model}/tokens`: texts or token ids in; embeddings, logits or per-token outputs out, by the model's
task."""

from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from numpy.typing import NDArray

from service.codecs.body import parse_object
from service.codecs.classify import probabilities, top_labels
from service.codecs.finite import require_finite
from service.codecs.tokens import TokenBatch, TokenCodec, check_ids, check_texts, pool
from service.errors import InvalidRequest
from service.inference import InferenceRequest, open_request
from service.model import ServedModel
from service.model_config import Task
from service.routes.documents import REQUEST_HEADERS, TOKENS_ANSWER, TOKENS_BODY
from service.routes.images import Raw, TopK, Version
from service.routes.responses import JsonResponse, ServingOf, check_query
from service.serving import Serving
from service.settings import Settings

router = APIRouter(tags=["inference"])

# Above this, tokenizing takes long enough to be moved off the event loop.
_INLINE_CHARACTERS = 2000


@router.post(
    "/v1/models/{model}/tokens",
    openapi_extra={"requestBody": TOKENS_BODY, "parameters": REQUEST_HEADERS},
    responses=TOKENS_ANSWER,
    dependencies=[Depends(check_query)],
)
async def run_tokens(
    request: Request, serving: ServingOf, model: str, top_k: TopK = 5, raw: Raw = False, version: Version = None
) -> JsonResponse:
    """Run texts, or rows of token ids of any lengths. Texts are cut to the model's length; ids never are."""
    served = serving.accepting(model, version)
    with open_request(serving, served, request) as inference:
        codec = token_codec(served)
        rows = await _rows(serving, codec, await inference.body())
        batch = codec.batch(rows)
        names = _outputs(served, raw)
        outputs = await inference.run_rows(batch.inputs, names, engine_lengths(served, batch))
        answer: dict[str, Any] = {"model": served.key.name, "version": str(served.key.version)}
        answer.update(_answer(served, batch, outputs, names[0], raw, top_k))
        answer["usage"] = {"tokens": sum(batch.lengths)}
        return JsonResponse(answer, headers=inference.headers())


def token_codec(served: ServedModel) -> TokenCodec:
    """The codec of a token model. Raises InvalidRequest."""
    if served.tokens is None:
        name = served.key.name
        why = served.not_tokens or f"its task is '{served.task}'"
        raise InvalidRequest(f"model '{name}' takes no tokens: {why}; POST its tensors to /v2/models/{name}/infer")
    return served.tokens


async def encode(serving: Serving, codec: TokenCodec, texts: list[str]) -> list[list[int]]:
    """Token ids of checked texts, off the event loop where they are long. Raises InvalidRequest, Overloaded."""
    if sum(len(text) for text in texts) <= _INLINE_CHARACTERS:
        return codec.encode_texts(texts)
    return (await serving.preprocess.run([lambda: codec.encode_texts(texts)]))[0]


def engine_lengths(served: ServedModel, batch: TokenBatch) -> tuple[int, ...]:
    """Row lengths for the engine, where the model's sequence dim is open; else the rows are padded to its fixed one."""
    return batch.lengths if isinstance(served.specs.inputs[0].shape[1], str) else ()


async def embed(inference: InferenceRequest, codec: TokenCodec, rows: list[list[int]]) -> NDArray[np.float32]:
    """Sentence vectors (rows, hidden) of rows of token ids. Raises the errors of service.errors."""
    served = inference.model
    batch = codec.batch(rows)
    name = served.main_output().name
    outputs = await inference.run_rows(batch.inputs, (name,), engine_lengths(served, batch))
    config = served.folder.config.tokens
    return require_finite(pool(outputs[name], batch.mask, config.pooling, config.normalize), served.key.name, name)


async def _rows(serving: Serving, codec: TokenCodec, body: bytes) -> list[list[int]]:
    document = parse_object(body, partial(_read, settings=serving.settings))
    ids, texts = _read(document, serving.settings)
    return ids or await encode(serving, codec, texts)


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
    served: ServedModel, batch: TokenBatch, outputs: dict[str, NDArray[Any]], main: str, raw: bool, top_k: int
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
    config = served.folder.config.tokens
    vectors = pool(outputs[main], batch.mask, config.pooling, config.normalize)
    return {"embeddings": require_finite(vectors, model, main)}


def _ragged(served: ServedModel, name: str, array: NDArray[Any], lengths: tuple[int, ...]) -> list[NDArray[Any]]:
    """An output row by row, each cut to its own length along the axes that carry the sequence."""
    symbol = served.specs.inputs[0].shape[1]
    shape = next(spec.shape for spec in served.specs.outputs if spec.name == name)
    cuts = [tuple(slice(length) if dim == symbol else slice(None) for dim in shape[1:]) for length in lengths]
    return [np.ascontiguousarray(row[cut]) for row, cut in zip(array, cuts, strict=True)]
