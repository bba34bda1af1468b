"""How connections end: idle ones, those over the limit, slow clients, shutdown; and that no request is lost by it."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.connection import Connection
from service.logs import request_id
from tests.service.conftest import ROOT, Process, Running, Start, add_model, sample, wait_for

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
BODY = b'{"inputs":[{"name":"input","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}'
INFER = HEAD % len(BODY) + BODY
END = b"\r\n\r\n"


TRICKLE_S = 15
"""As good as for ever, beside limits of half a second."""


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answer(raw: socket.socket) -> bytes:
    """One answer of a connection that stays; empty where it has ended."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = raw.recv(65536)
        if not data:
            return received
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    (length,) = (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < length:
        body += raw.recv(65536)
    return head + b"\r\n\r\n" + body


def everything(raw: socket.socket) -> bytes:
    """What comes until the server closes."""
    return b"".join(iter(lambda: raw.recv(65536), b""))


def statuses(received: bytes) -> list[int]:
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]


# ---- between requests


def test_an_idle_connection_is_kept_and_then_closed(start: Start, repository: Path) -> None:
    server = start(repository, keep_alive_timeout=2)
    with connect(server.url) as raw:
        for _ in range(2):
            time.sleep(0.3)
            raw.sendall(LIVE)
            assert statuses(answer(raw)) == [200]
        began = time.monotonic()
        assert raw.recv(1) == b"", "within the 10 s that `connect` waits"
        assert time.monotonic() - began > 0.3, "not at once, however late this thread looks at the clock"


