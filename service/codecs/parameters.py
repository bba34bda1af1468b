"""The `parameters` of requests, inputs and outputs of the Open Inference Protocol v2. Called by `tensors.py`,
`outputs.py` and the routes of the protocol."""

from typing import Any

from service.client_memory import Place
from service.codecs.json_values import shown
from service.errors import InvalidRequest

_MAX_NAME = 64
_SHARED = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")


def member(document: dict[str, Any], key: str) -> dict[str, Any]:
    """An object that may be missing. Raises InvalidRequest."""
    value = document.get(key, {})
    if not isinstance(value, dict):
        raise InvalidRequest(f"'{key}' is not a JSON object")
    return value


def integer(parameters: dict[str, Any], key: str) -> int:
    """An unsigned integer, 0 where it is missing. Raises InvalidRequest."""
    value = parameters.get(key, 0)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise InvalidRequest(f"parameter '{key}' is {shown(value)}; send an unsigned integer")
    return value


def refuse_unsupported(parameters: dict[str, Any]) -> None:
    """Raises InvalidRequest for what would change the answer and is not known here."""
    for key in parameters:
        if key.startswith("sequence_") or (key.startswith("shared_memory_") and key not in _SHARED):
            raise InvalidRequest(f"parameter '{key[:_MAX_NAME]}' is not supported; see the extensions in GET /v2")


def shared_place(parameters: dict[str, Any], what: str) -> Place | None:
    """Where in shared memory a tensor lies, if it does. Raises InvalidRequest."""
    given = [key for key in _SHARED if key in parameters]
    if not given:
        return None
    region = parameters.get("shared_memory_region")
    if not isinstance(region, str) or "shared_memory_byte_size" not in parameters:
        missing = "shared_memory_byte_size" if isinstance(region, str) else "shared_memory_region"
        raise InvalidRequest(f"{what} has '{given[0]}', but no '{missing}' that says where")
    return Place(region, integer(parameters, "shared_memory_offset"), integer(parameters, "shared_memory_byte_size"))
