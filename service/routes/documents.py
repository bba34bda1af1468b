"""OpenAPI fragments for routes that read their bodies themselves: those of /v1 and what all share. Data only; `/docs`
shows it and tests hold the server to it. `protocol_documents.py` has those of /v2, openapi.py puts all together."""

from collections.abc import Sequence
from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
_NUMBERS: Schema = {"type": "array", "items": {"type": "number"}}
_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_LABEL: Schema = {
    "type": "object",
    "properties": {"label": STRING, "index": INTEGER, "probability": {"type": "number"}},
    "required": ["label", "index", "probability"],
}


def object_of(properties: Schema, required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": required}


def list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def json_content(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def body_of(schema: Schema) -> Schema:
    return {"required": True, "content": json_content(schema)}


ERROR: Schema = object_of({"error": STRING}, ["error"])
_OR_NULL: Schema = {"type": ["string", "null"]}
OPENAI_ERROR: Schema = object_of(
    {
        "error": object_of(
            {"message": STRING, "type": STRING, "param": _OR_NULL, "code": _OR_NULL},
            ["message", "type", "param", "code"],
        )
    },
    ["error"],
)

_STATUSES = {
    400: "The request can never be answered; the error names what is wrong.",
    401: "No API key, or none that is known.",
    403: "The API key has not the right to do this, or nobody has.",
    404: "What the path or the request names is not there.",
    405: "This path has other methods only; Allow names them.",
    408: "The header or the body did not arrive in time; the connection is closed.",
    413: "Over a limit of the service; the connection is closed.",
    415: "A Content-Encoding that is not read.",
    429: "A queue is full; Retry-After says when to come back.",
    431: "Request line and header are too large; the connection is closed.",
    500: "The engine failed, or the server has a bug.",
    503: "The model or the server is not ready, or all connections are taken.",
    504: "The deadline passed.",
}
_ALWAYS = (400, 401, 403, 405, 408, 431, 500, 503)

NAMES = (404,)
"""What a route can also answer that names a model, a version or a region."""
READS = (413, 415, 429, 504)
"""What a route can also answer that reads a body."""

Responses = dict[int | str, dict[str, Any]]


def _errors(more: Sequence[int], schema: Schema) -> Responses:
    forms = dict.fromkeys(_STATUSES, schema)
    if schema is not ERROR:  # before the header is there, nobody knows whose client it is
        forms |= {408: {"anyOf": [schema, ERROR]}, 431: ERROR, 503: {"anyOf": [schema, ERROR]}}
    return {
        status: {"description": _STATUSES[status], "content": json_content(forms[status])}
        for status in sorted((*_ALWAYS, *more))
    }


def answer_of(schema: Schema, text: str, *more: int, error: Schema = ERROR) -> Responses:
    """All that a route can answer: 200, what every route can, and `more`. Those whose path needs no key cannot answer
    401 and 403; openapi.py knows them."""
    return {200: {"description": text, "content": json_content(schema)}, **_errors(more, error)}


FILE: Schema = {"type": "string", "format": "binary"}
IMAGES_BODY: Schema = {
    "required": True,
    "content": {
        **{f"image/{kind}": {"schema": FILE} for kind in ("jpeg", "png", "webp")},
        "multipart/form-data": {"schema": object_of({"image": list_of(FILE)}, ["image"])},
    },
}
_MODEL: Schema = {"model": STRING, "version": STRING}
IMAGES_ANSWER = answer_of(
    object_of(
        {
            **_MODEL,
            "predictions": list_of(object_of({"labels": list_of(_LABEL)}, ["labels"])),
            "outputs": {"type": "object"},
        },
        ["model", "version"],
    ),
    "Labels of each image, or with `raw` the outputs of the model.",
    *NAMES,
    *READS,
)
TOKENS_BODY = body_of(
    {
        "oneOf": [
            object_of({"ids": {**list_of(_IDS), "minItems": 1}}, ["ids"]),
            object_of({"text": {"oneOf": [STRING, {**list_of(STRING), "minItems": 1}]}}, ["text"]),
        ]
    }
)
TOKENS_ANSWER = answer_of(
    object_of(
        {
            **_MODEL,
            "embeddings": list_of(_NUMBERS),
            "predictions": list_of({"type": "object"}),
            "logits": list_of(_NUMBERS),
            "outputs": {"type": "object"},
            "usage": object_of({"tokens": INTEGER}, ["tokens"]),
        },
        ["model", "version", "usage"],
    ),
    "`embeddings`, `predictions` (and `logits`) or `outputs`, by the model's task.",
    *NAMES,
    *READS,
)
EMBEDDINGS_BODY = body_of(
    object_of(
        {
            "model": STRING,
            "input": {"oneOf": [STRING, list_of(STRING), _IDS, list_of(_IDS)]},
            "encoding_format": {"enum": ["float", "base64"], "default": "float"},
            "dimensions": INTEGER,
            "user": STRING,
        },
        ["model", "input"],
    )
)
EMBEDDINGS_ANSWER = answer_of(
    object_of(
        {
            "object": {"const": "list"},
            "data": list_of(
                object_of(
                    {"object": {"const": "embedding"}, "index": INTEGER, "embedding": {"oneOf": [_NUMBERS, STRING]}},
                    ["object", "index", "embedding"],
                )
            ),
            "model": STRING,
            "usage": object_of({"prompt_tokens": INTEGER, "total_tokens": INTEGER}, ["prompt_tokens", "total_tokens"]),
        },
        ["object", "data", "model", "usage"],
    ),
    "A vector for each input, in order.",
    *NAMES,
    *READS,
    error=OPENAI_ERROR,
)


def _header(name: str, schema: Schema, text: str) -> Schema:
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": text}


REQUEST_HEADERS: list[Schema] = [
    _header(
        "X-Timeout-Ms",
        {"type": "integer", "minimum": 1, "maximum": 86_400_000},
        "The answer is worthless after so many milliseconds.",
    ),
    _header("X-Priority", {"type": "integer", "minimum": 0, "maximum": 100}, "1 is the most urgent, 0 the default."),
]
PAGE_ANSWER: Responses = {
    200: {"description": "The page.", "content": {"text/html": {"schema": STRING}}},
    304: {"description": "The page is the one that If-None-Match names."},
    **_errors((), ERROR),
}
_ENTRY = object_of(
    {
        "id": STRING,
        "object": {"const": "model"},
        "created": INTEGER,
        "owned_by": STRING,
        "version": STRING,
        "state": {"enum": ["LOADING", "READY", "UNAVAILABLE"]},
        "reason": STRING,
        "task": _OR_NULL,
        "source": _OR_NULL,
        "license": _OR_NULL,
        "batching": _OR_NULL,
    },
    ["id", "object", "created", "owned_by", "version", "state", "reason", "task", "source", "license", "batching"],
)
MODEL_ANSWER = answer_of(_ENTRY, "One model version.", *NAMES, error=OPENAI_ERROR)
MODELS_ANSWER = answer_of(
    object_of({"object": {"const": "list"}, "data": list_of(_ENTRY)}, ["object", "data"]),
    "Every version of every model.",
    error=OPENAI_ERROR,
)
METRICS_ANSWER: Responses = {
    200: {
        "description": "Prometheus or OpenMetrics text, as `Accept` asks.",
        "content": {kind: {"schema": STRING} for kind in ("text/plain", "application/openmetrics-text")},
    },
    **_errors((), ERROR),
}
