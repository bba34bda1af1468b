"""The direct way of small requests: it answers and counts as ASGI does, and gives way to it."""

from __future__ import annotations

import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from service.codecs.images import decode
from service.direct import DirectRequest
from service.direct_connection import DirectConnection, _Known
from tests.service.conftest import Running, Start, wait_for

ROW = [1.0, 2.0, 3.0, 4.0]
NO_DATA = {"name": "input", "shape": [1, 4], "datatype": "FP32"}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
INFER, TOKENS, IMAGES = "/v2/models/identity/infer", "/v1/models/encoder/tokens", "/v1/models/colours/images"


def tensor(**changes: object) -> dict[str, object]:
    return {**NO_DATA, "data": ROW, **changes}


def body(document: object) -> bytes:
    return json.dumps(document).encode()


def binary() -> tuple[bytes, str]:
    header = body({"inputs": [{**NO_DATA, "parameters": {"binary_data_size": 16}}]})
    return header + bytes(16), f"Inference-Header-Content-Length: {len(header)}"


def picture(kind: str, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24), colour).save(file, kind)
    return file.getvalue()


GOOD = body({"inputs": [tensor()]})
CASES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "json": (INFER, GOOD, ()),
    "version": ("/v2/models/identity/versions/1/infer", GOOD, ()),
    "query": (f"{INFER}?a=b", GOOD, ()),
    "id": (INFER, body({"id": "me", "inputs": [tensor()]}), ("X-Request-Id: find-me",)),
    "binary": (INFER, binary()[0], (binary()[1],)),
    "binary answer": (INFER, body({"inputs": [tensor()], "parameters": {"binary_data_output": True}}), ()),
    "texts": (TOKENS, body({"text": ["a man is eating food"]}), ()),
    "ids": (TOKENS, body({"ids": [[2, 5, 3], [2, 3]]}), ()),
    "picture": (IMAGES, picture("JPEG"), ("Content-Type: image/jpeg",)),
    "picture of no kind": (IMAGES, picture("PNG", "blue"), ()),
    "no picture": (IMAGES, b"\x89PNG and no more", ("Content-Type: image/png",)),
    "empty picture": (IMAGES, b"", ("Content-Type: image/png",)),
    "too large a picture": (IMAGES, picture("PNG") + bytes(5000), ()),
    "no pictures": ("/v1/models/encoder/images", picture("PNG"), ()),
    "no time for a picture": (IMAGES, picture("PNG"), ("X-Timeout-Ms: 0",)),
    "no model": ("/v2/models/nobody/infer", GOOD, ()),
    "no version": ("/v2/models/identity/versions/7/infer", GOOD, ()),
    "no tokens": ("/v1/models/identity/tokens", body({"ids": [[1]]}), ()),
    "no JSON": (INFER, b"{", ()),
    "empty": (INFER, b"", ()),
    "no inputs": (INFER, b"{}", ()),
    "shape": (INFER, body({"inputs": [tensor(shape=[1, 5])]}), ()),
    "nothing": (INFER, body({"inputs": [tensor(shape=[0, 4])]}), ()),
    "element": (INFER, body({"inputs": [tensor(data=[1, 2, 3, "4"])]}), ()),
    "too large": (INFER, body({"inputs": [tensor(shape=[30, 4], data=[0.5] * 120)]}), ()),
    "time": (INFER, GOOD, ("X-Timeout-Ms: soon",)),
    "priority": (INFER, GOOD, ("X-Priority: 101",)),
    "close": (INFER, GOOD, ("Connection: close",)),
}


def post(url: str, content: bytes, headers: tuple[str, ...], chunked: bool = False) -> bytes:
    lines = [f"POST {url} HTTP/1.1", "Host: here", *headers]
    if chunked:
        content = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content) if content else b"0\r\n\r\n"
        lines.append("Transfer-Encoding: chunked")
    else:
        lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join((*lines, "", "")).encode() + content


def read(raw: socket.socket) -> tuple[bytes, dict[bytes, bytes], bytes]:
    """Status line, headers, body of one answer."""
    data = b""
    while b"\r\n\r\n" not in data.removeprefix(CONTINUE):
        piece = raw.recv(65536)
        assert piece, data
        data += piece
    head, _, rest = data.removeprefix(CONTINUE).partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}
    while len(rest) < int(headers[b"content-length"]):
        rest += raw.recv(65536)
    return first, headers, rest


