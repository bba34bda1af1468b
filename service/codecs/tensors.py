"""Infer requests of the Open Inference Protocol v2: tensors as JSON, as binary data or in shared memory.

Called by the infer route, for long bodies on a preprocessing thread; `outputs.py` has what is wanted of the answer.
`parse_infer` checks a request against the model's inputs, so that what reaches the engine has the right names, dtypes
and ranks.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.client_memory import ClientMemory
from service.codecs.body import Bytes, parse_object
from service.codecs.json_values import JsonTensor
from service.codecs.long_json import LongArray
from service.codecs.outputs import RequestedOutput, parse_outputs
from service.codecs.parameters import integer, member, refuse_unsupported, shared_place
from service.codecs.tensor_types import BINARY_ONLY, datatype_of
from service.errors import InvalidRequest, TooLarge
from service.record import record
from service.workers.messages import TensorInfo

_MAX_NAME = 64
_LARGEST_ITEM = 8  # bytes of an element

Array = NDArray[Any]


@record
class InferDocument:
    """A checked infer request; `inputs` in the model's own order."""

    id: str
    inputs: tuple[tuple[str, Array], ...]
    outputs: tuple[RequestedOutput, ...]
    priority: int
    timeout_us: int


@dataclass(frozen=True, slots=True)
class Source:
    """What bounds a request and where else its tensors may lie: `max_elements` of one tensor, the shared memory of
    clients."""

    max_elements: int
    memory: ClientMemory


def parse_infer(
    body: Bytes,
    header_length: bytes | None,
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    source: Source,
) -> InferDocument:
    """Read an infer request. `header_length` is the value of `Inference-Header-Content-Length`. Raises
    InvalidRequest, TooLarge, and what the shared memory raises."""
    if header_length is None:
        data = memoryview(b"")
        document = parse_object(body, lambda found: _read_inputs(found, data, inputs, source))
    else:
        size = int(header_length) if header_length.isdigit() and len(header_length) < 16 else -1
        if not 0 <= size <= len(body):
            raise InvalidRequest("Inference-Header-Content-Length is not the length of a JSON header inside the body")
        if size == 0:
            return _raw_body(body, inputs, outputs, source)
        data = memoryview(body)[size:]
        document = parse_object(body[:size], lambda found: _read_inputs(found, data, inputs, source))
    parameters = member(document, "parameters")
    if parameters:
        refuse_unsupported(parameters)
    return InferDocument(
        id=_identifier(document),
        inputs=_parse_inputs(document.get("inputs"), data, inputs, source),
        outputs=parse_outputs(
            document.get("outputs"), parameters.get("binary_data_output", False), outputs, source.memory
        ),
        priority=integer(parameters, "priority") if parameters else 0,
        timeout_us=integer(parameters, "timeout") if parameters else 0,
    )


