"""OpenAPI fragments of the Open Inference Protocol v2. Data only; `/docs` shows it and tests hold the server to it."""

from service.routes.documents import (
    FILE,
    INTEGER,
    NAMES,
    READS,
    REQUEST_HEADERS,
    STRING,
    Schema,
    answer_of,
    body_of,
    json_content,
    list_of,
    object_of,
)

_BOOLEAN: Schema = {"type": "boolean"}
_UNSIGNED: Schema = {"type": "integer", "minimum": 0}
_DATATYPE: Schema = {
    "enum": [
        "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64",
        "FP16", "BF16", "FP32", "FP64", "BYTES",
    ]
}  # fmt: skip
_SHARED_MEMORY: Schema = {
    "shared_memory_region": {**STRING, "description": "A registered region that holds the tensor."},
    "shared_memory_byte_size": _UNSIGNED,
    "shared_memory_offset": _UNSIGNED,
}
_TENSOR_PARAMETERS: Schema = {
    "type": "object",
    "properties": {
        "binary_data_size": {**_UNSIGNED, "description": "Bytes of the tensor in what follows the JSON."},
        **_SHARED_MEMORY,
    },
}
_ANSWER_PARAMETERS: Schema = {
    "type": "object",
    "properties": {
        "binary_data_size": {**_UNSIGNED, "description": "Bytes of the tensor in what follows the JSON."},
        "non_finite": {**_UNSIGNED, "description": "How many values are NaN or infinity, and null in `data`."},
    },
}
_OUTPUT_PARAMETERS: Schema = {
    "type": "object",
    "properties": {
        "binary_data": _BOOLEAN,
        "classification": {"type": "integer", "minimum": 1, "description": "Only so many best classes, as BYTES."},
        **_SHARED_MEMORY,
    },
}


def _tensor(parameters: Schema) -> Schema:
    return object_of(
        {
            "name": STRING,
            "datatype": _DATATYPE,
            "shape": list_of(_UNSIGNED),
            "data": {"type": "array"},
            "parameters": parameters,
        },
        ["name", "datatype", "shape"],
    )


_PARAMETERS: Schema = {
    "type": "object",
    "properties": {
        "timeout": {**_UNSIGNED, "description": "Microseconds."},
        "priority": {**_UNSIGNED, "description": "1 is the most urgent, 0 the default."},
        "binary_data_output": {"type": "boolean"},
    },
}
_OUTPUT: Schema = object_of({"name": STRING, "parameters": _OUTPUT_PARAMETERS}, ["name"])
_INFER_BODY: Schema = {
    "required": True,
    "content": {
        **json_content(
            object_of(
                {
                    "id": STRING,
                    "parameters": _PARAMETERS,
                    "inputs": list_of(_tensor(_TENSOR_PARAMETERS)),
                    "outputs": list_of(_OUTPUT),
                },
                ["inputs"],
            )
        ),
        "application/octet-stream": {"schema": FILE},
    },
}


_LENGTH = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "required": False,
    "schema": _UNSIGNED,
    "description": "Bytes of JSON before the binary data; 0: the whole body is the one input of the model.",
}


def infer_operation(*path_parameters: str) -> Schema:
    """The parts of an infer route that FastAPI cannot know."""
    named = [{"name": name, "in": "path", "required": True, "schema": STRING} for name in path_parameters]
    return {"parameters": [*named, *REQUEST_HEADERS, _LENGTH], "requestBody": _INFER_BODY}


INFER_ANSWER = answer_of(
    object_of(
        {"model_name": STRING, "model_version": STRING, "id": STRING, "outputs": list_of(_tensor(_ANSWER_PARAMETERS))},
        ["model_name", "model_version", "outputs"],
    ),
    "The outputs; binary ones follow the JSON, whose length is in Inference-Header-Content-Length.",
    *NAMES,
    *READS,
)
INFER_ANSWER[200]["content"]["application/octet-stream"] = {"schema": FILE}

