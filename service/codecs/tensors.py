"""Tensors of the Open Inference Protocol v2: JSON and binary data, both ways.

Called by the infer route. `parse_infer` checks a request against the model's inputs, so that what reaches the engine
has the right names, dtypes and ranks.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.codecs.body import parse_object
from service.codecs.finite import count_non_finite
from service.codecs.json_values import JsonTensor, shown
from service.errors import InvalidRequest
from service.workers.messages import TensorInfo

_NAMES = {
    "bool": "BOOL",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
    "float64": "FP64",
    "object": "BYTES",
}
_BINARY_ONLY = ("FP16", "BF16")
_MAX_NAME = 64

Array = NDArray[Any]


@cache
def datatype_of(dtype: np.dtype[Any]) -> str:
    """The protocol's name of a dtype."""
    return _NAMES[dtype.name]


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that the client wants, as binary data or as JSON."""

    name: str
    binary: bool


@dataclass(frozen=True, slots=True)
class InferDocument:
    """A checked infer request; `inputs` in the model's own order."""

    id: str
    inputs: tuple[tuple[str, Array], ...]
    outputs: tuple[RequestedOutput, ...]
    priority: int
    timeout_us: int


def parse_infer(
    body: bytes, header_length: str | None, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]
) -> InferDocument:
    """Read an infer request. `header_length` is the value of `Inference-Header-Content-Length`. Raises
    InvalidRequest."""
    if header_length is None:
        data = memoryview(b"")
        document = parse_object(body, partial(_read_inputs, data=data, specs=inputs))
    else:
        size = (
            int(header_length)
            if header_length.isascii() and header_length.isdigit() and len(header_length) < 16
            else -1
        )
        if not 0 <= size <= len(body):
            raise InvalidRequest("Inference-Header-Content-Length is not the length of a JSON header inside the body")
        if size == 0:
            return _raw_body(body, inputs, outputs)
        data = memoryview(body)[size:]
        document = parse_object(body[:size], partial(_read_inputs, data=data, specs=inputs))
    parameters = _object(document, "parameters")
    _refuse_unsupported(parameters)
    return InferDocument(
        id=_identifier(document),
        inputs=_parse_inputs(document.get("inputs"), data, inputs),
        outputs=_parse_outputs(document.get("outputs"), parameters.get("binary_data_output", False), outputs),
        priority=_integer(parameters, "priority"),
        timeout_us=_integer(parameters, "timeout"),
    )