def test_a_request_that_comes_as_the_idle_time_ends_is_answered(
    start: Start, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop runs timers after what it has read; what arrived while that took its time it has not seen yet."""
    server = start(repository, keep_alive_timeout=1)
    on_body = Connection.on_body

    def slow(connection: Connection, body: bytes) -> None:
        time.sleep(1.5)
        on_body(connection, body)

    with connect(server.url) as raw, contextlib.ExitStack() as opened:
        raw.sendall(LIVE)
        assert statuses(answer(raw)) == [200]
        monkeypatch.setattr(Connection, "on_body", slow)
        other = opened.enter_context(connect(server.url))  # the parser of `raw` has the method that was there
        other.sendall(INFER)
        time.sleep(0.3)
        raw.sendall(LIVE)
        assert statuses(answer(raw)) == [200]
        assert statuses(answer(other)) == [200]


def test_a_connection_whose_body_came_after_its_answer_is_idle_like_others(start: Start, repository: Path) -> None:
    server = start(repository, keep_alive_timeout=1)
    with connect(server.url) as raw:
        raw.sendall(b"POST /nope HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        assert statuses(answer(raw)) == [404]
        raw.sendall(b"body" + LIVE)
        assert statuses(answer(raw)) == [200]
        raw.sendall(b"POST /nope HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        assert statuses(answer(raw)) == [404]
        raw.sendall(b"body")
        assert raw.recv(1) == b""


# ---- the limit


def test_connections_over_the_limit_are_refused_and_the_others_go_on(start: Start, repository: Path) -> None:
    server = start(repository, max_connections=4)
    with contextlib.ExitStack() as opened:
        silent = [opened.enter_context(connect(server.url)) for _ in range(4)]
        with connect(server.url) as refused:
            refused.sendall(b"x" * 100_000)
            got = everything(refused)
        assert statuses(got) == [503] and b'{"error":"the server has its 4 connections"}' in got
        assert b"retry-after: 1" in got
        for raw in silent:
            raw.sendall(LIVE)
            assert statuses(answer(raw)) == [200]

    def answers() -> bool:
        with connect(server.url) as again:
            again.sendall(LIVE)
            return statuses(answer(again)) == [200]

    wait_for(answers)


def test_idle_connections_make_room_the_longest_idle_first(start: Start, repository: Path) -> None:
    server = start(repository, max_connections=8)
    with contextlib.ExitStack() as opened:
        kept = [opened.enter_context(connect(server.url)) for _ in range(8)]
        for raw in reversed(kept):
            raw.sendall(LIVE)
            assert statuses(answer(raw)) == [200]
            time.sleep(0.01)
        server.engine.gate.clear()
        kept[-1].sendall(INFER)  # was idle for the longest time, and is busy now
        assert server.engine.running.acquire(timeout=30)
        for _ in range(3):
            raw = opened.enter_context(connect(server.url))
            raw.sendall(LIVE)
            assert statuses(answer(raw)) == [200]
        server.engine.gate.set()
        assert statuses(answer(kept[-1])) == [200]
        for raw in kept[4:7]:
            assert raw.recv(1) == b""
        for raw in kept[:4]:
            raw.sendall(LIVE)
            assert statuses(answer(raw)) == [200]


@pytest.mark.parametrize(("hard", "taken"), [(8192, 4096), (2000, 2000 - 512), (600, 300)])
def test_the_system_s_limit_on_files_is_raised_to_what_connections_need(hard: int, taken: int) -> None:
    """Where it cannot be, there are fewer connections: what else the process needs files for has some left."""
    code = (
        "import logging, resource; logging.basicConfig(); from service.server import allow_connections; "
        "print(allow_connections(4096), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard)),
    )
    assert ended.stdout.split() == [str(taken), str(min(hard, 4096 + 512))]
    assert (f"--max-connections 4096: it takes {taken} connections" in ended.stderr) == (taken < 4096)


# ---- slow clients


def test_a_client_that_does_not_read_its_answer_is_not_kept(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "grow", "grow")
    server = start(tmp_path, body_timeout=1.0)
    rows, size = 16, 16 << 20
    tensor = {"name": "input", "shape": [rows, 4], "datatype": "FP32", "data": [1.0] * rows * 4}
    body = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    request = (HEAD % len(body)).replace(b"identity", b"grow") + body
    with connect(server.url) as deaf, connect(server.url) as slow:
        for raw in (deaf, slow):
            raw.sendall(request)
        read, began = 0, time.monotonic()
        while read <= size and (piece := slow.recv(300_000)):
            read += len(piece)
            time.sleep(0.05)
        assert read > size, "a client that reads slowly has all of it"
        assert time.monotonic() - began > 2
        assert len(everything(deaf)) < size


def test_half_of_a_second_header_is_answered_when_it_is_late(start: Start, repository: Path) -> None:
    server = start(repository, header_timeout=0.5)
    with connect(server.url) as raw:
        raw.sendall(LIVE)
        assert statuses(answer(raw)) == [200]
        raw.sendall(LIVE[:-10])
        got = everything(raw)
    assert statuses(got) == [408] and b"within 0.5 s" in got


def test_a_header_that_trickles_behind_a_request_has_no_more_time_than_others(start: Start, repository: Path) -> None:
    server = start(repository, header_timeout=0.5)
    server.engine.gate.clear()
    with connect(server.url) as raw:
        raw.sendall(INFER)
        assert server.engine.running.acquire(timeout=30)
        raw.sendall(b"GET /")
        time.sleep(0.8)
        server.engine.gate.set()
        assert statuses(answer(raw)) == [200]
        assert trickle(raw) < TRICKLE_S


def trickle(raw: socket.socket) -> float:
    """Send byte after byte until the server has closed; the seconds that took, TRICKLE_S at most."""
    began = time.monotonic()
    raw.settimeout(0.05)
    while time.monotonic() - began < TRICKLE_S:
        with contextlib.suppress(TimeoutError):
            try:
                raw.sendall(b"x")
                if raw.recv(65536) == b"":
                    break
            except (BrokenPipeError, ConnectionResetError):
                break
    return time.monotonic() - began


@pytest.mark.parametrize("path", [b"/nope", b"/v2/models/identity/infer"], ids=["unread", "read too slowly"])
def test_a_body_that_trickles_on_after_its_answer_has_no_more_time_than_others(
    start: Start, repository: Path, path: bytes
) -> None:
    server = start(repository, body_timeout=0.5)
    with connect(server.url) as raw:
        raw.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" % path)
        assert trickle(raw) < TRICKLE_S


# ---- what is broken behind what is not


@pytest.mark.parametrize(
    ("garbage", "status"),
    [
        (b"\x00\x01 garbage\r\n\r\n", 400),
        (b"GET /" + b"x" * 5000, 431),
        (b"POST /nope HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
    ids=["garbage", "header", "body"],
)
@pytest.mark.parametrize("before", [1, 3])
def test_answers_come_in_the_order_of_requests(
    start: Start, repository: Path, garbage: bytes, status: int, before: int
) -> None:
    server = start(repository, max_header_bytes=2048)
    server.engine.gate.clear()
    with connect(server.url) as raw:
        raw.sendall(INFER * before + garbage)
        assert server.engine.running.acquire(timeout=30)
        time.sleep(0.05)
        server.engine.gate.set()
        got = everything(raw)
    assert statuses(got) == [200] * before + [status]
    assert got.count(b"[1.0,2.0,3.0,4.0]") == before


def test_half_a_request_behind_a_whole_one_costs_that_nothing(server: Running) -> None:
    server.engine.gate.clear()
    with connect(server.url) as raw:
        raw.sendall(INFER + INFER[:-5])
        raw.shutdown(socket.SHUT_WR)
        assert server.engine.running.acquire(timeout=30)
        time.sleep(0.05)
        server.engine.gate.set()
        got = everything(raw)
    assert statuses(got)[0] == 200 and statuses(got)[1:] in ([], [400])
    assert b"[1.0,2.0,3.0,4.0]" in got


def test_a_body_that_is_no_body_is_refused_at_once_and_given_up(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(server.url) as raw:
        raw.sendall(b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        time.sleep(0.05)
        raw.sendall(b"zz\r\n")
        assert statuses(everything(raw)) == [400]
    wait_for(lambda: server.metric("inference_inflight", model="identity") == 0)
    assert server.metric("inference_requests_total", model="identity", outcome="cancelled") == 1
    assert not [record for record in caplog.records if record.exc_info]


# ---- what the connection answers by itself

BROKEN = b"Transfer-Encoding: chunked\r\nX-Request-Id: mine-1\r\n\r\nzz\r\n"
UNREAD = {
    "garbage": (b"\x00\x01 garbage\r\n\r\n", 400, "connection"),
    "header too large": (b"GET / HTTP/1.1\r\nX-Request-Id: mine-1\r\nA: " + b"x" * 5000, 431, "connection"),
    "large header at once": (b"GET / HTTP/1.1\r\nX-Request-Id: mine-1\r\nA: " + b"x" * 3000 + END, 431, "connection"),
    "late header": (b"GET / HTTP/1.1\r\nX-Request-Id: mine-1\r\nA: ", 408, "connection"),
    "body of nothing": (b"POST /nope HTTP/1.1\r\nHost: x\r\n" + BROKEN, 400, "unmatched"),
    "body": (b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\n" + BROKEN, 400, "/v2/repository/index"),
    "body of an infer": (
        b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\n" + BROKEN,
        400,
        "/v2/models/{model}/infer",
    ),
}


@pytest.mark.parametrize("pieces", [1, 2], ids=["at once", "in two pieces"])
@pytest.mark.parametrize("what", UNREAD)
def test_what_the_connection_answers_is_counted_logged_and_named_like_any(
    start: Start, repository: Path, caplog: pytest.LogCaptureFixture, what: str, pieces: int
) -> None:
    sent, status, route = UNREAD[what]
    server = start(repository, max_header_bytes=2048, header_timeout=0.3, access_log=True)
    caplog.set_level(logging.INFO, "service.access")
    identities: list[str] = []
    caplog.handler.addFilter(lambda record: identities.append(request_id.get()) or True)
    with connect(server.url) as raw:
        half = len(sent) // 2 if pieces == 2 else 0
        for piece in filter(None, (sent[:half], sent[half:])):
            raw.sendall(piece)
            time.sleep(0.02)
        got = everything(raw)
    assert statuses(got) == [status]
    head = got.partition(END)[0].decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in head[1:])
    assert set(headers) == {"content-type", "content-length", "connection", "x-request-id", "server-timing"}
    total = float(headers["server-timing"].removeprefix("total;dur="))
    assert total >= (300 if status == 408 else 0)
    identity = headers["x-request-id"]
    assert identity == "mine-1" or (what == "garbage" and len(identity) > 10)

    def counts() -> dict[str, float]:
        text = server.client.get("/metrics").text
        lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith("http_responses_total{")]
        return {head: float(value) for head, _, value in lines if '"/metrics"' not in head}

    wait_for(lambda: bool(counts()))
    assert counts() == {f'http_responses_total{{route="{route}",status="{status}"}}': 1.0}
    found = [record.getMessage() for record in caplog.records if record.name == "service.access"]
    (line,) = [text for text in found if "/metrics" not in text]
    assert f" {status} " in line
    assert identities[found.index(line)] == identity


def test_connections_that_are_too_many_are_counted_and_named(start: Start, repository: Path) -> None:
    server = start(repository, max_connections=2)
    with contextlib.ExitStack() as opened:
        silent = [opened.enter_context(connect(server.url)) for _ in range(2)]
        with connect(server.url) as refused:
            got = everything(refused)
        assert statuses(got) == [503] and b"\r\nx-request-id: " in got and b"\r\nserver-timing: total;dur=" in got
        silent[0].sendall(LIVE.replace(b"/v2/health/live", b"/metrics"))
        assert sample(answer(silent[0]).decode(), "http_responses_total", route="connection", status="503") == 1


# ---- the end


def test_a_client_that_asks_as_the_server_shuts_down_is_answered(tmp_path: Path, processes: list[Process]) -> None:
    """Those of kept connections too: a connection is not closed under a client that may just have sent."""
    add_model(tmp_path, "identity", "identity")
    process = Process(tmp_path)
    processes.append(process)
    process.wait_ready()
    with contextlib.ExitStack() as opened:
        raws = [opened.enter_context(connect(process.url)) for _ in range(4)]
        for raw in raws[1:]:  # the first has never asked for anything
            raw.sendall(LIVE)
            assert statuses(answer(raw)) == [200]
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        for raw in raws[:3]:
            raw.sendall(INFER)
            got = answer(raw)
            assert statuses(got) == [503] and b"connection: close" in got
            assert raw.recv(1) == b""
        assert raws[3].recv(1) == b"", "within the 10 s that `connect` waits, far less than an idle connection is kept"
    assert process.process.wait(60) == 0


# ---- requests that do not wait for answers


def test_requests_that_were_sent_in_one_go_are_answered_in_order(start: Start, repository: Path) -> None:
    """Short and long ones, with bodies and in chunks, some of them refused; far more than are parsed at once."""
    server = start(repository)
    long_body = BODY[:-1] + b" " * 5000 + b"}"
    chunked = HEAD.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (
        len(BODY),
        BODY,
    )
    unknown = INFER.replace(b"identity", b"nobody")
    kinds = [(LIVE, 200), (INFER, 200), (HEAD % len(long_body) + long_body, 200), (chunked, 200), (unknown, 404)]
    given = [(index, *kinds[index % 5 if index % 7 else 0]) for index in range(400)]
    sent = b"".join(what.replace(b"Host: x", b"Host: x\r\nX-Request-Id: n%d" % index) for index, what, _ in given)
    for pieces in (len(sent), 1 << 16, 997):
        with connect(server.url) as raw:
            for begin in range(0, len(sent), pieces):
                raw.sendall(sent[begin : begin + pieces])
            raw.shutdown(socket.SHUT_WR)
            received = everything(raw)
        assert statuses(received) == [status for _, _, status in given]
        ids = [line[len(b"x-request-id: n") :] for line in received.split(b"\r\n") if line.startswith(b"x-request-id")]
        assert [int(text) for text in ids] == list(range(400))


def test_a_connection_is_not_idle_after_the_first_of_two_requests(start: Start, repository: Path) -> None:
    """The first one, which is refused at once, leaves no pause before the second, which came with it."""
    server = start(repository, max_connections=2)
    server.engine.gate.clear()
    with connect(server.url) as raw, connect(server.url) as idle:
        raw.sendall(INFER.replace(b"identity", b"nobody") + INFER)
        wait_for(lambda: server.serving.models.find("identity").metrics.inflight == 1)
        idle.sendall(LIVE)
        assert statuses(answer(idle)) == [200]
        with connect(server.url) as new:  # for which one has to go
            new.sendall(LIVE)
            assert statuses(answer(new)) == [200]
            assert idle.recv(1) == b""
            server.engine.gate.set()
            received = b""
            while len(statuses(received)) < 2 and (data := raw.recv(65536)):
                received += data
    assert statuses(received) == [404, 200]


def test_requests_that_wait_for_others_are_few_and_what_is_behind_them_is_not_read(
    start: Start, repository: Path
) -> None:
    server = start(repository)

    def waiting() -> int:
        gc.collect()  # what is over is in reference cycles, which are otherwise seen to every 10,000 objects
        return sum(isinstance(each, RequestResponseCycle) for each in gc.get_objects())

    before = waiting()
    server.engine.gate.clear()
    with connect(server.url) as raw:
        raw.sendall(INFER)
        wait_for(lambda: server.metric("inference_inflight", model="identity") == 1)
        raw.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 64 << 20:
                sent += raw.send(LIVE * 5000)
                time.sleep(0.01)
        assert sent < 64 << 20, "the server reads no more"
        assert waiting() - before < 300, "of thousands"
        server.engine.gate.set()
        raw.setblocking(True)
        raw.settimeout(10)
        received = b""
        while len(statuses(received)) < 1000:
            received += raw.recv(1 << 20)
            assert waiting() - before < 300, "of thousands"
    assert set(statuses(received)) == {200}
