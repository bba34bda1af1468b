"""Messages as bytes: what crosses the socket between the HTTP process and an engine process.

A frame is a header (two lengths), JSON, and the bytes of small tensors; large ones lie in shared memory and the JSON
says where. Encoders and decoders are made from the type hints of the message classes, so a new message or field needs
nothing here, and a decoder can make nothing but those classes.
"""

import struct
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any, Union, get_args, get_origin, get_type_hints

import ml_dtypes  # noqa: F401 (names bfloat16 to NumPy; a front end has no engine to do so)
import numpy as np
import orjson
from numpy.typing import NDArray

from service.workers.messages import Command, LocalTensor, ModelStats, Report
from service.workers.shared_memory import Blocks, Leases

INLINE_BYTES = 32 << 10
"""Tensors of a message that are no larger together travel in the frame: copying them costs less than a block does."""

_HEAD = struct.Struct("<II")
_LONGEST_JSON = 64 << 20
_ALIGNMENT = 64
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Release:
    """The reader of a block has done with it."""

    start: int


@dataclass(frozen=True, slots=True)
class Beat:
    """The engine process lives; its current run has taken `busy_seconds` (0: none runs)."""

    busy_seconds: float


@dataclass(frozen=True, slots=True)
class Starved:
    """An answer waits for shared memory: answers that nobody looks at any more should be let go."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line for the log of the HTTP process."""

    level: int
    logger: str
    text: str


