"""Bodies that are malformed, and headers that go with them, for each kind of route. Called by `fuzz.py`."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
from collections.abc import Callable
from functools import cache

from PIL import Image

Body = tuple[bytes, dict[str, str]]
"""A body, and headers beside those that say its length."""


def prepare() -> None:
    """Make what takes long; connections that were waiting for it would be over their time."""
    _packed_zeros()
    _pictures()


def malformed(route: str, source: random.Random) -> Body:
    """Mostly of the kind that a route reads."""
    own = next((kinds for end, kinds in _OWN_BODIES.items() if route.endswith(end)), _BODIES)
    return source.choice(own if source.random() < 0.6 else _BODIES)(source)


def _tensor(source: random.Random) -> dict[str, object]:
    """An input that may be right, with something in it that may be not."""
    tensor: dict[str, object] = {"name": "input", "shape": [1, 64], "datatype": "FP32", "data": [0.5] * 64}
    changes: tuple[tuple[str, object], ...] = (
        ("shape", [-1, 64]), ("shape", [1 << 40, 64]), ("shape", [0, 64]), ("shape", []), ("shape", "1"),
        ("shape", [1.5, 64]), ("shape", [1] * 5000), ("data", [1] * 63), ("data", [None] * 64), ("data", [[0.5] * 64]),
        ("data", [[[[]]]]), ("data", "x"), ("data", [1e999] * 64), ("data", [True] * 64), ("data", [10**400] * 64),
        ("datatype", "INT64"), ("datatype", "FP16"), ("datatype", 7), ("name", "nobody"), ("name", None),
        ("parameters", []), ("parameters", {"binary_data_size": 10**30}), ("parameters", {"binary_data_size": 256}),
        ("parameters", {"shared_memory_region": "r", "shared_memory_byte_size": 256}), ("more", {}),
    )  # fmt: skip
    for _ in range(source.randint(0, 2)):
        key, value = source.choice(changes)
        tensor[key] = value
    return tensor


def _infer(source: random.Random) -> Body:
    outputs: tuple[object, ...] = (
        [], [{"name": "output"}] * 2, [{"name": "nobody"}], 3,
        [{"name": "output", "parameters": {"classification": 3}}],
        [{"name": "output", "parameters": {"binary_data": True}}], [None],
        [{"name": "output", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 1}}],
    )  # fmt: skip
    document: dict[str, object] = {"inputs": [_tensor(source)] * source.choice((1, 1, 1, 0, 2, 50))}
    if source.random() < 0.5:
        document["outputs"] = source.choice(outputs)
    if source.random() < 0.3:
        parameters = {"timeout": -1, "priority": 1 << 70, "binary_data_output": 3, "sequence_id": 3, "x": [[]]}
        key = source.choice(sorted(parameters))
        document["parameters"] = {key: parameters[key]}
    text = json.dumps(document).encode()
    if source.random() < 0.5:
        return text, {}
    length = source.choice((len(text), 0, -1, len(text) + 1, 10**18, "x", len(text) // 2))
    return text + bytes(source.choice((0, 1, 255, 256, 257))), {"Inference-Header-Content-Length": str(length)}


def _deep(source: random.Random) -> Body:
    depth = source.choice((100, 1023, 1024, 1025, 100_000))
    return source.choice((b"[", b'{"inputs":', b'{"ids":[')) * depth, {}


def _noise(source: random.Random) -> Body:
    return source.randbytes(source.choice((0, 1, 100, 10_000))), {
        "Content-Type": source.choice(("", "text/x", "image/png"))
    }


def _compressed(source: random.Random) -> Body:
    body = source.choice((bytes(1 << 20), b"{}", b'{"text": "a"}'))
    packed = gzip.compress(body)
    packed = source.choice((packed, packed[:-4], packed + b"more", packed * 2, body))
    return packed, {"Content-Encoding": source.choice(("gzip", "deflate", "br", "gzip, gzip", "ä"))}


@cache
def _packed_zeros() -> bytes:
    return gzip.compress(bytes(100 << 20), 9)


def _bomb(_: random.Random) -> Body:
    return _packed_zeros(), {"Content-Encoding": "gzip"}


def _long(source: random.Random) -> Body:
    """Long JSON, right in itself but for a piece of it perhaps: numbers, objects, strings, blanks, brackets."""
    count = source.choice((20_000, 200_000, 3_000_000))
    unit = source.choice((b"1,", b"0.5,", b"[1],", b"{},", b'"a",', b" ", b"[", b'{"a":1},', b"null,", b'\\",'))
    wrong = source.choice((b"", b"", b"NaN,", b"]", b"}", b'"', b"\x00", b",,", b"1e999,", b"\xff"))
    start = b'{"inputs":[{"name":"input","shape":[1,%d],"datatype":"FP32","data":[' % (count + 1)
    start = source.choice((start, b'{"ids":[[', b'{"text":["', b"["))
    body = start + unit * (count // 2) + wrong + unit * (count // 2) + b"1]}]}"
    if source.random() < 0.5:
        return body, {}
    return gzip.compress(body, 1), {"Content-Encoding": "gzip"}


def _tokens(source: random.Random) -> Body:
    bodies: tuple[object, ...] = (
        {"text": "a"}, {"text": [""]}, {"text": []}, {"text": ["\ud800"]}, {"text": "x" * 100_000},
        {"text": ["a"] * 3000},
        {"ids": [[-1]]}, {"ids": [[1 << 40]]}, {"ids": [[]]}, {"ids": [[1.0]]}, {"ids": [[1] * 5000]},
        {"ids": {"a": 1}},
        {"ids": [[101, 102]], "text": "a"}, {"model": "all-minilm-l6-v2", "input": "a", "encoding_format": "x"},
        {"model": "all-minilm-l6-v2", "input": [[101, "a"]]}, {"model": 3, "input": None}, {"ready": "yes"},
        {"key": "/tilewave_fuzz_none", "byte_size": 1}, {"key": "/../etc", "byte_size": 1}, {"key": None},
        {"parameters": {"config": "{}", "file:1/model.onnx": "AAAA"}}, {"parameters": 3}, None, 3, "x", [], True,
    )  # fmt: skip
    return json.dumps(source.choice(bodies)).encode(), {}


def _form_body(source: random.Random) -> Body:
    boundary = source.choice(("b", "x" * 100, ""))
    part = source.choice(('form-data; name="image"; filename="a.png"', 'form-data; name="a"', "", 'form-data; name="ü'))
    one = f"--{boundary}\r\nContent-Disposition: {part}\r\n\r\n".encode("latin-1") + source.randbytes(20) + b"\r\n"
    body = one * source.choice((0, 1, 70)) + source.choice((f"--{boundary}--\r\n".encode(), b"", b"--"))
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def _headers(source: random.Random) -> Body:
    name, value = source.choice(
        (
            ("X-Timeout-Ms", "-1"), ("X-Timeout-Ms", "1" * 400), ("X-Timeout-Ms", "1"), ("X-Priority", "101"),
            ("X-Priority", "a"), ("X-Request-Id", "\x7f"), ("X-Request-Id", "x" * 5000), ("Accept-Encoding", "gzip"),
            ("Expect", "100-continue"), ("Upgrade", "websocket"), ("Authorization", "Bearer x"), ("Cookie", "a=" * 900),
            ("Range", "bytes=0-1"), ("Content-Type", "\x01"), ("traceparent", "00-x-y-z"),
        )
    )  # fmt: skip
    return b'{"text": "a"}', {name: value}


def _image(source: random.Random) -> Body:
    width = struct.pack(">I", source.choice((0, 1, 100_000, 2**31)))
    lie = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + width * 2 + b"\x08\x02\0\0\0" + source.randbytes(30)
    picture = bytearray(source.choice(_pictures()))
    for _ in range(source.choice((0, 1, 20))):
        picture[source.randrange(len(picture))] = source.randrange(256)
    cut = len(picture) if source.random() < 0.7 else source.randrange(len(picture))
    return source.choice((lie, bytes(picture[:cut]))), {}


@cache
def _pictures() -> list[bytes]:
    """One of each format that the service reads."""
    files = [io.BytesIO() for _ in range(3)]
    for file, format in zip(files, ("JPEG", "PNG", "WEBP"), strict=True):
        Image.linear_gradient("L").resize((48, 32)).convert("RGB").save(file, format)
    return [file.getvalue() for file in files]


_BODIES: tuple[Callable[[random.Random], Body], ...] = (
    *(_infer,) * 6, *(_tokens,) * 4, _deep, _noise, _noise, _compressed, _compressed, _bomb, _long,
    _form_body, _headers, _headers, _image,
)  # fmt: skip

_OWN_BODIES = {
    "/infer": (_infer,), "/tokens": (_tokens, _headers), "/embeddings": (_tokens, _headers),
    "/images": (_image, _form_body),
    "/load": (_tokens,), "/register": (_tokens,), "/index": (_tokens,),
}  # fmt: skip
