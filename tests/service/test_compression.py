"""Compressed bodies: members, limits, what is no such data."""

from __future__ import annotations

import gzip
import zlib

import pytest

from service.codecs.compression import decompress
from service.errors import InvalidRequest, TooLarge


def test_members_of_gzip_follow_each_other() -> None:
    body = gzip.compress(b"one,") + gzip.compress(b"") + gzip.compress(b"two")
    assert decompress(body, "gzip", 7) == b"one,two"
    with pytest.raises(TooLarge, match="larger than 6 bytes after decompression"):
        decompress(body, "gzip", 6)


@pytest.mark.parametrize("more", range(-300, 301, 50))
@pytest.mark.parametrize("level", [0, 9])
def test_contents_of_any_size_come_out_whole(more: int, level: int) -> None:
    """They come out a mebibyte at a time, and zlib may hold back some of one."""
    content = (bytes(range(256)) * (2 << 12))[: (2 << 20) + more] + bytes(max(more, 0))
    for text in (content, bytes(len(content))):
        assert decompress(gzip.compress(text, level), "gzip", len(text)) == text
        assert decompress(zlib.compress(text, level), "deflate", len(text)) == text
        with pytest.raises(TooLarge):
            decompress(gzip.compress(text, level), "gzip", len(text) - 1)


def _gzip(content: bytes) -> bytes:
    """The same bytes at any time: pytest names tests by them, in two processes at once."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("coding", "body", "said"),
    [
        ("gzip", _gzip(b"one") + b"junk", "is not gzip data"),
        ("gzip", _gzip(b"one") + _gzip(b"two")[:-4], "the gzip body ends too early"),
        ("gzip", b"", "the gzip body ends too early"),
        ("deflate", zlib.compress(b"one") + b"junk", "4 bytes follow the deflate data"),
        ("deflate", b"one", "is not deflate data"),
    ],
)
def test_what_is_no_whole_body_is_refused(coding: str, body: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        decompress(body, coding, 1000)
