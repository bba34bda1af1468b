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


@pytest.mark.parametrize(
    ("coding", "body", "said"),
    [
        ("gzip", gzip.compress(b"one") + b"junk", "is not gzip data"),
        ("gzip", gzip.compress(b"one") + gzip.compress(b"two")[:-4], "the gzip body ends too early"),
        ("gzip", b"", "the gzip body ends too early"),
        ("deflate", zlib.compress(b"one") + b"junk", "4 bytes follow the deflate data"),
        ("deflate", b"one", "is not deflate data"),
    ],
)
def test_what_is_no_whole_body_is_refused(coding: str, body: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        decompress(body, coding, 1000)