def connect(server: Running) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    raw.settimeout(10)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return raw


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[DirectRequest]:
    """The requests that went directly."""
    begun: list[DirectRequest] = []
    begin = DirectRequest.begin

    def spy(self: DirectRequest, *arguments: object) -> None:
        begun.append(self)
        begin(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(DirectRequest, "begin", spy)
    return begun


def comparable(answer: tuple[bytes, dict[bytes, bytes], bytes]) -> object:
    """All of an answer but what differs from one to the next."""
    status, headers, content = answer
    varying = {b"date", b"x-request-id", b"server-timing"}
    timing = re.sub(rb"[\d.]+", b"N", headers[b"server-timing"])
    return status, {k: v for k, v in headers.items() if k not in varying}, set(headers), timing, content


def counts(server: Running) -> dict[str, float]:
    text = server.client.get("/metrics").text
    found = re.findall(r"^((?:http_responses|inference_requests|inference_inflight)\S*) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found if "/metrics" not in name}


@pytest.mark.parametrize("case", CASES)
def test_both_ways_answer_and_count_the_same(start: Start, repository: Path, direct: list[object], case: str) -> None:
    server = start(repository, max_tensor_elements=100, max_image_bytes=4000)
    url, content, headers = CASES[case]
    answers, counted = [], []
    for chunked in (False, True):
        before = counts(server)
        with connect(server) as raw:
            raw.sendall(post(url, content, headers, chunked))
            answers.append(comparable(read(raw)))
        after = counts(server)
        counted.append({name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name)})
        assert len(direct) == 1, "the first goes directly, the second does not"
    assert answers[0] == answers[1]
    assert counted[0] == counted[1] != {}


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        (INFER, ("Accept-Encoding: gzip",)),
        (INFER, ("Expect: 100-continue",)),
        (f"{TOKENS}?raw=true", ()),
        (f"{IMAGES}?top_k=2", ()),
        (IMAGES, ("Content-Type: multipart/form-data; boundary=x",)),
        ("/v2/models/identit%79/infer", ()),
    ],
)
def test_what_takes_more_than_a_call_goes_through_asgi(
    server: Running, direct: list[object], url: str, headers: tuple[str, ...]
) -> None:
    content = GOOD if url.startswith("/v2") else body({"ids": [[2, 3]]})
    if url.startswith(IMAGES):
        content = picture("PNG")
        if headers:
            part = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n'
            content = part + content + b"\r\n--x--\r\n"
    with connect(server) as raw:
        raw.sendall(post(url, content, headers))
        assert read(raw)[0] == b"HTTP/1.1 200 OK"
    assert direct == []


@pytest.mark.parametrize(("pause", "directly"), [(0.0, True), (0.3, False)], ids=["soon", "late"])
def test_a_body_in_pieces(server: Running, direct: list[object], pause: float, directly: bool) -> None:
    request = post(INFER, GOOD, ())
    with connect(server) as raw:
        for _ in range(2):
            for cut in (request[:-60], request[-60:-20], request[-20:]):
                raw.sendall(cut)
                time.sleep(pause or 0.002)
            status, _, content = read(raw)
            assert status == b"HTTP/1.1 200 OK" and json.loads(content)["outputs"][0]["data"] == ROW
    assert bool(direct) is directly


def test_pipelined_requests_are_answered_in_order(server: Running, direct: list[object]) -> None:
    requests = [post(INFER, body({"id": str(number), "inputs": [tensor()]}), ()) for number in range(6)]
    with connect(server) as raw:
        raw.sendall(b"".join(requests))
        answers = b""
        while answers.count(b'"id"') < 6:
            answers += raw.recv(65536)
    assert re.findall(rb'"id":"(\d)"', answers) == [b"%d" % number for number in range(6)]
    assert direct


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[_Known]:
    """What was known of the requests whose header was not parsed again."""
    found: list[_Known] = []
    begin_again = DirectConnection._begin_again

    def spy(self: DirectConnection, known: _Known, data: bytes) -> None:
        found.append(known)
        begin_again(self, known, data)

    monkeypatch.setattr(DirectConnection, "_begin_again", spy)
    return found


def row_of(number: int) -> bytes:
    """Requests of one length."""
    return post(INFER, body({"inputs": [tensor(data=[float(number), 0.5, 0.25, 0.125])]}), ())


def answered(raw: socket.socket) -> float:
    status, _, content = read(raw)
    assert status == b"HTTP/1.1 200 OK"
    return float(json.loads(content)["outputs"][0]["data"][0])


