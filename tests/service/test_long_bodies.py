"""Long and compressed bodies: read off the event loop, in pieces, and bounded before they become objects. Long answers:
written off it, in pieces."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest

from service.client_memory import ClientMemory, Place
from service.codecs import body as bodies
from service.codecs import long_json, outputs
from service.codecs.body import INLINE_BYTES, parse_object
from service.codecs.compression import decompress
from service.codecs.long_json import LARGEST_OUTLINE, MOST_VALUES, LongArray
from service.codecs.outputs import LONG_OUTPUT, Classes, RequestedOutput
from service.codecs.tensors import Source, parse_infer
from service.errors import InvalidRequest, TooLarge
from service.routes import infer
from service.workers.messages import TensorInfo
from tests.service.conftest import Process, Running, Start, add_model, error_of, post, wait_for
from tests.service.fakes import WIDTH
from tests.service.test_images import file_of, plain

SOURCE = Source(1 << 24, ClientMemory(()))
KINDS = {"FP32": "f4", "FP64": "f8", "INT64": "i8", "UINT8": "u1", "BOOL": "?"}


def values_of(datatype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    source = np.random.default_rng(7)
    if datatype.startswith("FP"):
        return source.standard_normal(shape).astype(KINDS[datatype])
    return source.integers(0, 2 if datatype == "BOOL" else 200, shape).astype(KINDS[datatype])


def document(data: Any, shape: tuple[int, ...], datatype: str = "FP32") -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": list(shape), "datatype": datatype, "data": data}]}


def read(body: bytes, datatype: str, rank: int, source: Source = SOURCE) -> np.ndarray[Any, Any]:
    spec = TensorInfo("x", np.dtype(KINDS[datatype]), tuple(f"d{axis}" for axis in range(rank)))
    return parse_infer(body, None, [spec], [], source).inputs[0][1]


# ---- what is read


@pytest.mark.parametrize("indent", [None, 1], ids=["dense", "blanks"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("shape", [(90_000,), (300, 300), (90_000, 1), (1, 90_000), (3, 2, 5, 3000), (2, 45_000, 1)])
@pytest.mark.parametrize("datatype", KINDS)
def test_a_long_tensor_is_what_was_sent(
    datatype: str, shape: tuple[int, ...], nested: bool, indent: int | None
) -> None:
    values = values_of(datatype, shape)
    found = document((values if nested else values.reshape(-1)).tolist(), shape, datatype)
    body = json.dumps(found, indent=indent).encode()
    assert len(body) > INLINE_BYTES
    assert isinstance(parse_object(body)["inputs"][0]["data"], LongArray)
    got = read(body, datatype, len(shape))
    assert got.dtype == values.dtype and got.shape == shape
    assert (got == values).all()


def test_what_looks_like_a_long_array_and_is_text_stays_text() -> None:
    text = '"data":[' + "1," * 50_000 + '1]}\\" "data": [' + "\\\\"
    body = json.dumps({"id": text, "data": [1] * 50_000, "inputs": [{"parameters": {"data": [2] * 50_000}}]}).encode()
    assert len(body) > 5 * INLINE_BYTES
    assert parse_object(body)["id"] == text


def test_several_tensors_each_have_their_own() -> None:
    specs = [TensorInfo(name, np.dtype("i8"), ("n",)) for name in "ab"]
    inputs = [
        {"data": [place] * 40_000, "name": name, "shape": [40_000], "datatype": "INT64"}
        for place, name in enumerate("ab")
    ]
    found = parse_infer(orjson.dumps({"inputs": inputs}), None, specs, [], SOURCE).inputs
    assert [(name, set(array.tolist())) for name, array in found] == [("a", {0}), ("b", {1})]


# ---- what is wrong


def break_at(body: bytes, element: int, text: bytes) -> bytes:
    """The body with another text in the place of an element, by commas."""
    start = body.index(b"[", body.index(b'"data"'))
    parts = body[start:].split(b",")
    parts[element] = text
    return body[:start] + b",".join(parts)


@pytest.mark.parametrize(
    ("nested", "datatype", "element", "text", "said"),
    [
        (False, "FP32", 70_001, b"NaN", r"data\[70001\] is NaN; FP32 takes numbers"),
        (False, "FP32", 70_001, b"1e999", r"data\[70001\] is 1e999; FP32 takes numbers"),
        (False, "FP32", 70_001, b"1e39", r"data\[70001\] is 1e\+39; FP32 takes numbers"),
        (False, "FP32", 70_001, b"true", r"data\[70001\] is true; FP32 takes numbers"),
        (True, "UINT8", 70_001, b"300", r"data\[233\]\[101\] is 300; UINT8 takes integers from 0 to 255"),
        (True, "INT64", 70_001, b"1.0", r"data\[233\]\[101\] is 1.0; INT64 takes integers"),
        (False, "BOOL", 70_001, b"1", r"data\[70001\] is 1; BOOL takes"),
        (False, "FP32", 70_001, b"", "the body is not JSON: .* element"),
        (False, "FP32", 70_001, b"1 2", "the body is not JSON: .* element"),
        (False, "FP32", 70_001, b"0x1", "the body is not JSON: .* element"),
        (False, "FP32", 70_001, b"1" + b" " * 70_000, "65536 bytes without a comma"),
        (False, "FP32", 70_001, b"[1]", r"not nested like the shape \[300, 300\] at data\[70001\]"),
        (False, "FP32", 70_001, b"1]", r"not nested like the shape \[300, 300\] at data\[70001\]"),
        (False, "FP32", 70_001, b"1,1", "has 90001 elements"),
        (True, "FP32", 70_001, b"1][", r"not nested like the shape \[300, 300\]"),
        (True, "FP32", 70_001, b"[]1", "not nested like the shape"),
        (True, "FP32", 69_899, b"1", r"not nested like the shape \[300, 300\] at data\[23[23]\]"),
        (True, "FP32", 69_899, b"]1", r"not nested like the shape \[300, 300\] at data\[232\]\[299\]"),
        (True, "FP32", 89_999, b"1]}]}", r"not nested like the shape \[300, 300\] at data\[299\]\[299\]"),
        (True, "FP32", 89_999, b"1]]]}]}", r"not nested like the shape \[300, 300\] at data\[299\]\[299\]"),
        (True, "FP32", 0, b"[[[1", "nested 3 levels deep"),
    ],
)
def test_what_is_wrong_with_a_long_tensor_is_named(
    nested: bool, datatype: str, element: int, text: bytes, said: str
) -> None:
    values = values_of(datatype, (300, 300))
    body = orjson.dumps(document((values if nested else values.reshape(-1)).tolist(), (300, 300), datatype))
    with pytest.raises(InvalidRequest, match=said):
        read(break_at(body, element, text), datatype, 2)


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (b'],"more":{"data":[' + b"1," * 5000 + b",1]}}]}", "the body is not JSON: .* in an array under a key 'data'"),
        (b"]}]}x", "the body is not JSON: unexpected content after document at 'x'"),
        (b"]}]", "the body is not JSON: unexpected end of data at its end"),
        (b'],"shape":NaN}]}', "neither NaN nor infinity"),
        (b'],"shape":[1e999]}]}', "neither NaN nor infinity"),
    ],
)
def test_what_is_wrong_beside_a_long_tensor_is_named(tail: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        parse_object(b'{"inputs":[{"data":[' + b"1," * 50_000 + b"1" + tail)


def test_nan_beside_a_long_tensor_is_explained() -> None:
    body = orjson.dumps(document([1.0] * 50_000, (50_000,)))
    with pytest.raises(InvalidRequest, match="'shape' is"):
        read(body.replace(b'"shape":[50000]', b'"shape":[NaN]'), "FP32", 1)


BITS = (
    b"[", b"]", b",", b"1", b" ", b'"', b"}", b"{", b"\\", b":", b"e", b"-", b".", b"null", b"NaN", b"\0", b"\x0b",
    b"[]", b"],[", b",1", b'"data":', b"\xff",
)  # fmt: skip


def random_body(source: random.Random) -> tuple[bytes, str, int]:
    """An infer body that is right, or nearly, its datatype and the rank of its tensor."""
    shape = tuple(source.choice((1, 2, 3, 5)) for _ in range(source.choice((1, 1, 2, 3))))
    datatype = source.choice(("FP32", "INT64", "BOOL", "UINT8"))
    values = np.array([source.choice((0, 1, 12, 123)) for _ in range(math.prod(shape))], KINDS[datatype])
    data = (values.reshape(shape) if source.random() < 0.6 else values).tolist()
    items = [("name", "x"), ("shape", list(shape)), ("datatype", datatype), ("data", data)]
    source.shuffle(items)
    if source.random() < 0.3:
        items.insert(source.randrange(5), ("parameters", {"data": [1, 2, 3, 4], 'k\\"': '"data":[1,2,3]}'}))
    name = source.choice(("a", '\\"data":[1,2,3,4]', "\\", "é"))
    found = {"id": name, "inputs": [dict(items)]}
    text = json.dumps(found, indent=source.choice((None, 1)), ensure_ascii=source.random() < 0.5).encode()
    for _ in range(source.choice((0, 0, 1, 1, 2))):
        at = source.randrange(len(text))
        text = text[:at] + source.choice(BITS) + text[at + (source.random() < 0.5) :]
    return text, datatype, len(shape)


@pytest.mark.parametrize("seed", range(4))
def test_long_bodies_are_read_like_short_ones(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """What is right gives the same tensors, what is wrong is refused; here what is long has a few bytes."""
    monkeypatch.setattr(long_json, "_LONG", 4)
    monkeypatch.setattr(long_json, "_PIECE", 300)
    source = random.Random(seed)
    counts: Counter[bool] = Counter()
    for _ in range(2000):
        body, datatype, rank = random_body(source)
        found: list[tuple[Any, ...] | None] = []
        for inline in (1 << 40, 0):
            monkeypatch.setattr(bodies, "INLINE_BYTES", inline)
            try:
                array = read(body, datatype, rank)
                found.append((array.dtype, array.shape, array.tolist()))
            except InvalidRequest:
                found.append(None)
        assert found[0] == found[1], body
        counts[found[0] is None] += 1
    assert min(counts.values()) > 500


# ---- what is too much

LONG = 20_000_000
TOO_MANY: dict[str, bytes] = {
    "objects": b'{"inputs":[' + b"{}," * (LONG // 3) + b"{}]}",
    "strings": b'{"inputs":[' + b'"ab",' * (LONG // 5) + b'"ab"]}',
    "rows of ids": b'{"ids":[' + b"[1]," * (LONG // 4) + b"[1]]}",
    "ids": b'{"ids":[[' + b"1," * (LONG // 2) + b"1]]}",
    "brackets": b"[" * LONG,
    "quotes": b'{"text":"' + b'\\"' * (LONG // 2) + b'"}',
    "numbers under another key": b'{"inputs":[{"date":[' + b"1," * (LONG // 2) + b"1]}]}",
    "numbers and a string": b'{"inputs":[{"data":[' + b"1," * (LONG // 2) + b'"x"]}]}',
    "text": b'{"text":"' + b"x" * LONG + b'"}',
}


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that were allocated at a time."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("what", TOO_MANY)
def test_too_much_is_refused_before_it_becomes_objects(what: str) -> None:
    body = TOO_MANY[what]
    assert len(body) > max(LARGEST_OUTLINE, MOST_VALUES)

    def refused() -> None:
        with pytest.raises(TooLarge, match=str(LARGEST_OUTLINE if what == "text" else MOST_VALUES)):
            parse_object(body)

    # The text once over, and a list of its parts: 2.5 MB of strings in objects of 35 bytes. Parsed, it takes 70 MB.
    assert peak_of(refused) < LONG * 1.5 + (60 << 20) * (what == "strings")


def test_the_elements_of_a_long_tensor_become_nothing_but_the_tensor() -> None:
    count = LONG // 2
    body = b'{"inputs":[{"name":"x","shape":[%d],"datatype":"FP32","data":[' % count + b"1," * (count - 1) + b"1]}]}"
    got: list[np.ndarray[Any, Any]] = []
    peak = peak_of(lambda: got.append(read(body, "FP32", 1)))
    assert (got[0] == 1).all()
    assert peak < got[0].nbytes + (8 << 20)


def test_a_tensor_over_the_limit_is_refused_before_it_is_made() -> None:
    body = orjson.dumps(document([1.0] * 90_000, (90_000,)))
    with pytest.raises(TooLarge, match="'x' has 90000 elements; the limit is 1000"):
        read(body, "FP32", 1, Source(1000, ClientMemory(())))


def test_blanks_cost_nothing() -> None:
    body = b'{"id":' + b" \n" * (LONG // 2) + b'"a",' + b"\t" * LONG + b'"ready":1' + b" " * LONG + b"}"
    found: list[dict[str, Any]] = []
    assert peak_of(lambda: found.append(parse_object(body))) < 8 << 20
    assert found == [{"id": "a", "ready": 1}]


def test_members_of_gzip_are_bounded() -> None:
    empty = gzip.compress(b"")
    assert decompress(empty * 65_536, "gzip", 10) == b""
    with pytest.raises(InvalidRequest, match="more than 65536 members"):
        decompress(empty * 65_537, "gzip", 10)


# ---- where it is done


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[str, int]]]:
    """Who parses and decompresses, and how many bytes at a time."""
    seen: dict[str, list[tuple[str, int]]] = {"parse": [], "decompress": []}

    def watched(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(data: bytes, *more: Any) -> Any:
            seen[what].append((threading.current_thread().name, len(data)))
            return call(data, *more)

        return wrapper

    loads = watched("parse", orjson.loads)
    monkeypatch.setattr(bodies, "orjson", SimpleNamespace(loads=loads, JSONDecodeError=orjson.JSONDecodeError))
    monkeypatch.setattr(bodies, "decompress", watched("decompress", decompress))
    return seen


@pytest.mark.parametrize("rows", [1, 4], ids=["direct", "by ASGI"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_long_bodies_are_read_by_threads_a_piece_at_a_time(
    start: Start, tmp_path: Path, threads: dict[str, list[tuple[str, int]]], rows: int, packed: bool
) -> None:
    add_model(tmp_path, "wide", "wide")
    server = start(tmp_path)
    values = np.arange(rows * WIDTH, dtype=np.float32)
    tensor = {"name": "input", "shape": [rows, WIDTH], "datatype": "FP32", "data": values.tolist()}
    body = orjson.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    assert len(body) > INLINE_BYTES and (len(body) > 1 << 20) == (rows > 1)
    headers = {"content-encoding": "gzip"} if packed else {}
    url = "/v2/models/wide/infer"
    response = server.client.post(url, content=gzip.compress(body) if packed else body, headers=headers)
    assert response.status_code == 200
    assert response.content.endswith(values.tobytes())
    assert all(name.startswith("preprocess") for calls in threads.values() for name, _ in calls)
    assert len(threads["decompress"]) == packed
    assert max(size for _, size in threads["parse"]) <= INLINE_BYTES + 2


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_short_bodies_stay_on_the_event_loop(
    server: Running, threads: dict[str, list[tuple[str, int]]], packed: bool
) -> None:
    body = orjson.dumps(document([1.0] * 4, (1, 4))).replace(b'"x"', b'"input"')
    headers = {"content-encoding": "gzip"} if packed else {}
    url = "/v2/models/identity/infer"
    response = server.client.post(url, content=gzip.compress(body) if packed else body, headers=headers)
    assert response.status_code == 200
    where = "preprocess" if packed else "http"  # nobody knows how much a short body unpacks to
    assert [name.startswith(where) for name, _ in threads["parse"]] == [True]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v2/models/identity/infer", b"{}" + b" " * LONG, 400),
        ("/v2/models/identity/infer", TOO_MANY["objects"], 413),
        ("/v1/models/encoder/tokens", TOO_MANY["ids"], 413),
        ("/v1/models/encoder/tokens", TOO_MANY["text"], 413),
        ("/v1/embeddings", TOO_MANY["rows of ids"], 413),
        ("/v2/repository/index", TOO_MANY["brackets"], 413),
        ("/v1/models/colours/images", bytes(LONG), 400),
    ],
)
def test_what_unpacks_to_much_is_refused_by_threads(
    server: Running, threads: dict[str, list[tuple[str, int]]], path: str, body: bytes, status: int
) -> None:
    packed = gzip.compress(body, 1)
    assert len(packed) < LONG // 50
    response = server.client.post(path, content=packed, headers={"content-encoding": "gzip"})
    assert response.status_code == status
    assert error_of(response)
    assert all(name.startswith("preprocess") for calls in threads.values() for name, _ in calls)
    assert len(threads["decompress"]) == 1
    assert max((size for _, size in threads["parse"]), default=0) <= LARGEST_OUTLINE
    assert server.identity([1.0] * 4).status_code == 200


def test_a_form_is_unpacked_and_decoded_like_any(server: Running) -> None:
    files = [("image", (f"{colour}.png", file_of(plain(colour)), "image/png")) for colour in ("red", "blue")]
    request = server.client.build_request("POST", "/v1/models/colours/images", files=files)
    body, kind = request.read(), request.headers["content-type"]
    for content, headers in ((body, {}), (gzip.compress(body), {"content-encoding": "gzip"})):
        headers["content-type"] = kind
        response = server.client.post("/v1/models/colours/images", content=content, headers=headers)
        assert response.status_code == 200
        assert [found["labels"][0]["label"] for found in response.json()["predictions"]] == ["red", "blue"]


def test_memory_stays_bounded(tmp_path: Path, repository: Path, processes: list[Process]) -> None:
    """66 MB of numbers in 64 KB of gzip: the text, and as much while it is put together, but no objects."""
    process = Process(repository)
    processes.append(process)
    process.wait_ready()

    def highest() -> int:
        (line,) = (
            line
            for line in Path(f"/proc/{process.process.pid}/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        return int(line.split()[1]) << 10

    before = highest()
    body = b'{"inputs":[{"name":"input","shape":[1,4],"datatype":"FP32","data":[' + b"1," * 33_000_000 + b"1]}]}"
    packed, headers = gzip.compress(body, 6), {"content-encoding": "gzip"}
    for content, status in ((packed, 413), (gzip.compress(TOO_MANY["objects"] * 3, 6), 413)):
        response = post(f"{process.url}/v2/models/identity/infer", content=content, headers=headers, timeout=60)
        assert response.status_code == status
    assert highest() - before < 3 * len(body)


def test_a_region_that_goes_while_it_is_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long bodies are read by threads, and regions are unregistered by the event loop."""
    (tmp_path / "app_one").write_bytes(bytes(range(64)))
    memory = ClientMemory(("/app_",), tmp_path)
    memory.register("r", "/app_one", 0, 64)
    pread = os.pread

    def late(descriptor: int, count: int, offset: int) -> bytes:
        memory.unregister("r")
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", late)
    assert memory.read(Place("r", 8, 4)) == bytes(range(8, 12))
    assert memory.regions(None) == []