SERVER_ANSWER = answer_of(
    object_of({"name": STRING, "version": STRING, "extensions": list_of(STRING)}, ["name", "version", "extensions"]),
    "What the server is, and the extensions that work.",
)
LIVE_ANSWER = answer_of(object_of({"live": _BOOLEAN}, ["live"]), "The server answers.")
READY_ANSWER = answer_of(object_of({"ready": _BOOLEAN}, ["ready"]), "The server is ready.")
MODEL_READY_ANSWER = answer_of(
    object_of({"name": STRING, "ready": _BOOLEAN}, ["name", "ready"]), "The model is ready.", *NAMES
)
_SPEC = object_of(
    {"name": STRING, "datatype": _DATATYPE, "shape": list_of({"type": "integer", "minimum": -1})},
    ["name", "datatype", "shape"],
)
METADATA_ANSWER = answer_of(
    object_of(
        {
            "name": STRING,
            "versions": list_of(STRING),
            "platform": STRING,
            "inputs": list_of(_SPEC),
            "outputs": list_of(_SPEC),
        },
        ["name", "versions", "platform", "inputs", "outputs"],
    ),
    "Inputs and outputs of the model; open dims are -1.",
    *NAMES,
)
_CONFIG_SPEC = object_of({"name": STRING, "data_type": STRING, "dims": list_of(INTEGER)}, ["name", "data_type", "dims"])
CONFIG_ANSWER = answer_of(
    object_of(
        {
            "name": STRING,
            "platform": STRING,
            "backend": STRING,
            "max_batch_size": _UNSIGNED,
            "input": list_of(_CONFIG_SPEC),
            "output": list_of(_CONFIG_SPEC),
            "model_transaction_policy": object_of({"decoupled": _BOOLEAN}, ["decoupled"]),
            "response_cache": object_of({"enable": _BOOLEAN}, ["enable"]),
            "dynamic_batching": object_of({"max_queue_delay_microseconds": _UNSIGNED}, []),
        },
        ["name", "platform", "backend", "max_batch_size", "input", "output"],
    ),
    "The configuration of the model; `dims` are without the batch where `max_batch_size` is not 0.",
    *NAMES,
)
_DURATION = object_of({"count": _UNSIGNED, "ns": _UNSIGNED}, ["count", "ns"])
_PARTS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
_BATCH_PARTS = ("compute_input", "compute_infer", "compute_output")
_STATISTICS = object_of(
    {
        "model_stats": list_of(
            object_of(
                {
                    "name": STRING,
                    "version": STRING,
                    "last_inference": {**_UNSIGNED, "description": "Milliseconds since 1970."},
                    "inference_count": _UNSIGNED,
                    "execution_count": _UNSIGNED,
                    "inference_stats": object_of(dict.fromkeys(_PARTS, _DURATION), list(_PARTS)),
                    "batch_stats": list_of(
                        object_of(
                            {"batch_size": _UNSIGNED, **dict.fromkeys(_BATCH_PARTS, _DURATION)},
                            ["batch_size", *_BATCH_PARTS],
                        )
                    ),
                },
                ["name", "version", "inference_count", "execution_count", "inference_stats", "batch_stats"],
            )
        )
    },
    ["model_stats"],
)
STATISTICS_ANSWER = answer_of(_STATISTICS, "Counters of the model since it was loaded.", *NAMES)
ALL_STATISTICS_ANSWER = answer_of(_STATISTICS, "Counters of every model since it was loaded.")
INDEX_BODY = {**body_of(object_of({"ready": _BOOLEAN}, [])), "required": False}
INDEX_ANSWER = answer_of(
    list_of(
        object_of(
            {
                "name": STRING,
                "version": STRING,
                "state": {"enum": ["LOADING", "READY", "UNAVAILABLE"]},
                "reason": STRING,
            },
            ["name", "version", "state", "reason"],
        )
    ),
    "Every model folder and version, its state and why.",
    *READS,
)
LOAD_BODY = {
    **body_of(object_of({"parameters": {"type": "object", "additionalProperties": False}}, [])),
    "required": False,
}
UNLOAD_BODY = {
    **body_of(object_of({"parameters": {"type": "object", "properties": {"unload_dependents": _BOOLEAN}}}, [])),
    "required": False,
}
_NOTHING: Schema = {"type": "object"}
CHANGED_ANSWER = answer_of(_NOTHING, "It is done.", *NAMES, *READS)
UNREGISTERED_ANSWER = answer_of(_NOTHING, "It is done; a region that is not there is no error.")
REGISTER_BODY = body_of(
    object_of(
        {
            "key": {**STRING, "pattern": "^/[A-Za-z0-9][A-Za-z0-9._+-]{0,253}$"},
            "offset": _UNSIGNED,
            "byte_size": {"type": "integer", "minimum": 1},
        },
        ["key", "byte_size"],
    )
)
REGIONS_ANSWER = answer_of(
    list_of(
        object_of(
            {"name": STRING, "key": STRING, "offset": _UNSIGNED, "byte_size": _UNSIGNED},
            ["name", "key", "offset", "byte_size"],
        )
    ),
    "Registered regions: all of them, or the one that is named, by the path or as `?region=`.",
    *NAMES,
)
_SIZES = {"type": "object", "additionalProperties": _UNSIGNED}
_SECONDS = {"type": "number", "minimum": 0}
_STEP = {
    **dict.fromkeys(("step", "op", "kernel", "result"), STRING),
    **dict.fromkeys(("calls", "flops", "bytes", "cached_bytes"), _UNSIGNED),
    **dict.fromkeys(("seconds", "flops_per_second", "bytes_per_second", "roofline"), _SECONDS),
}
_DEVICE = {
    **dict.fromkeys(("device", "name", "arch"), STRING),
    "threads": _UNSIGNED,
    **dict.fromkeys(("peak_flops", "peak_bytes", "peak_cache_bytes"), _SECONDS),
}
_PLAN = {"name": STRING, "sizes": _SIZES, "runs": _UNSIGNED, "seconds": _SECONDS}
PROFILE_ANSWER = answer_of(
    object_of(
        {
            "name": STRING,
            "version": STRING,
            "device": object_of(_DEVICE, list(_DEVICE)),
            "plans": list_of(object_of(_PLAN, list(_PLAN))),
            "plan": {"type": ["string", "null"]},
            "steps": list_of(object_of(_STEP, list(_STEP))),
        },
        ["name", "version", "device", "plans", "plan", "steps"],
    ),
    "Every plan that is ready, and what each step of one of them took, on average of its runs so far.",
    *NAMES,
)
