"""OpenAPI fragments for routes that read their bodies themselves: those of /v1 and what all share. Data only; `/docs`
shows it and tests hold the server to it. `protocol_documents.py` has those of /v2."""

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
    403: "The API key has not the right to do this.",
    404: "No such model or version.",
    408: "The body did not arrive in time.",
    413: "Over a limit of the service.",
    415: "A Content-Encoding that is not read.",
    429: "A queue is full; Retry-After says when to come back.",
    500: "The engine failed.",
    503: "The model is not ready, or the server is shutting down.",
    504: "The deadline passed.",
}


def _errors(schema: Schema) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": text, "content": json_content(schema)} for status, text in _STATUSES.items()}


ERRORS, OPENAI_ERRORS = _errors(ERROR), _errors(OPENAI_ERROR)


def answer_of(
    schema: Schema, text: str, errors: dict[int | str, dict[str, Any]] = ERRORS
) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": text, "content": json_content(schema)}, **errors}


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
    OPENAI_ERRORS,
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
PAGE_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "The page.", "content": {"text/html": {"schema": STRING}}},
    **ERRORS,
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
MODEL_ANSWER = answer_of(_ENTRY, "One model version.", OPENAI_ERRORS)
MODELS_ANSWER = answer_of(
    object_of({"object": {"const": "list"}, "data": list_of(_ENTRY)}, ["object", "data"]),
    "Every version of every model.",
    OPENAI_ERRORS,
)
METRICS_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Prometheus or OpenMetrics text, as `Accept` asks.",
        "content": {kind: {"schema": STRING} for kind in ("text/plain", "application/openmetrics-text")},
    },
    **ERRORS,
}
