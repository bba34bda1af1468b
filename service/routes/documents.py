"""OpenAPI fragments for routes that read their bodies themselves. Data only; `/docs` shows it and tests hold the
server to it."""

from typing import Any

Schema = dict[str, Any]

_STRING: Schema = {"type": "string"}
_INTEGER: Schema = {"type": "integer"}
_NUMBERS: Schema = {"type": "array", "items": {"type": "number"}}
_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_LABEL: Schema = {
    "type": "object",
    "properties": {"label": _STRING, "index": _INTEGER, "probability": {"type": "number"}},
    "required": ["label", "index", "probability"],
}


def _object(properties: Schema, required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": required}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _body(schema: Schema) -> Schema:
    return {"required": True, "content": _json(schema)}


ERROR: Schema = _object({"error": _STRING}, ["error"])
_OR_NULL: Schema = {"type": ["string", "null"]}
OPENAI_ERROR: Schema = _object(
    {
        "error": _object(
            {"message": _STRING, "type": _STRING, "param": _OR_NULL, "code": _OR_NULL},
            ["message", "type", "param", "code"],
        )
    },
    ["error"],
)

_STATUSES = {
    400: "The request can never be answered; the error names what is wrong.",
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
    return {status: {"description": text, "content": _json(schema)} for status, text in _STATUSES.items()}


ERRORS, OPENAI_ERRORS = _errors(ERROR), _errors(OPENAI_ERROR)


def _answer(
    schema: Schema, text: str, errors: dict[int | str, dict[str, Any]] = ERRORS
) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": text, "content": _json(schema)}, **errors}


_FILE: Schema = {"type": "string", "format": "binary"}
IMAGES_BODY: Schema = {
    "required": True,
    "content": {
        **{f"image/{kind}": {"schema": _FILE} for kind in ("jpeg", "png", "webp")},
        "multipart/form-data": {"schema": _object({"image": _list(_FILE)}, ["image"])},
    },
}
_MODEL: Schema = {"model": _STRING, "version": _STRING}
IMAGES_ANSWER = _answer(
    _object(
        {**_MODEL, "predictions": _list(_object({"labels": _list(_LABEL)}, ["labels"])), "outputs": {"type": "object"}},
        ["model", "version"],
    ),
    "Labels of each image, or with `raw` the outputs of the model.",
)
TOKENS_BODY = _body(
    {
        "oneOf": [
            _object({"ids": {**_list(_IDS), "minItems": 1}}, ["ids"]),
            _object({"text": {"oneOf": [_STRING, {**_list(_STRING), "minItems": 1}]}}, ["text"]),
        ]
    }
)
TOKENS_ANSWER = _answer(
    _object(
        {
            **_MODEL,
            "embeddings": _list(_NUMBERS),
            "predictions": _list({"type": "object"}),
            "logits": _list(_NUMBERS),
            "outputs": {"type": "object"},
            "usage": _object({"tokens": _INTEGER}, ["tokens"]),
        },
        ["model", "version", "usage"],
    ),
    "`embeddings`, `predictions` (and `logits`) or `outputs`, by the model's task.",
)
EMBEDDINGS_BODY = _body(
    _object(
        {
            "model": _STRING,
            "input": {"oneOf": [_STRING, _list(_STRING), _IDS, _list(_IDS)]},
            "encoding_format": {"enum": ["float", "base64"], "default": "float"},
            "dimensions": _INTEGER,
            "user": _STRING,
        },
        ["model", "input"],
    )
)
EMBEDDINGS_ANSWER = _answer(
    _object(
        {
            "object": {"const": "list"},
            "data": _list(
                _object(
                    {"object": {"const": "embedding"}, "index": _INTEGER, "embedding": {"oneOf": [_NUMBERS, _STRING]}},
                    ["object", "index", "embedding"],
                )
            ),
            "model": _STRING,
            "usage": _object({"prompt_tokens": _INTEGER, "total_tokens": _INTEGER}, ["prompt_tokens", "total_tokens"]),
        },
        ["object", "data", "model", "usage"],
    ),
    "A vector for each input, in order.",
    OPENAI_ERRORS,
)
_TENSOR: Schema = _object(
    {
        "name": _STRING,
        "datatype": _STRING,
        "shape": _list(_INTEGER),
        "data": {"type": "array"},
        "parameters": {"type": "object"},
    },
    ["name", "datatype", "shape"],
)
_PARAMETERS: Schema = {
    "type": "object",
    "properties": {
        "timeout": {"type": "integer", "description": "Microseconds."},
        "priority": {"type": "integer", "description": "1 is the most urgent, 0 the default."},
        "binary_data_output": {"type": "boolean"},
    },
}
_OUTPUT: Schema = _object({"name": _STRING, "parameters": {"type": "object"}}, ["name"])
_INFER_BODY: Schema = {
    "required": True,
    "content": {
        **_json(
            _object(
                {"id": _STRING, "parameters": _PARAMETERS, "inputs": _list(_TENSOR), "outputs": _list(_OUTPUT)},
                ["inputs"],
            )
        ),
        "application/octet-stream": {"schema": _FILE},
    },
}


def infer_operation(*path_parameters: str) -> Schema:
    """The parts of an infer route that FastAPI cannot know."""
    named = [{"name": name, "in": "path", "required": True, "schema": _STRING} for name in path_parameters]
    return {"parameters": named, "requestBody": _INFER_BODY}


INFER_ANSWER = _answer(
    _object(
        {"model_name": _STRING, "model_version": _STRING, "id": _STRING, "outputs": _list(_TENSOR)},
        ["model_name", "model_version", "outputs"],
    ),
    "The outputs; binary ones follow the JSON, whose length is in Inference-Header-Content-Length.",
)