def test_a_header_that_repeats_is_parsed_once_and_answers_are_those_of_the_bodies(
    server: Running, direct: list[DirectRequest], repeated: list[_Known]
) -> None:
    with connect(server) as raw:
        for number in range(5):
            raw.sendall(row_of(number))
            assert answered(raw) == number
        assert (len(direct), len(repeated)) == (5, 4)
        raw.sendall(row_of(10))  # a longer body
        assert answered(raw) == 10
        raw.sendall(row_of(-111))
        assert answered(raw) == -111
    assert (len(direct), len(repeated)) == (7, 6)
    assert len({request._exchange.identity for request in direct}) == 7
    assert not any(hasattr(known.request, "_job") for known in repeated), "tensors that a connection holds while idle"
    assert server.metric("http_responses_total", route="/v2/models/{model}/infer", status="200") == 7


def test_a_known_header_says_nothing_about_what_is_not_a_whole_request(
    server: Running, direct: list[object], repeated: list[object]
) -> None:
    request = row_of(1)
    with connect(server) as raw:
        raw.sendall(request)
        assert answered(raw) == 1
        for cut in (request[:20], request[20:-30], request[-30:]):  # in pieces
            raw.sendall(cut)
            time.sleep(0.01)
        assert answered(raw) == 1
        raw.sendall(row_of(2) + row_of(3)[:40])  # with the beginning of the next one
        assert answered(raw) == 2
        raw.sendall(row_of(3)[40:])
        assert answered(raw) == 3
        assert repeated == []
        raw.sendall(row_of(4))
        assert answered(raw) == 4
        assert len(repeated) == 1
        raw.sendall(post(INFER, GOOD, (), chunked=True))  # through ASGI
        assert answered(raw) == ROW[0]
        raw.sendall(row_of(5))
        assert answered(raw) == 5
        assert len(repeated) == 2
        raw.sendall(row_of(6) + row_of(7))
        assert [int(found) for found in re.findall(rb'"data":\[(\d)', raw_answers(raw, 2))] == [6, 7]
        raw.sendall(b"G" + request[1:])  # of the same length
        assert read(raw)[0] == b"HTTP/1.1 400 Bad Request"
        assert raw.recv(100) == b""
    assert len(repeated) == 2


def test_a_known_header_may_have_another_length_and_nothing_else(
    server: Running, direct: list[object], repeated: list[object]
) -> None:
    long = body({"ids": [[2, 5, 3]] * 300})  # more than goes directly
    with connect(server) as raw:
        for content in (body({"ids": [[2, 3]]}), body({"ids": [[2, 5, 3], [2, 5, 5, 3]]}), b"", b"{}", long):
            raw.sendall(post(TOKENS, content, ()))
            read(raw)
        assert (len(direct), len(repeated)) == (4, 3)
        raw.sendall(post(TOKENS, body({"ids": [[2, 3]]}), ()))
        assert read(raw)[0] == b"HTTP/1.1 200 OK" and len(repeated) == 4
        short, other = post(TOKENS, b'{"ids": [[2, 3]]}', ()), post(TOKENS, b'{"ids": [[2, 3]]}', ("X-Other: 1",))
        raw.sendall(other)
        assert read(raw)[0] == b"HTTP/1.1 200 OK" and len(repeated) == 4
        raw.sendall(short.replace(b"Length: 17", b"Length: +7"))
        assert read(raw)[0] == b"HTTP/1.1 400 Bad Request"
    assert len(repeated) == 4


def raw_answers(raw: socket.socket, count: int) -> bytes:
    """So many answers, as they came."""
    data = b""
    while data.count(b'"outputs"') < count or not data.endswith(b"}"):
        data += raw.recv(65536)
    return data


def test_errors_of_a_known_header_are_those_of_its_body(server: Running, repeated: list[object]) -> None:
    bad = body({"inputs": [tensor(data=[1.0, 2.0, 3.0, "4.0"])]})
    good = body({"inputs": [tensor(data=[1.0, 2.0, 3.0, 4.0])]})
    good += b" " * (len(bad) - len(good))
    with connect(server) as raw:
        for content, status in ((good, b"200 OK"), (bad, b"400 Bad Request"), (good, b"200 OK")):
            raw.sendall(post(INFER, content, ()))
            assert read(raw)[0] == b"HTTP/1.1 " + status
    assert len(repeated) == 2


