"""Compressed bodies, both ways: gzip and deflate (zlib, RFC 9110). Called by `body.py` and the infer route."""

import zlib

from service.errors import InvalidRequest, TooLarge

WINDOW_BITS = {"gzip": 31, "deflate": 15}
"""Content codings that are read and written, and zlib's parameter for each."""

_LEVEL = 1  # tensors hardly get smaller at higher ones, and others wait meanwhile
_PIECE = (
    64 << 10
)  # of a body that is read at a time: zlib copies what comes after a member, whose end nobody knows before
_UNPACKED = 1 << 20  # bytes that come out at a time; zlib puts them together without letting other threads run
_MOST_MEMBERS = 1 << 16  # each takes a few microseconds, however little is in it


def decompress(body: bytes | bytearray, encoding: str, limit: int) -> bytearray:
    """The content of a body; one of gzip may have several members (RFC 1952). Raises InvalidRequest, and TooLarge as
    soon as it is over `limit` bytes. Other threads run meanwhile."""
    content, members = bytearray(), 1
    inflater = zlib.decompressobj(WINDOW_BITS[encoding])
    for begin in range(0, len(body), _PIECE):
        rest = bytes(body[begin : begin + _PIECE])
        while rest:
            if inflater.eof:
                if encoding != "gzip":
                    follow = len(rest) + max(len(body) - begin - _PIECE, 0)
                    raise InvalidRequest(f"{follow} bytes follow the {encoding} data of the body")
                members += 1
                if members > _MOST_MEMBERS:
                    raise InvalidRequest(f"the {encoding} body has more than {_MOST_MEMBERS} members")
                inflater = zlib.decompressobj(WINDOW_BITS[encoding])
            try:
                content += inflater.decompress(rest, _UNPACKED)
            except zlib.error as error:
                raise InvalidRequest(f"the body is not {encoding} data: {error}") from None
            if len(content) > limit:
                raise TooLarge(f"the body is larger than {limit} bytes after decompression")
            rest = inflater.unused_data or inflater.unconsumed_tail  # the check sum at least, if more is to come out
    if not inflater.eof:
        raise InvalidRequest(f"the {encoding} body ends too early")
    return content


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