def _raw_body(body: bytes, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> InferDocument:
    """A body without JSON is the one input of the model; one open dim follows from the size."""
    if len(inputs) != 1:
        raise InvalidRequest(f"a raw body needs a model with one input; this one has {len(inputs)}")
    spec = inputs[0]
    shape = [dim if isinstance(dim, int) else 1 for dim in spec.shape]
    count = len(body) // max(spec.dtype.itemsize, 1)
    open_axes = [axis for axis, dim in enumerate(spec.shape) if isinstance(dim, str)]
    fixed = math.prod(shape)
    if open_axes and fixed:
        shape[open_axes[-1]] *= count // fixed
    array = _from_binary(memoryview(body), datatype_of(spec.dtype), spec, tuple(shape))
    wanted = tuple(RequestedOutput(output.name, True) for output in outputs)
    return InferDocument("", ((spec.name, array),), wanted, 0, 0)


def _read_inputs(document: dict[str, Any], data: memoryview, specs: Sequence[TensorInfo]) -> None:
    """Raises InvalidRequest if the inputs of a document are what is wrong with it."""
    _parse_inputs(document.get("inputs"), data, specs)


def _object(document: dict[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key, {})
    if not isinstance(value, dict):
        raise InvalidRequest(f"'{key}' is not a JSON object")
    return value


def _identifier(document: dict[str, Any]) -> str:
    value = document.get("id", "")
    if not isinstance(value, str) or len(value) > 1024:
        raise InvalidRequest("'id' is not a string of at most 1,024 characters")
    return value


def _integer(parameters: dict[str, Any], key: str) -> int:
    value = parameters.get(key, 0)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise InvalidRequest(f"parameter '{key}' is {shown(value)}; send an unsigned integer")
    return value


def _refuse_unsupported(parameters: dict[str, Any]) -> None:
    for key in parameters:
        if key.startswith(("sequence_", "shared_memory_")) or key == "classification":
            raise InvalidRequest(f"parameter '{key[:_MAX_NAME]}' is not supported; see the extensions in GET /v2")


def _parse_inputs(value: Any, data: memoryview, specs: Sequence[TensorInfo]) -> tuple[tuple[str, Array], ...]:
    if not isinstance(value, list):
        raise InvalidRequest("'inputs' is not a list of tensors")
    by_name = {spec.name: spec for spec in specs}
    found: dict[str, Array] = {}
    offset = 0
    for tensor in value:
        name = tensor.get("name") if isinstance(tensor, dict) else None
        if not isinstance(name, str):
            raise InvalidRequest("an input is not an object with a 'name'")
        if name not in by_name:
            expected = ", ".join(f"'{spec.name}'" for spec in specs)
            raise InvalidRequest(f"the model has no input '{name[:_MAX_NAME]}'; it has {expected}")
        if name in found:
            raise InvalidRequest(f"input '{name}' is given twice")
        found[name], offset = _parse_input(tensor, by_name[name], data, offset)
    if offset != len(data):
        raise InvalidRequest(f"the body has {len(data)} bytes of binary data, but the inputs claim {offset}")
    for spec in specs:
        if spec.name not in found:
            raise InvalidRequest(f"input '{spec.name}' is missing")
    _check_symbols(found, specs)
    return tuple((spec.name, found[spec.name]) for spec in specs)


def _check_symbols(arrays: dict[str, Array], specs: Sequence[TensorInfo]) -> None:
    """A dim of one name has one extent in all inputs."""
    seen: dict[str, tuple[int, str]] = {}
    for spec in specs:
        for symbol, extent in zip(spec.shape, arrays[spec.name].shape, strict=True):
            if not isinstance(symbol, str):
                continue
            first, owner = seen.setdefault(symbol, (extent, spec.name))
            if first != extent:
                raise InvalidRequest(
                    f"dim '{symbol}' is {first} in input '{owner}' but {extent} in input '{spec.name}'"
                )


def _parse_input(tensor: dict[str, Any], spec: TensorInfo, data: memoryview, offset: int) -> tuple[Array, int]:
    parameters = _object(tensor, "parameters")
    _refuse_unsupported(parameters)
    datatype = datatype_of(spec.dtype)
    if tensor.get("datatype") != datatype:
        raise InvalidRequest(
            f"input '{spec.name}' has datatype {str(tensor.get('datatype'))[:16]}; "
            f"the model takes {datatype}, convert it"
        )
    shape = _parse_shape(tensor.get("shape"), spec)
    if "binary_data_size" in parameters:
        if "data" in tensor:
            raise InvalidRequest(f"input '{spec.name}' has both 'data' and 'binary_data_size'")
        size = _integer(parameters, "binary_data_size")
        if size > len(data) - offset:
            raise InvalidRequest(
                f"input '{spec.name}': binary_data_size is {size}, but {len(data) - offset} bytes are left"
            )
        return _from_binary(data[offset : offset + size], datatype, spec, shape), offset + size
    if "data" not in tensor:
        raise InvalidRequest(f"input '{spec.name}' has no 'data'")
    if datatype in _BINARY_ONLY:
        raise InvalidRequest(f"input '{spec.name}': {datatype} comes as binary data only")
    return JsonTensor(spec.name, datatype, spec.dtype, shape).array(tensor["data"]), offset


def _parse_shape(value: Any, spec: TensorInfo) -> tuple[int, ...]:
    expected = list(spec.shape)
    if not isinstance(value, list) or any(type(dim) is not int or dim < 0 for dim in value):
        raise InvalidRequest(
            f"input '{spec.name}': 'shape' is {str(value)[:100]}; send a list of integers that are not negative"
        )
    fits = len(value) == len(expected) and all(
        isinstance(want, str) or want == got for want, got in zip(expected, value, strict=True)
    )
    if not fits:
        wanted = f"[{', '.join(map(str, expected))}]"
        raise InvalidRequest(f"input '{spec.name}' has shape {str(value)[:100]}; the model takes {wanted}")
    if any(dim == 0 for dim in value):
        raise InvalidRequest(f"input '{spec.name}' has shape {value}, which holds nothing")
    return tuple(value)


def _check_size(count: int, shape: tuple[int, ...], spec: TensorInfo) -> None:
    if count != math.prod(shape):
        raise InvalidRequest(
            f"input '{spec.name}' has {count} elements; its shape {list(shape)} holds {math.prod(shape)}"
        )


def _from_binary(data: memoryview, datatype: str, spec: TensorInfo, shape: tuple[int, ...]) -> Array:
    if datatype == "BYTES":
        return _strings(data, spec, shape)
    if len(data) % spec.dtype.itemsize:
        raise InvalidRequest(f"input '{spec.name}': {len(data)} bytes are no whole number of {datatype} values")
    _check_size(len(data) // spec.dtype.itemsize, shape, spec)
    if datatype == "BOOL":
        return np.not_equal(np.frombuffer(data, np.uint8), 0).reshape(shape)
    return np.frombuffer(data, spec.dtype).reshape(shape)


def _strings(data: memoryview, spec: TensorInfo, shape: tuple[int, ...]) -> Array:
    values: list[str] = []
    position = 0
    while position < len(data):
        end = position + 4
        size = struct.unpack_from("<I", data, position)[0] if end <= len(data) else len(data)
        if end + size > len(data):
            raise InvalidRequest(f"input '{spec.name}': a BYTES element is longer than the data")
        values.append(_text_of(bytes(data[end : end + size]), len(values), spec))
        position = end + size
    _check_size(len(values), shape, spec)
    return np.array(values, object).reshape(shape)


def _text_of(element: bytes, index: int, spec: TensorInfo) -> str:
    """A string of an ONNX model, which is text."""
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"input '{spec.name}': element {index} is not UTF-8 ({error.reason} at byte {error.start}); "
            "the strings of ONNX models are UTF-8 text"
        ) from None


def _parse_outputs(value: Any, default: Any, specs: Sequence[TensorInfo]) -> tuple[RequestedOutput, ...]:
    if type(default) is not bool:
        raise InvalidRequest("parameter 'binary_data_output' is not a boolean")
    if value is None or value == []:
        return tuple(RequestedOutput(spec.name, default) for spec in specs)
    if not isinstance(value, list):
        raise InvalidRequest("'outputs' is not a list")
    known = {spec.name for spec in specs}
    wanted: dict[str, RequestedOutput] = {}
    for output in value:
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(name, str) or name not in known:
            expected = ", ".join(f"'{spec.name}'" for spec in specs)
            raise InvalidRequest(f"the model has no output '{str(name)[:_MAX_NAME]}'; it has {expected}")
        if name in wanted:
            raise InvalidRequest(f"output '{name}' is asked for twice")
        parameters = _object(output, "parameters")
        _refuse_unsupported(parameters)
        binary = parameters.get("binary_data", default)
        if type(binary) is not bool:
            raise InvalidRequest(f"output '{name}': 'binary_data' is not a boolean")
        wanted[name] = RequestedOutput(name, binary)
    return tuple(wanted.values())


def format_outputs(
    outputs: Sequence[tuple[RequestedOutput, Array]],
) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The `outputs` of an answer and the binary data that follows the JSON. Raises InvalidRequest for FP16 as JSON.

    What JSON has no number for becomes null; the parameter ``non_finite`` says how many those are.
    """
    documents: list[dict[str, Any]] = []
    buffers: list[bytes] = []
    for wanted, array in outputs:
        datatype = datatype_of(array.dtype)
        document: dict[str, Any] = {"name": wanted.name, "datatype": datatype, "shape": list(array.shape)}
        if wanted.binary:
            data = _bytes_of(array) if datatype == "BYTES" else array.tobytes()
            document["parameters"] = {"binary_data_size": len(data)}
            buffers.append(data)
        elif datatype in _BINARY_ONLY:
            raise InvalidRequest(f"output '{wanted.name}' is {datatype}, which goes as binary data only")
        elif datatype == "BYTES":
            document["data"] = [_text(item) for item in array.reshape(-1)]
        else:
            document["data"] = np.ascontiguousarray(array).reshape(-1)
            without_number = count_non_finite(array)
            if without_number:
                document["parameters"] = {"non_finite": without_number}
        documents.append(document)
    return documents, buffers


def _bytes_of(array: Array) -> bytes:
    items = (item if isinstance(item, bytes) else str(item).encode() for item in array.reshape(-1))
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def _text(item: Any) -> str:
    return item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)
