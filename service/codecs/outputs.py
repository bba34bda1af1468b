"""Outputs of the Open Inference Protocol v2: which ones a client wants and in what form, and the answer made of them.

Called by the infer route and by `tensors.py`. An output goes as JSON, as binary data, into shared memory, or as its
best classes (the classification extension: strings "value:index:label").
"""

import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.client_memory import ClientMemory, Place
from service.codecs.finite import count_non_finite
from service.codecs.json_values import shown
from service.codecs.parameters import integer, member, refuse_unsupported, shared_place
from service.codecs.tensor_types import BINARY_ONLY, datatype_of
from service.errors import InvalidRequest
from service.record import record
from service.workers.messages import TensorInfo

LONG_OUTPUT = 1 << 15
"""Elements. orjson writes as many floats in 0.7 ms, ten times what the way to a thread costs, and lets nobody else run
meanwhile: longer outputs are written by a thread, so many elements at a time."""

_MAX_NAME = 64
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_PASSTHROUGH_DATACLASS

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that the client wants: as binary data or as JSON, its `classes` best classes where that is not 0, into
    shared memory where there is a `place`."""

    name: str
    binary: bool
    classes: int = 0
    place: Place | None = None


@record
class Classes:
    """What the classification extension needs of a model: whether axis 0 is the batch, and the labels there are."""

    batched: bool
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LongOutput:
    """The elements of a long JSON output, and a string in their place that is nowhere else in the answer."""

    values: Array
    name: str


def parse_outputs(
    value: Any, default: Any, specs: Sequence[TensorInfo], memory: ClientMemory
) -> tuple[RequestedOutput, ...]:
    """The `outputs` of a request; none are all. Raises InvalidRequest, and what `memory` raises."""
    if type(default) is not bool:
        raise InvalidRequest("parameter 'binary_data_output' is not a boolean")
    if value is None or value == []:
        return tuple([_all_of(spec.name, default) for spec in specs])
    if not isinstance(value, list):
        raise InvalidRequest("'outputs' is not a list")
    known = {spec.name: spec for spec in specs}
    wanted: dict[str, RequestedOutput] = {}
    for output in value:
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(name, str) or name not in known:
            expected = ", ".join(f"'{spec.name}'" for spec in specs)
            raise InvalidRequest(f"the model has no output '{str(name)[:_MAX_NAME]}'; it has {expected}")
        if name in wanted:
            raise InvalidRequest(f"output '{name}' is asked for twice")
        wanted[name] = _parse_output(name, member(output, "parameters"), default, known[name], memory)
    return tuple(wanted.values())


@lru_cache(1024)
def _all_of(name: str, binary: bool) -> RequestedOutput:
    """An output that is asked for in no other way; names are those of models."""
    return RequestedOutput(name, binary)


def _parse_output(
    name: str, parameters: dict[str, Any], default: bool, spec: TensorInfo, memory: ClientMemory
) -> RequestedOutput:
    refuse_unsupported(parameters)
    binary = parameters.get("binary_data", default)
    if type(binary) is not bool:
        raise InvalidRequest(f"output '{name}': 'binary_data' is not a boolean")
    classes = 0
    if "classification" in parameters:
        classes = integer(parameters, "classification")
        if not classes:
            raise InvalidRequest(f"output '{name}': 'classification' is {shown(classes)}; ask for 1 class or more")
        if datatype_of(spec.dtype) == "BYTES":
            raise InvalidRequest(f"output '{name}' holds strings, of which none is the best")
    place = shared_place(parameters, f"output '{name}'")
    if place is not None:
        if classes or binary:
            other = "'classification'" if classes else "'binary_data'"
            raise InvalidRequest(f"output '{name}': {other} and shared memory exclude each other")
        memory.check(place)
    return RequestedOutput(name, binary, classes, place)


def format_outputs(
    outputs: Sequence[tuple[RequestedOutput, Array]], classes: Classes, memory: ClientMemory
) -> tuple[list[dict[str, Any]], list[bytes], list[LongOutput]]:
    """The `outputs` of an answer, the binary data that follows the JSON, and of the outputs the long ones. Raises
    InvalidRequest for FP16 as JSON, and what `memory` raises.

    What JSON has no number for becomes null; the parameter ``non_finite`` says how many those are.
    """
    documents: list[dict[str, Any]] = []
    buffers: list[bytes] = []
    long: list[LongOutput] = []
    for wanted, array in outputs:
        if wanted.classes:
            array = best_classes(array, wanted.classes, classes)
        datatype = datatype_of(array.dtype)
        document: dict[str, Any] = {"name": wanted.name, "datatype": datatype, "shape": list(array.shape)}
        if wanted.place is not None:
            # Without parameters: the C++ client takes those of an output as the size of binary data.
            memory.write(wanted.place, _bytes_of(array, datatype))
        elif wanted.binary:
            data = _bytes_of(array, datatype)
            document["parameters"] = {"binary_data_size": len(data)}
            buffers.append(data)
        elif datatype in BINARY_ONLY:
            raise InvalidRequest(f"output '{wanted.name}' is {datatype}, which goes as binary data only")
        elif datatype == "BYTES":
            document["data"] = [_text(item) for item in array.reshape(-1)]
        else:
            document["data"] = flat = np.ascontiguousarray(array).reshape(-1)
            if flat.size > LONG_OUTPUT:
                document["data"] = LongOutput(flat, secrets.token_hex(16))
                long.append(document["data"])
            without_number = count_non_finite(array)
            if without_number:
                document["parameters"] = {"non_finite": without_number}
        documents.append(document)
    return documents, buffers, long


def to_json(answer: dict[str, Any], long: Sequence[LongOutput]) -> bytes:
    """An answer as JSON; `long` are the outputs in it that are written in pieces, in this order."""
    text = orjson.dumps(answer, _name_of, _OPTIONS)
    if not long:
        return text
    parts: list[bytes] = []
    for output in long:
        before, _, text = text.partition(f'"{output.name}"'.encode())
        parts += (before, b"[", *_pieces(output.values), b"]")
    return b"".join((*parts, text))


def _name_of(output: Any) -> str:
    """What orjson writes for what it does not know."""
    if isinstance(output, LongOutput):
        return output.name
    raise TypeError


def _pieces(data: Array) -> Iterator[bytes]:
    for start in range(0, data.size, LONG_OUTPUT):
        if start:
            yield b","
        yield orjson.dumps(data[start : start + LONG_OUTPUT], option=_OPTIONS)[1:-1]


def best_classes(array: Array, most: int, classes: Classes) -> Array:
    """The `most` highest elements of each row as strings "value:index" or "value:index:label", highest first: (rows,
    most) for a batched model, else (most,) over the whole tensor. Equal ones keep their order, NaN comes last."""
    rows = array.reshape(array.shape[0] if classes.batched and array.ndim else 1, -1)
    count = rows.shape[1]
    labels = classes.labels if len(classes.labels) == count else ()
    keys = np.where(np.isnan(rows), -np.inf, rows) if rows.dtype.kind == "f" else rows
    # Ascending, stable and from the end: equal elements end up in their own order, unsigned ones need no sign.
    order = count - 1 - np.argsort(keys[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :most]
    out = np.empty(order.shape, object)
    for row, indices in enumerate(order):
        for place, index in enumerate(indices):
            value = rows[row, index]
            number = f"{value:f}" if rows.dtype.kind == "f" else str(int(value))
            out[row, place] = f"{number}:{index}" + (f":{labels[index]}" if labels else "")
    return out if classes.batched and array.ndim else out[0]


def _bytes_of(array: Array, datatype: str) -> bytes:
    if datatype != "BYTES":
        return array.tobytes()
    items = (item if isinstance(item, bytes) else str(item).encode() for item in array.reshape(-1))
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def _text(item: Any) -> str:
    return item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)
