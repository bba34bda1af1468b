"""Request bodies: read under a size and a time limit, decompressed under the same size limit, parsed as JSON.

Called by the routes that take a body. Every limit is enforced while the body streams in, whatever its headers claim.
What is long or compressed is decompressed and parsed on the preprocessing threads, both in one call, so that no more
bodies are unpacked at a time than there are threads; `long_json.py` has how JSON is parsed there.
"""

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request

from service.codecs.compression import WINDOW_BITS, decompress
from service.codecs.long_json import NotInJson, outline
from service.errors import ClientGone, InvalidRequest, SlowBody, TooLarge, UnsupportedEncoding
from service.preprocess import PreprocessPool
from service.settings import Settings

Bytes = bytes | bytearray
T = TypeVar("T")

INLINE_BYTES = 64 << 10
"""Longer bodies leave the event loop. The way to a thread and back costs 60 to 80 µs of a CPU, JSON 3 ns a byte (floats
of nine digits) to 12 ns (single digits): what stays holds the loop for less than a millisecond, and what goes takes a
third longer at most."""

_DIGITS_OF_A_DOUBLE = 300  # any integer of fewer is one
_MAX_EXPLAINED_BYTES = 8 << 20  # reading a body again takes longer than reading it
_SHOWN = 40  # characters of what cannot be read


@dataclass(frozen=True, slots=True)
class Body:
    """A body as it came. `encoding` is that of its content, empty where it has none; `limit` is in bytes."""

    data: Bytes
    encoding: str
    limit: int

    def content(self) -> Bytes:
        """What was sent, decompressed. Raises InvalidRequest, TooLarge."""
        return decompress(self.data, self.encoding, self.limit) if self.encoding else self.data

    async def read(
        self, parse: Callable[[Bytes], T], pool: PreprocessPool, deadline: float, inline: bool | None = None
    ) -> T:
        """What `parse` makes of the content, by a thread of the pool unless it is short; `inline` says so for another
        reason. Raises what `parse` raises; InvalidRequest, TooLarge, Overloaded; DeadlineExceeded at `deadline`, which
        is of `time.monotonic()`."""
        if not self.encoding and (len(self.data) <= INLINE_BYTES if inline is None else inline):
            return parse(self.data)
        return (await pool.run([lambda: parse(self.content())], deadline))[0]


async def read_body(request: Request, settings: Settings) -> Body:
    """The whole body. Raises TooLarge, SlowBody, ClientGone, UnsupportedEncoding."""
    limit = settings.max_body_bytes
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "") and encoding not in WINDOW_BITS:
        raise UnsupportedEncoding(f"Content-Encoding '{encoding[:40]}' is not read; send gzip, deflate or none")
    declared = request.headers.get("content-length", "0")
    claimed = int(declared) if declared.isdecimal() else 0
    oversized = TooLarge(f"the body is larger than {limit} bytes; send it in parts")
    if claimed > limit:
        raise oversized  # before anything of it is there; the connection lets a client that is sending read the answer
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit:
                    raise oversized
                body += chunk
    except TimeoutError:
        raise SlowBody(f"the body did not arrive within {settings.body_timeout:g} s") from None
    except ClientDisconnect:
        raise ClientGone("the client closed the connection while sending") from None
    return Body(body, encoding if encoding in WINDOW_BITS else "", limit)


@dataclass(frozen=True, slots=True)
class NotJson:
    """A number that no double holds, as it was written: NaN, Infinity, 1e999, an integer of 400 digits. Only `explain`
    of `parse_object`, and who reads the elements of a long array, ever see one."""

    text: str


def parse_object(body: Bytes, explain: Callable[[dict[str, Any]], object] = lambda _: None) -> dict[str, Any]:
    """A JSON object. Raises InvalidRequest; the parser refuses NaN, and nesting deeper than 1,024.

    A body that would be JSON but for a NaN or an infinity is first given to `explain`, with `NotJson` in its places, to
    raise an error that says where it is and what was due there.

    Of a body over INLINE_BYTES, which is none for the event loop, long arrays of numbers under the key `data` become
    `LongArray`, and all else is bounded before it is parsed: TooLarge.
    """
    if not body:
        raise InvalidRequest("the body is empty; send a JSON object")
    text, put_back = (body, _as_it_is) if len(body) <= INLINE_BYTES else outline(body)
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise _unreadable(text, error, lambda found: explain(put_back(found)), text is body) from None
    if not isinstance(document, dict):
        raise InvalidRequest(f"the body is a JSON {type(document).__name__}; send an object")
    return put_back(document)


def _as_it_is(document: dict[str, Any]) -> dict[str, Any]:
    return document


def parse_elements(text: bytes) -> list[Any]:
    """The elements of a JSON array, which `text` has without its brackets; `NotJson` in the places of what no double
    holds. Raises NotInJson."""
    array = b"[%b]" % text
    try:
        found = orjson.loads(array)
    except orjson.JSONDecodeError as error:
        found = _with_constants(array) if _has_no_number(error) else None
        if found is None:
            raise NotInJson(error.msg) from None
    assert isinstance(found, list)
    return found


def _has_no_number(error: orjson.JSONDecodeError) -> bool:
    return str(error.doc).startswith(("NaN", "Infinity"), error.pos) or "infinity" in error.msg


def _with_constants(text: Bytes) -> Any:
    """What `text` is if NaN and infinity are JSON, too; None if it is not even that."""
    try:
        return json.loads(text, parse_constant=NotJson, parse_float=_float, parse_int=_integer)
    except (ValueError, RecursionError):
        return None


def _unreadable(
    text: Bytes, error: orjson.JSONDecodeError, explain: Callable[[dict[str, Any]], object], whole: bool
) -> InvalidRequest:
    """`whole`: the text is all of the body, so that places in it mean something to the client."""
    rest = str(error.doc)[error.pos : error.pos + _SHOWN].strip()
    place = f"character {error.pos}" if whole else f"at '{rest}'" if rest else "at its end"
    if _has_no_number(error):
        if len(text) <= _MAX_EXPLAINED_BYTES:
            document = _with_constants(text)
            if isinstance(document, dict):
                explain(document)
        return InvalidRequest(
            f"the body is not JSON, which has neither NaN nor infinity ({place}); send such values as binary data"
        )
    return InvalidRequest(f"the body is not JSON: {str(error)[:200] if whole else f'{error.msg} {place}'}")


def _float(text: str) -> Any:
    value = float(text)
    return value if math.isfinite(value) else NotJson(text)


def _integer(text: str) -> Any:
    if len(text) < _DIGITS_OF_A_DOUBLE:
        return int(text)
    return NotJson(text)
