"""Request bodies: read under a size and a time limit, decompressed under the same size limit, parsed as JSON.

Called by the routes that take a body. Every limit is enforced while the body streams in, whatever its headers claim.
"""

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request

from service.codecs.compression import WINDOW_BITS, decompress
from service.errors import ClientGone, InvalidRequest, SlowBody, TooLarge, UnsupportedEncoding
from service.settings import Settings

_DIGITS_OF_A_DOUBLE = 300  # any integer of fewer is one
_MAX_EXPLAINED_BYTES = 8 << 20  # reading a body again takes longer than reading it


async def read_body(request: Request, settings: Settings) -> bytes:
    """The whole body, decompressed. Raises TooLarge, SlowBody, ClientGone, UnsupportedEncoding, InvalidRequest."""
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
    if encoding in WINDOW_BITS:
        return decompress(bytes(body), encoding, limit)
    return bytes(body)


@dataclass(frozen=True, slots=True)
class NotJson:
    """A number that no double holds, as it was written: NaN, Infinity, 1e999, an integer of 400 digits. Only `explain`
    of `parse_object` ever sees one."""

    text: str


def parse_object(body: bytes, explain: Callable[[dict[str, Any]], object] = lambda _: None) -> dict[str, Any]:
    """A JSON object. Raises InvalidRequest; the parser refuses NaN, and nesting deeper than 1,024.

    A body that would be JSON but for a NaN or an infinity is first given to `explain`, with `NotJson` in its places, to
    raise an error that says where it is and what was due there.
    """
    if not body:
        raise InvalidRequest("the body is empty; send a JSON object")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _unreadable(body, error, explain) from None
    if not isinstance(document, dict):
        raise InvalidRequest(f"the body is a JSON {type(document).__name__}; send an object")
    return document


def _unreadable(
    body: bytes, error: orjson.JSONDecodeError, explain: Callable[[dict[str, Any]], object]
) -> InvalidRequest:
    if str(error.doc)[error.pos :].startswith(("NaN", "Infinity")) or "infinity" in error.msg:
        if len(body) <= _MAX_EXPLAINED_BYTES:
            try:
                document = json.loads(body, parse_constant=NotJson, parse_float=_float, parse_int=_integer)
            except (ValueError, RecursionError):
                document = None
            if isinstance(document, dict):
                explain(document)
        return InvalidRequest(
            f"the body is not JSON, which has neither NaN nor infinity (character {error.pos}); "
            "send such values as binary data"
        )
    return InvalidRequest(f"the body is not JSON: {str(error)[:200]}")


def _float(text: str) -> Any:
    value = float(text)
    return value if math.isfinite(value) else NotJson(text)


def _integer(text: str) -> Any:
    if len(text) < _DIGITS_OF_A_DOUBLE:
        return int(text)
    return NotJson(text)