def _raw_body(
    body: Bytes, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], source: Source
) -> InferDocument:
    """A body without JSON is the one input of the model; one open dim follows from the size."""
    if len(inputs) != 1:
        raise InvalidRequest(f"a raw body needs a model with one input; this one has {len(inputs)}")
    spec = inputs[0]
    data = memoryview(body)
    count = _count_strings(data) if datatype_of(spec.dtype) == "BYTES" else len(body) // spec.dtype.itemsize
    shape = [dim if isinstance(dim, int) else 1 for dim in spec.shape]
    open_axes = [axis for axis, dim in enumerate(spec.shape) if isinstance(dim, str)]
    fixed = math.prod(shape)
    if open_axes and fixed:
        shape[open_axes[-1]] = max(count // fixed, 1)  # too few for one are told so by their number
    array = _from_binary(data, datatype_of(spec.dtype), spec, tuple(shape))
    _check_elements(array.size, spec, source)
    wanted = tuple(RequestedOutput(output.name, True) for output in outputs)
    return InferDocument("", ((spec.name, array),), wanted, 0, 0)


def _count_strings(data: memoryview) -> int:
    """How many elements BYTES data begins with."""
    count = position = 0
    while position + 4 <= len(data):
        position += 4 + int(struct.unpack_from("<I", data, position)[0])
        count += 1
    return count


def _read_inputs(document: dict[str, Any], data: memoryview, specs: Sequence[TensorInfo], source: Source) -> None:
    """Raises InvalidRequest if the inputs of a document are what is wrong with it."""
    _parse_inputs(document.get("inputs"), data, specs, source)


def _identifier(document: dict[str, Any]) -> str:
    value = document.get("id", "")
    if not isinstance(value, str) or len(value) > 1024:
        raise InvalidRequest("'id' is not a string of at most 1,024 characters")
    return value


def _parse_inputs(
    value: Any, data: memoryview, specs: Sequence[TensorInfo], source: Source
) -> tuple[tuple[str, Array], ...]:
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
        found[name], offset = _parse_input(tensor, by_name[name], data, offset, source)
    if offset != len(data):
        raise InvalidRequest(f"the body has {len(data)} bytes of binary data, but the inputs claim {offset}")
    for spec in specs:
        if spec.name not in found:
            raise InvalidRequest(f"input '{spec.name}' is missing")
    _check_symbols(found, specs)
    return tuple([(spec.name, found[spec.name]) for spec in specs])


def _check_symbols(arrays: dict[str, Array], specs: Sequence[TensorInfo]) -> None:
    """A dim of one name has one extent in all inputs."""
    if len(specs) == 1 and len(set(specs[0].shape)) == len(specs[0].shape):
        return  # no name is there twice
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


def _parse_input(
    tensor: dict[str, Any], spec: TensorInfo, data: memoryview, offset: int, source: Source
) -> tuple[Array, int]:
    """One input, and where the binary data of the next one begins."""
    parameters = member(tensor, "parameters")
    if parameters:
        refuse_unsupported(parameters)
    datatype = datatype_of(spec.dtype)
    if tensor.get("datatype") != datatype:
        raise InvalidRequest(
            f"input '{spec.name}' has datatype {str(tensor.get('datatype'))[:16]}; "
            f"the model takes {datatype}, convert it"
        )
    shape = _parse_shape(tensor.get("shape"), spec)
    place = shared_place(parameters, f"input '{spec.name}'") if parameters else None
    has_data, has_size = "data" in tensor, "binary_data_size" in parameters
    if has_data + has_size + (place is not None) > 1:
        ways = {"data": has_data, "binary_data_size": has_size, "shared memory": place}
        given = [f"'{way}'" for way, is_given in ways.items() if is_given]
        raise InvalidRequest(f"input '{spec.name}' has both {' and '.join(given)}")
    if place is not None:
        if place.nbytes > source.max_elements * _LARGEST_ITEM:
            raise TooLarge(f"input '{spec.name}' has {place.nbytes} bytes of shared memory; send it in parts")
        array = _from_binary(memoryview(source.memory.read(place)), datatype, spec, shape)
    elif has_size:
        size = integer(parameters, "binary_data_size")
        if size > len(data) - offset:
            raise InvalidRequest(
                f"input '{spec.name}': binary_data_size is {size}, but {len(data) - offset} bytes are left"
            )
        array = _from_binary(data[offset : offset + size], datatype, spec, shape)
        offset += size
    elif not has_data:
        raise InvalidRequest(f"input '{spec.name}' has no 'data'")
    elif datatype in BINARY_ONLY:
        raise InvalidRequest(f"input '{spec.name}': {datatype} comes as binary data only")
    else:
        values = tensor["data"]
        if type(values) is LongArray:
            _check_elements(values.count, spec, source)  # before they are made
        array = JsonTensor(spec.name, datatype, spec.dtype, shape).array(values)
    _check_elements(array.size, spec, source)
    return array, offset


def _check_elements(count: int, spec: TensorInfo, source: Source) -> None:
    if count > source.max_elements:
        raise TooLarge(
            f"input '{spec.name}' has {count} elements; the limit is {source.max_elements}; send it in parts"
        )


def _parse_shape(value: Any, spec: TensorInfo) -> tuple[int, ...]:
    if type(value) is list and len(value) == len(spec.shape):
        for want, got in zip(spec.shape, value, strict=True):
            if type(got) is not int or got < 1 or (want != got and type(want) is int):
                break
        else:
            return tuple(value)
    raise _wrong_shape(value, spec)


def _wrong_shape(value: Any, spec: TensorInfo) -> InvalidRequest:
    """What is wrong with a shape."""
    if not isinstance(value, list) or any(type(dim) is not int or dim < 0 for dim in value):
        return InvalidRequest(
            f"input '{spec.name}': 'shape' is {str(value)[:100]}; send a list of integers that are not negative"
        )
    fits = len(value) == len(spec.shape) and all(
        isinstance(want, str) or want == got for want, got in zip(spec.shape, value, strict=True)
    )
    if fits:
        return InvalidRequest(f"input '{spec.name}' has shape {value}, which holds nothing")
    wanted = f"[{', '.join(map(str, spec.shape))}]"
    return InvalidRequest(f"input '{spec.name}' has shape {str(value)[:100]}; the model takes {wanted}")


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
