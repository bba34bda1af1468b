"""Request bodies: read under a size and a time limit, decompressed under the same size limit, parsed as JSON.

Called by the routes that take a body. Every limit is enforced while the body streams in, whatever its headers claim.
"""

import asyncio
import zlib
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request

from service.errors import ClientGone, InvalidRequest, SlowBody, TooLarge, UnsupportedEncoding
from service.settings import Settings

_WINDOW_BITS = {"gzip": 31, "deflate": 15}


async def read_body(request: Request, settings: Settings) -> bytes:
    """The whole body, decompressed. Raises TooLarge, SlowBody, ClientGone, UnsupportedEncoding, InvalidRequest."""
    limit = settings.max_body_bytes
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "") and encoding not in _WINDOW_BITS:
        raise UnsupportedEncoding(f"Content-Encoding '{encoding[:40]}' is not read; send gzip, deflate or none")
    declared = request.headers.get("content-length", "0")
    claimed = int(declared) if declared.isdecimal() else 0
    oversized = TooLarge(f"the body is larger than {limit} bytes")
    if claimed > limit and "expect" in request.headers:
        raise oversized  # the client asks before it sends
    body = bytearray()
    seen = 0
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for chunk in request.stream():
                seen += len(chunk)
                if max(seen, claimed) <= limit:
                    body += chunk
                elif seen > 2 * limit:
                    break  # until here it was read on, so that a client that is still sending gets to read the answer
    except TimeoutError:
        raise SlowBody(f"the body did not arrive within {settings.body_timeout:g} s") from None
    except ClientDisconnect:
        raise ClientGone("the client closed the connection while sending") from None
    if max(seen, claimed) > limit:
        raise oversized
    if encoding in _WINDOW_BITS:
        return _decompress(bytes(body), encoding, limit)
    return bytes(body)


def _decompress(body: bytes, encoding: str, limit: int) -> bytes:
    inflater = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        data = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not {encoding} data: {error}") from None
    if len(data) > limit:
        raise TooLarge(f"the body is larger than {limit} bytes after decompression")
    if not inflater.eof:
        raise InvalidRequest(f"the {encoding} body ends too early")
    return data


def parse_json(body: bytes) -> Any:
    """A JSON document. Raises InvalidRequest; the parser refuses NaN, and nesting deeper than 1,024."""
    if not body:
        raise InvalidRequest("the body is empty; send a JSON object")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {str(error)[:200]}") from None


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises InvalidRequest."""
    document = parse_json(body)
    if not isinstance(document, dict):
        raise InvalidRequest(f"the body is a JSON {type(document).__name__}; send an object")
    return document