def test_a_connection_that_is_to_end_is_not_kept_by_a_known_header(
    server: Running, direct: list[object], repeated: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(server) as raw:
        raw.sendall(row_of(1))
        assert answered(raw) == 1
        monkeypatch.setattr(DirectConnection, "shutting_down", True)
        raw.sendall(row_of(2))
        status, headers, _ = read(raw)
        assert (status, headers[b"connection"]) == (b"HTTP/1.1 200 OK", b"close")
        assert raw.recv(100) == b""
    assert (len(direct), repeated) == (2, [])


def test_half_a_body_and_a_client_that_goes_is_counted_as_before(server: Running, direct: list[object]) -> None:
    with connect(server) as raw:
        raw.sendall(post(INFER, GOOD, ())[:-20])
    wait_for(lambda: server.metric("inference_requests_total", model="identity", outcome="cancelled") == 1)
    assert direct == [] and server.metric("inference_inflight", model="identity") == 0


@pytest.fixture
def slow_decoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No picture is decoded before the event is set."""
    may_decode = threading.Event()

    def wait(*arguments: Any) -> Any:
        assert may_decode.wait(30)
        return decode(*arguments)

    monkeypatch.setattr("service.routes.images.decode", wait)
    yield may_decode
    may_decode.set()


def test_a_picture_whose_time_is_over_while_it_is_decoded(
    server: Running, direct: list[object], slow_decoder: threading.Event
) -> None:
    with connect(server) as raw:
        raw.sendall(post(IMAGES, picture("PNG"), ("X-Timeout-Ms: 50",)))
        assert read(raw)[0] == b"HTTP/1.1 504 Gateway Timeout"
        slow_decoder.set()
        raw.sendall(post(IMAGES, picture("PNG"), ()))
        assert read(raw)[0] == b"HTTP/1.1 200 OK"
    assert len(direct) == 2 and server.serving.preprocess._jobs == 0
    assert server.metric("inference_inflight", model="colours") == 0


def test_a_client_that_goes_while_its_picture_is_decoded(
    server: Running, direct: list[object], slow_decoder: threading.Event
) -> None:
    with connect(server) as raw:
        raw.sendall(post(IMAGES, picture("PNG"), ()))
        wait_for(lambda: server.serving.preprocess._jobs == 1)
    wait_for(lambda: server.metric("inference_requests_total", model="colours", outcome="cancelled") == 1)
    assert server.serving.preprocess._jobs == 0 and len(direct) == 1
    slow_decoder.set()
    with connect(server) as raw:
        raw.sendall(post(IMAGES, picture("PNG"), ()))
        assert read(raw)[0] == b"HTTP/1.1 200 OK"
    assert server.metric("inference_inflight", model="colours") == 0


def test_an_idle_connection_is_closed_when_its_time_is_over(
    start: Start, repository: Path, direct: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(repository, keep_alive_timeout=2)
    looked: list[float] = []
    look = DirectConnection._look_whether_idle

    def spy(self: DirectConnection) -> None:
        looked.append(time.monotonic())
        look(self)

    monkeypatch.setattr(DirectConnection, "_look_whether_idle", spy)
    opened = time.monotonic()
    with connect(server) as raw:
        for _ in range(5):
            raw.sendall(post(INFER, GOOD, ()))
            assert read(raw)[0] == b"HTTP/1.1 200 OK"
            time.sleep(0.3)
        began = time.monotonic()
        assert raw.recv(100) == b""
        assert time.monotonic() - began > 1  # 2 s after the last answer, of which a part has passed
    assert 1 <= len(looked) <= 2 + (time.monotonic() - opened) / 2, "one timer for all pauses, that looks every 2 s"
    assert len(direct) == 5


def test_light_batches_run_on_the_http_thread_and_answer_the_same(
    start: Start, repository: Path, direct: list[object]
) -> None:
    server = start(repository, light_run_us=10_000_000)
    with ThreadPoolExecutor(8) as pool:
        rows = [[float(number), 0.0, -number, 0.5] for number in range(200)]
        answers = list(pool.map(server.identity, rows))
    assert [answer.json()["outputs"][0]["data"] for answer in answers] == rows
    assert "http" in server.engine.threads
    ids = {"ids": [[2, 5, 3]]}
    vectors = [server.client.post(TOKENS, json=ids).json()["embeddings"] for _ in range(20)]
    assert all(vector == vectors[0] for vector in vectors) and server.engine.threads[-1] == "http"