# ---- long answers


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Who writes JSON outputs, and the elements of the longest array at a time."""
    seen: list[tuple[str, int]] = []

    def dumps(content: Any, default: Any = None, option: int = 0) -> bytes:
        arrays = [content] if isinstance(content, np.ndarray) else [t.get("data", ()) for t in content["outputs"]]
        longest = max(array.size if isinstance(array, np.ndarray) else 0 for array in arrays)
        seen.append((threading.current_thread().name, longest))
        return orjson.dumps(content, default, option)

    monkeypatch.setattr(outputs, "orjson", SimpleNamespace(dumps=dumps))
    return seen


@pytest.mark.parametrize("rows", [1, 4], ids=["direct", "by ASGI"])
def test_long_answers_are_written_by_threads_a_piece_at_a_time(
    start: Start, tmp_path: Path, writers: list[tuple[str, int]], rows: int
) -> None:
    add_model(tmp_path, "wide", "wide")
    server = start(tmp_path)
    values = np.random.default_rng(3).standard_normal((rows, WIDTH)).astype(np.float32)
    values[0, WIDTH - 5] = np.nan
    size = {"binary_data_size": values.nbytes}
    tensor = {"name": "input", "shape": [rows, WIDTH], "datatype": "FP32", "parameters": size}
    text = orjson.dumps({"inputs": [tensor]})
    response = server.client.post(
        "/v2/models/wide/infer",
        content=text + values.tobytes(),
        headers={"inference-header-content-length": str(len(text))},
    )
    assert response.status_code == 200
    (output,) = response.json()["outputs"]
    assert output["shape"] == [rows, WIDTH] and output["parameters"] == {"non_finite": 1}
    got = np.array([np.nan if value is None else value for value in output["data"]], np.float32)
    assert np.array_equal(got, values.reshape(-1), equal_nan=True)
    assert len(writers) == 1 + rows * WIDTH // LONG_OUTPUT
    assert all(name.startswith("preprocess") and longest <= LONG_OUTPUT for name, longest in writers)
    assert "postprocess" in response.headers["server-timing"]
    wait_for(lambda: server.metric("inference_requests_total", model="wide", outcome="success") == 1)


def test_short_answers_are_written_where_they_come(server: Running, writers: list[tuple[str, int]]) -> None:
    assert server.identity([1.0] * 8).status_code == 200
    assert [longest for _, longest in writers] == [8]
    assert not writers[0][0].startswith("preprocess")


def test_a_long_answer_that_fails_is_an_error(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_model(tmp_path, "wide", "wide")
    server = start(tmp_path)
    body = orjson.dumps(document([1.0] * WIDTH, (1, WIDTH))).replace(b'"x"', b'"input"')
    assert server.client.post("/v2/models/wide/infer", content=body).status_code == 200

    def broken(*_: Any) -> bytes:
        raise RuntimeError("no JSON today")

    monkeypatch.setattr(infer, "to_json", broken)
    response = server.client.post("/v2/models/wide/infer", content=body)
    assert response.status_code == 500 and "internal error" in error_of(response)
    wait_for(lambda: server.metric("inference_requests_total", model="wide", outcome="failed") == 1)
    assert server.metric("inference_inflight", model="wide") == 0


def test_several_long_outputs_stay_apart() -> None:
    arrays = [np.arange(place, place + size, dtype=np.int64) for place, size in ((0, 100_000), (5, 3), (7, 70_000))]
    wanted = [(RequestedOutput(name, False), array) for name, array in zip("abc", arrays, strict=True)]
    tensors, buffers, long = outputs.format_outputs(wanted, Classes(False, ()), ClientMemory(()))
    assert len(long) == 2 and not buffers
    found = json.loads(outputs.to_json({"id": "x", "outputs": tensors, "end": 1}, long))
    assert [tensor["data"] for tensor in found["outputs"]] == [array.tolist() for array in arrays]
    assert list(found) == ["id", "outputs", "end"]