@dataclass(frozen=True, slots=True)
class Dying:
    """The engine process is about to end by itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class Counted:
    """What the engine processes before this one had counted: the first thing that one is told."""

    models: tuple[ModelStats, ...]


ToEngine = Command | Release | Counted
FromEngine = Report | Release | Beat | Starved | LogLine | Dying


class WireError(Exception):
    """Bytes that are no message."""


class _Writer:
    """The tensors of a message to be sent, each with its place in the payload."""

    def __init__(self) -> None:
        self._arrays: list[tuple[int, Array | bytes]] = []
        self.nbytes = 0

    def add(self, array: Array) -> int:
        content: Array | bytes = _pack_strings(array) if array.dtype == object else array
        place = -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._arrays.append((place, content))
        self.nbytes = place + (len(content) if isinstance(content, bytes) else content.nbytes)
        return place

    def copy_to(self, target: bytearray | Array) -> None:
        for place, content in self._arrays:
            if isinstance(content, bytes):
                np.frombuffer(target, np.uint8)[place : place + len(content)] = np.frombuffer(content, np.uint8)
            elif content.size:
                np.ndarray(content.shape, content.dtype, target, place)[...] = content


class _Reader:
    """The payload of a message received."""

    def __init__(self, payload: bytes | Array) -> None:
        self._payload = payload

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...], place: int) -> Array:
        if dtype.hasobject:
            return _unpack_strings(bytes(self._payload[place:]), shape)
        if 0 in shape:
            return np.empty(shape, dtype)
        array: Array = np.ndarray(shape, dtype, self._payload, place)
        return array


def _pack_strings(array: Array) -> bytes:
    parts = []
    for item in array.reshape(-1):
        data = item if isinstance(item, bytes) else str(item).encode()
        parts.append(struct.pack("<?I", isinstance(item, bytes), len(data)) + data)
    return b"".join(parts)


def _unpack_strings(data: bytes, shape: tuple[int, ...]) -> Array:
    array = np.empty(shape, object)
    position = 0
    for index in np.ndindex(shape):
        is_bytes, size = struct.unpack_from("<?I", data, position)
        position += 5
        item = data[position : position + size]
        array[index] = item if is_bytes else item.decode()
        position += size
    return array


# ---- codecs, made once from type hints

_Encode = Callable[[Any, _Writer], Any]
_Decode = Callable[[Any, _Reader], Any]
_Codec = tuple[_Encode, _Decode]


def _codec(hint: Any) -> _Codec:
    origin, args = get_origin(hint), get_args(hint)
    if hint is LocalTensor:
        return _tensor_codec()
    if hint is float:
        return _encode_float, lambda value, _: float(value)
    if hint in (str, int, bool):
        return lambda value, _: value, _checked(hint)
    if origin is np.dtype:
        return lambda value, _: value.name, lambda value, _: np.dtype(value)
    if origin is tuple:
        return _tuple_codec(args)
    if origin in (Union, types.UnionType):
        return _union_codec(args)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return lambda value, _: value.value, lambda value, _: hint(value)
    if is_dataclass(hint) and isinstance(hint, type):
        return _dataclass_codec(hint)
    raise TypeError(f"messages have no fields of type {hint}")


def _encode_float(value: float, _: _Writer) -> float | str:
    return value if value - value == 0 else str(value)  # JSON has no infinities


def _checked(kind: type) -> _Decode:
    def decode(value: Any, _: _Reader) -> Any:
        if not isinstance(value, kind):
            raise WireError(f"{value!r} where a {kind.__name__} belongs")
        return value

    return decode


def _tensor_codec() -> _Codec:
    def encode(tensor: LocalTensor, writer: _Writer) -> Any:
        array = tensor.view()
        return array.dtype.name, array.shape, writer.add(array)

    def decode(value: Any, reader: _Reader) -> LocalTensor:
        name, shape, place = value
        return LocalTensor(reader.array(np.dtype(name), tuple(shape), place))

    return encode, decode


def _tuple_codec(args: tuple[Any, ...]) -> _Codec:
    if len(args) == 2 and args[1] is Ellipsis:
        encode, decode = _codec(args[0])
        return (
            lambda value, writer: [encode(item, writer) for item in value],
            lambda value, reader: tuple([decode(item, reader) for item in value]),
        )
    codecs = [_codec(arg) for arg in args]
    return (
        lambda value, writer: [one[0](item, writer) for one, item in zip(codecs, value, strict=True)],
        lambda value, reader: tuple([one[1](item, reader) for one, item in zip(codecs, value, strict=True)]),
    )


def _union_codec(args: tuple[Any, ...]) -> _Codec:
    """`X | None`, or `int | str`, which JSON tells apart by itself."""
    present = [arg for arg in args if arg is not type(None)]
    if set(present) <= {int, str}:
        return lambda value, _: value, lambda value, _: value
    (only,) = present
    encode, decode = _codec(only)
    return (
        lambda value, writer: None if value is None else encode(value, writer),
        lambda value, reader: None if value is None else decode(value, reader),
    )


def _dataclass_codec(kind: type[Any]) -> _Codec:
    hints = get_type_hints(kind)
    parts = [(field.name, *_codec(hints[field.name])) for field in fields(kind)]
    return (
        lambda value, writer: [encode(getattr(value, name), writer) for name, encode, _ in parts],
        lambda value, reader: kind(*[decode(item, reader) for (_, _, decode), item in zip(parts, value, strict=True)]),
    )


_TO_ENGINE: Mapping[str, _Codec] = {kind.__name__: _codec(kind) for kind in get_args(ToEngine)}
_FROM_ENGINE: Mapping[str, _Codec] = {kind.__name__: _codec(kind) for kind in get_args(FromEngine)}
_CODECS: Mapping[str, _Codec] = {**_TO_ENGINE, **_FROM_ENGINE}


# ---- frames


def encode(message: ToEngine | FromEngine, blocks: Blocks, wait: float = 0.0) -> bytes:
    """The frame of a message; large tensors are copied to a new block. Raises RegionFull (see `Blocks.take`). Texts
    that are not UTF-8, like names of some files, arrive with escapes in them."""
    name = type(message).__name__
    writer = _Writer()
    body = _CODECS[name][0](message, writer)
    if writer.nbytes <= INLINE_BYTES:
        payload = bytearray(writer.nbytes)
        writer.copy_to(payload)
        block = None
    else:
        start, target = blocks.take(writer.nbytes, wait)
        writer.copy_to(target)
        payload, block = bytearray(), (start, writer.nbytes)
    try:
        text = orjson.dumps((name, body, block), option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        text = orjson.dumps((name, _escaped(body), block), option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join((_HEAD.pack(len(text), len(payload)), text, payload))


def printable(text: str) -> str:
    """The text; bytes of file names that are not UTF-8, which are lone surrogates in it, as escapes like '\\udce8'."""
    return text.encode(errors="backslashreplace").decode()


def _escaped(body: Any) -> Any:
    """The same with escapes for what is not UTF-8."""
    if isinstance(body, str):
        return printable(body)
    if isinstance(body, dict):
        return {_escaped(key): _escaped(value) for key, value in body.items()}
    return [_escaped(value) for value in body] if isinstance(body, list | tuple) else body


def decode_command(text: bytes, payload: bytes, leases: Leases) -> ToEngine:
    """The message of a frame that an engine process gets. Raises WireError."""
    message: ToEngine = _decode(text, payload, leases, _TO_ENGINE)
    return message


def decode_report(text: bytes, payload: bytes, leases: Leases) -> FromEngine:
    """The message of a frame that comes from an engine process. Raises WireError."""
    message: FromEngine = _decode(text, payload, leases, _FROM_ENGINE)
    return message


def _decode(text: bytes, payload: bytes, leases: Leases, codecs: Mapping[str, _Codec]) -> Any:
    try:
        name, body, block = orjson.loads(text)
        reader = _Reader(payload if block is None else leases.view(*block))
        return codecs[name][1](body, reader)
    except (ValueError, TypeError, KeyError, struct.error) as error:
        raise WireError(f"not a message: {error!r}") from error


class FrameReader:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The frames that are complete now, as (JSON, payload). Raises WireError for lengths that no message has."""
        data = self._rest + data if self._rest else data
        position = 0
        while len(data) - position >= _HEAD.size:
            text_size, payload_size = _HEAD.unpack_from(data, position)
            if text_size > _LONGEST_JSON or payload_size > INLINE_BYTES:
                raise WireError(f"a frame of {text_size} + {payload_size} bytes")
            start = position + _HEAD.size
            middle, end = start + text_size, start + text_size + payload_size
            if end > len(data):
                break
            position = end
            yield data[start:middle], data[middle:end]
        self._rest = data[position:]
