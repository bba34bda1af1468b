"""Compressed bodies, both ways: gzip and deflate (zlib, RFC 9110). Called by `body.py` and the infer route."""

import zlib

from service.errors import InvalidRequest, TooLarge

WINDOW_BITS = {"gzip": 31, "deflate": 15}
"""Content codings that are read and written, and zlib's parameter for each."""

_LEVEL = 1  # tensors hardly get smaller at higher ones, and others wait meanwhile


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """The content of a body; one of gzip may have several members (RFC 1952). Raises InvalidRequest, and TooLarge as
    soon as it is over `limit` bytes."""
    contents, size, rest = list[bytes](), 0, body
    while not contents or rest:
        inflater = zlib.decompressobj(WINDOW_BITS[encoding])
        try:
            contents.append(inflater.decompress(rest, limit + 1 - size))
        except zlib.error as error:
            raise InvalidRequest(f"the body is not {encoding} data: {error}") from None
        size += len(contents[-1])
        if size > limit:
            raise TooLarge(f"the body is larger than {limit} bytes after decompression")
        if not inflater.eof:
            raise InvalidRequest(f"the {encoding} body ends too early")
        rest = inflater.unused_data
        if rest and encoding != "gzip":
            raise InvalidRequest(f"{len(rest)} bytes follow the {encoding} data of the body")
    return contents[0] if len(contents) == 1 else b"".join(contents)


def asked_for(accept_encoding: bytes) -> str | None:
    """The coding that a client asks an answer to have: the one it names alone.

    Most HTTP libraries name all they can read with every request, which is no wish, and compressing floats costs more
    than a fast network saves; the protocol's clients name one where their user wants it.
    """
    if not accept_encoding:
        return None
    coding, _, weight = accept_encoding.decode("latin-1").strip().lower().partition(";")
    coding, weight = coding.strip(), weight.replace(" ", "")
    if coding not in WINDOW_BITS or (weight and (not weight.startswith("q=") or not weight[2:].strip("0."))):
        return None
    return coding


def compress(body: bytes, encoding: str) -> bytes:
    """The body in a content coding."""
    deflater = zlib.compressobj(_LEVEL, wbits=WINDOW_BITS[encoding])
    return deflater.compress(body) + deflater.flush()
