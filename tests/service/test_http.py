"""What holds for every endpoint: one form of error, bounded bodies, deadlines, overload, clients that go."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from load_tests.documented import Documented
from service.access import right_for
from tests.service.conftest import Client, Running, Start, add_model, error_of, wait_for

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "HEAD")
PATHS = (
    "/",
    "/nope",
    "/v1/models",
    "/v1/models/identity",
    "/v1/models/identity/images",
    "/v1/models/encoder/tokens",
    "/v1/models/nobody/tokens",
    "/v1/embeddings",
    "/v2",
    "/v2/",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/identity",
    "/v2/models/nobody",
    "/v2/models/identity/versions/1",
    "/v2/models/identity/versions/x",
    "/v2/models/identity/ready",
    "/v2/models/identity/config",
    "/v2/models/identity/stats",
    "/v2/models/identity/profile",
    "/page/main.js",
    "/page/nothing.js",
    "/v2/models/stats",
    "/v2/models/identity/infer",
    "/v2/models/identity/versions/9/infer",
    "/v2/repository/index",
    "/v2/repository/models/identity/load",
    "/v2/models/..%2f..%2fetc/infer",
    "/v2/models/%00/infer",
    "/v2/models/a%0d%0ab",
    "/metrics",
    "/v1/models/%2e%2e/images",
    "//v2",
    "/v2/models/" + "x" * 3000,
)
BODIES = (b"", b"{}", b"[]", b"null", b"{", b'{"inputs": []}', b"\x00" * 100, b"[" * 5000)


@pytest.mark.parametrize("path", PATHS, ids=[path[:40] for path in PATHS])
def test_every_method_and_body_gets_a_known_answer(shared: Running, path: str) -> None:
    for method, body in itertools.product(METHODS, BODIES):
        response = shared.client.request(method, path, content=body)
        assert response.status_code in (200, 400, 404, 405, 415), (method, body)
        if response.status_code != 200 and method != "HEAD":
            assert error_of(response)
    assert shared.client.get("/v2/health/ready").status_code == 200


def test_unknown_paths_methods_and_models_name_themselves(shared: Running) -> None:
    assert "/nope" in error_of(shared.client.get("/nope"))
    response = shared.client.delete("/v2/health/live")
    assert response.status_code == 405
    assert "DELETE" in error_of(response)
    assert response.headers["allow"] == "GET"
    response = shared.client.get("/v2/models/nobody")
    assert response.status_code == 404
    assert "nobody" in error_of(response)


def chunks(count: int, size: int = 65536) -> Iterator[bytes]:
    for _ in range(count):
        yield b"x" * size


def test_a_body_over_the_limit_is_refused_whatever_its_headers_say(start: Start, repository: Path) -> None:
    server = start(repository, max_body_bytes=300_000)
    url = "/v2/models/identity/infer"
    for content in (b"x" * 400_000, chunks(7)):
        response = server.client.post(url, content=content)
        assert response.status_code == 413
        assert "300000" in error_of(response)
    assert server.client.post(url, content=chunks(4)).status_code == 400
    assert server.identity([1, 2, 3, 4]).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models/colours/images", "/v1/models/encoder/tokens"])
def test_a_query_key_that_a_route_does_not_take_is_named(shared: Running, path: str) -> None:
    response = shared.client.post(f"{path}?top_k=1&topk=3", content=b"{}")
    assert response.status_code == 400
    assert error_of(response) == "there is no parameter 'topk'; the query takes top_k, raw, version"


def test_foreign_protocols_pass_over_query_keys(shared: Running) -> None:
    assert shared.client.post("/v1/embeddings?x=1", json={"model": "encoder", "input": "a"}).status_code == 200
    assert shared.client.get("/v2/models/identity?x=1").status_code == 200


def test_a_client_that_asks_before_sending_is_told_at_once(start: Start, repository: Path) -> None:
    server = start(repository, max_body_bytes=1000)
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2000\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(head)
        assert raw.recv(65536).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("path", ["/v2/models/identity/infer", "/v1/models/encoder/tokens", "/v1/embeddings"])
def test_a_length_over_the_limit_is_refused_before_the_body_is_there(server: Running, path: str) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    began = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer
        assert time.monotonic() - began < 5


def test_a_refused_client_that_stays_and_says_nothing_is_not_kept(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n")
        assert b"".join(iter(lambda: raw.recv(65536), b"")).startswith(b"HTTP/1.1 413")
        time.sleep(3)
        with pytest.raises(OSError):
            _send_slowly(raw, 20)


def _send_slowly(raw: socket.socket, count: int) -> None:
    for _ in range(count):
        raw.sendall(b"x")
        time.sleep(0.02)


def test_a_client_that_goes_on_sending_reads_why_it_was_refused(start: Start, repository: Path) -> None:
    server = start(repository, max_body_bytes=3_000_000)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n")
        for _ in range(50):
            raw.sendall(b"x" * 100_000)
            time.sleep(0.002)
        assert everything(raw).startswith(b"HTTP/1.1 413")


def test_an_endless_body_is_cut_off(start: Start, repository: Path) -> None:
    server = start(repository, max_body_bytes=300_000)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 100 << 20:
                raw.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                sent += 65536
    assert sent < 50 << 20
    assert server.identity([1, 2, 3, 4]).status_code == 200


def test_a_body_that_does_not_arrive_is_given_up(start: Start, repository: Path) -> None:
    server = start(repository, body_timeout=0.1)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        answer = raw.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"error"' in answer


def test_compressed_bodies(start: Start, repository: Path) -> None:
    server = start(repository, max_body_bytes=300_000)
    body = b'{"inputs":[{"name":"input","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}'
    url = "/v2/models/identity/infer"

    def post(content: bytes, encoding: str) -> httpx.Response:
        return server.client.post(url, content=content, headers={"content-encoding": encoding})

    assert post(gzip.compress(body), "gzip").status_code == 200
    assert post(zlib.compress(body), "deflate").status_code == 200
    assert post(body, "identity").status_code == 200
    assert post(gzip.compress(b"x" * 10_000_000), "gzip").status_code == 413
    assert post(gzip.compress(body)[:-9], "gzip").status_code == 400
    assert post(body, "gzip").status_code == 400
    response = post(body, "br")
    assert response.status_code == 415
    assert "'br'" in error_of(response)


def test_bytes_that_are_not_http_get_a_clean_end(shared: Running) -> None:
    host, port = shared.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"\x16\x03\x01 not http\r\n\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 400")
    assert shared.identity([1, 2, 3, 4]).status_code == 200


@pytest.mark.parametrize("path", [b"/v2/models/\xe4/infer", b"/" + b"x" * 70_000], ids=["not ASCII", "too long"])
def test_a_client_that_sends_on_after_a_bad_header_reads_why(shared: Running, path: bytes) -> None:
    """A close with bytes unread would reset the connection, and the answer with it."""
    host, port = shared.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n")
        for _ in range(30):
            raw.sendall(b"x" * 100_000)
        answer = b""
        while piece := raw.recv(65536):
            answer += piece
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 ")) and answer.count(b"HTTP/1.1") == 1
    assert answer.endswith(b'"}')


def test_the_answer_says_where_the_time_went(shared: Running) -> None:
    response = shared.identity([1, 2, 3, 4])
    parts = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert list(parts) == ["queue", "preprocess", "compute", "postprocess"]
    assert all(0 <= float(value) < 5000 for value in parts.values())


def test_request_ids_are_echoed_or_made(shared: Running) -> None:
    given = shared.client.get("/v2", headers={"x-request-id": "abc-1.2"})
    assert given.headers["x-request-id"] == "abc-1.2"
    first, second = (shared.client.get("/nope").headers["x-request-id"] for _ in range(2))
    assert first
    assert first != second
    assert shared.client.get("/v2", headers={"x-request-id": "a b<script>"}).headers["x-request-id"] != "a b<script>"


def test_a_deadline_in_a_header_ends_the_wait(server: Running) -> None:
    server.engine.gate.clear()
    started = time.monotonic()
    response = server.identity([1, 2, 3, 4], headers={"x-timeout-ms": "50"})
    assert time.monotonic() - started < 5
    assert response.status_code == 504
    assert "deadline" in error_of(response)
    server.engine.gate.set()
    assert server.identity([1, 2, 3, 4], headers={"x-timeout-ms": "5000"}).status_code == 200
    assert server.metric("inference_requests_total", model="identity", outcome="deadline") == 1


def test_the_servers_own_deadline_holds_for_all(start: Start, repository: Path) -> None:
    server = start(repository, request_timeout=0.05)
    server.engine.gate.clear()
    assert server.identity([1, 2, 3, 4]).status_code == 504
    assert server.identity([1, 2, 3, 4], headers={"x-timeout-ms": "60000"}).status_code == 504
    server.engine.gate.set()


@pytest.mark.parametrize("header", ["x-timeout-ms", "x-priority"])
@pytest.mark.parametrize("value", ["-1", "x", "1.5", "9999999999", "", "٣"])
def test_bad_deadlines_and_priorities(shared: Running, header: str, value: str) -> None:
    response = shared.identity([1, 2, 3, 4], headers={header: value.encode()})
    assert response.status_code == 400
    assert header.lower() in error_of(response).lower()


def test_overload_is_refused_at_once_and_what_was_accepted_is_answered(start: Start, repository: Path) -> None:
    add_model(repository, "identity", "identity", "[batching]\nmax_batch = 1\n")
    server = start(repository)
    server.engine.gate.clear()
    limits = httpx.Limits(max_connections=60)
    with ThreadPoolExecutor(40) as pool, Client(base_url=server.url, limits=limits) as client:
        body = {"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
        futures = [pool.submit(client.post, "/v2/models/identity/infer", json=body) for _ in range(40)]
        wait_for(lambda: sum(future.done() for future in futures) == 40 - 17)
        server.engine.gate.set()
        answers = [future.result() for future in futures]
    statuses = sorted(answer.status_code for answer in answers)
    # One runs, sixteen full batches wait, the rest is refused.
    assert statuses == [200] * 17 + [429] * 23
    refused = [answer for answer in answers if answer.status_code == 429]
    assert all(int(answer.headers["retry-after"]) >= 1 and "full" in error_of(answer) for answer in refused)
    assert server.metric("inference_requests_total", model="identity", outcome="overloaded") == 23
    assert server.metric("inference_requests_total", model="identity", outcome="success") == 17


def test_requests_that_wait_together_run_together(server: Running) -> None:
    server.engine.gate.clear()
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(server.identity, [0.0] * 4)
        assert server.engine.running.acquire(timeout=30)
        others = [pool.submit(server.identity, [float(i)] * 4) for i in range(1, 9)]
        wait_for(lambda: server.metric("inference_queue_depth", model="identity") == 8)
        server.engine.gate.set()
        assert first.result().status_code == 200
        for i, future in enumerate(others, start=1):
            assert future.result().json()["outputs"][0]["data"] == [float(i)] * 4
    assert server.engine.calls == [("identity", (1, 4)), ("identity", (8, 4))]


def test_a_client_that_goes_is_dropped_before_compute(server: Running) -> None:
    server.engine.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(server.identity, [0.0] * 4)
        assert server.engine.running.acquire(timeout=30)
        host, port = server.url.removeprefix("http://").split(":")
        clients = [socket.create_connection((host, int(port))) for _ in range(5)]
        for raw in clients:
            raw.sendall(infer_bytes())
        wait_for(lambda: server.metric("inference_queue_depth", model="identity") == 5)
        for raw in clients:
            raw.close()
        wait_for(lambda: server.metric("inference_queue_depth", model="identity") == 0)
        server.engine.gate.set()
        assert busy.result().status_code == 200
    assert server.engine.calls == [("identity", (1, 4))]
    assert server.metric("inference_dropped_requests_total", model="identity") == 5
    assert server.metric("inference_requests_total", model="identity", outcome="cancelled") == 5
    assert server.metric("inference_inflight", model="identity") == 0


def infer_bytes(version: str = "1.1") -> bytes:
    body = b'{"inputs":[{"name":"input","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}'
    head = f"POST /v2/models/identity/infer HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def half_closed(server: Running, request: bytes) -> socket.socket:
    """A client that has sent all it will send, and reads."""
    host, port = server.url.removeprefix("http://").split(":")
    raw = socket.create_connection((host, int(port)), timeout=10)
    raw.sendall(request)
    raw.shutdown(socket.SHUT_WR)
    return raw


def everything(raw: socket.socket) -> bytes:
    """What comes until the server closes."""
    with raw:
        return b"".join(iter(lambda: raw.recv(65536), b""))


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.5])
def test_a_client_that_closed_its_sending_side_gets_its_answer(server: Running, version: str, seconds: float) -> None:
    server.engine.gate.clear()
    raw = half_closed(server, infer_bytes(version))
    assert server.engine.running.acquire(timeout=30)
    time.sleep(seconds)
    server.engine.gate.set()
    *interim, answer = everything(raw).split(b"HTTP/1.1 ")[1:]
    assert answer.startswith(b"200 OK") and b"connection: close" in answer and b"[1.0,2.0,3.0,4.0]" in answer
    assert set(interim) <= {b"100 Continue\r\n\r\n"}
    assert len(interim) <= 3 and not (interim and version == "1.0")


def test_pipelined_requests_of_a_client_that_closed_its_sending_side(server: Running) -> None:
    got = everything(half_closed(server, infer_bytes() * 3))
    assert got.count(b"HTTP/1.1 200 OK") == 3
    assert got.count(b"[1.0,2.0,3.0,4.0]") == 3


@pytest.mark.parametrize("cut", [10, 60, -5], ids=["path", "header", "body"])
def test_half_a_request_and_a_closed_sending_side_end_the_connection(server: Running, cut: int) -> None:
    began = time.monotonic()
    got = everything(half_closed(server, infer_bytes()[:cut]))
    assert b"200" not in got
    assert time.monotonic() - began < 5
    assert not server.engine.calls


def test_a_client_that_goes_after_it_closed_its_sending_side_is_noticed(server: Running) -> None:
    server.engine.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(server.identity, [0.0] * 4)
        assert server.engine.running.acquire(timeout=30)
        raw = half_closed(server, infer_bytes())
        assert raw.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert server.metric("inference_queue_depth", model="identity") == 1
        raw.close()
        wait_for(lambda: server.metric("inference_queue_depth", model="identity") == 0)
        server.engine.gate.set()
        assert busy.result().status_code == 200
    assert server.engine.calls == [("identity", (1, 4))]
    assert server.metric("inference_requests_total", model="identity", outcome="cancelled") == 1


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("cut", [0, -7], ids=["one piece", "two pieces"])
def test_another_protocol_that_is_offered_is_declined(server: Running, protocol: str, chunked: bool, cut: int) -> None:
    """Java's client offers HTTP/2 with every request; what it sends with it is not lost, nor is what follows."""
    head, body = infer_bytes().split(b"\r\n\r\n")
    offer = f"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: {protocol}\r\nHTTP2-Settings: AAEAAEAA".encode()
    if chunked:
        head, body = head.rsplit(b"\r\n", 1)[0], b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        offer += b"\r\nTransfer-Encoding: chunked"
    request = head + offer + b"\r\n\r\n" + body
    pieces = [request] if not cut else [request[:cut], request[cut:]]
    got = answer_to(server, *pieces, request, shut=True)
    assert got.count(b"HTTP/1.1 200 OK") == 2, got
    assert got.count(b"[1.0,2.0,3.0,4.0]") == 2


@pytest.mark.parametrize("offer", [b"", b"Connection: upgrade\r\nUpgrade: x\r\n"])
def test_a_proxy_is_what_the_server_is_not(server: Running, offer: bytes) -> None:
    got = answer_to(server, b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n" + offer + b"\r\n")
    assert got.startswith(b"HTTP/1.1 400 ")
    assert b'{"error":"not a valid HTTP request"}' in got


def test_one_models_failure_is_that_requests_500_and_no_more(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "identity", "identity", crash=True)
    server = start(tmp_path)
    response = server.identity([-1.0] * 4)
    assert response.status_code == 500
    assert error_of(response)
    assert server.identity([1.0] * 4).status_code == 200


def test_openapi_documents_every_route(shared: Running) -> None:
    document = shared.client.get("/openapi.json").json()
    paths = document["paths"]
    for path in (
        "/v1/models/{model}/images",
        "/v1/models/{model}/tokens",
        "/v1/embeddings",
        "/v2/models/{model}/infer",
    ):
        operation = paths[path]["post"]
        assert operation["requestBody"]["content"]
        assert {"200", "400", "404", "413", "429", "503", "504"} <= set(operation["responses"])
    for path, operations in paths.items():
        for method, operation in operations.items():
            content = operation["responses"]["200"]["content"]
            assert content and all(form["schema"] for form in content.values()), (method, path)
            named = {parameter["name"] for parameter in operation.get("parameters", ())}
            assert named >= {part[1:-1] for part in path.split("/") if part.startswith("{")}
            if method == "post" and operation["tags"] != ["administration"]:
                assert named >= {"X-Timeout-Ms", "X-Priority"}, path


def test_openapi_documents_what_the_server_does(shared: Running) -> None:
    """`documented_by` in conftest.py holds every answer of these tests to it."""
    document = shared.client.get("/openapi.json").json()
    assert "422" not in str(document) and "HTTPValidationError" not in str(document)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            found = {int(status) for status in operation["responses"]}
            always = {200, 400, 405, 408, 431, 500, 503}
            always |= {401, 403} if right_for(path) is not None else set()
            assert found >= always, (method, path)
            named = "{" in path and path != "/v2/systemsharedmemory/region/{region}/unregister"
            named |= path in ("/v1/embeddings", "/v2/systemsharedmemory/status")  # by the body, by the query
            assert (404 in found) == named, (method, path)
            reads = method == "post" and not path.endswith("/unregister")
            assert (found & {413, 415, 429, 504} == {413, 415, 429, 504}) == reads, (method, path)
            assert (304 in found) == (path == "/")
            assert found <= always | {304, 404, 413, 415, 429, 504}


def test_a_status_that_is_not_documented_is_noticed() -> None:
    documented = Documented({"paths": {"/a/{b}": {"get": {"responses": {"200": {}, "404": {}}}}}})
    assert documented.problem("GET", "/a/x%20y", 404) is None
    assert documented.problem("POST", "/a/x", 405) is None
    assert documented.problem("GET", "/b", 404) is None
    assert documented.problem("GET", "/docs", 304) is None
    for method, path, status in (("GET", "/a/b", 422), ("GET", "/a/b", 405), ("POST", "/a/b", 200), ("GET", "/b", 200)):
        assert "not documented" in str(documented.problem(method, path, status))


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/models/encoder/tokens"])
def test_a_broken_body_is_answered_in_the_form_of_its_route(server: Running, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    got = answer_to(server, head.encode())
    assert got.startswith(b"HTTP/1.1 400 ")
    error = json.loads(got.partition(b"\r\n\r\n")[2])["error"]
    assert (error["message"] if path == "/v1/embeddings" else error) == "not a valid HTTP request"


def test_openapi_says_which_form_errors_have(shared: Running) -> None:
    document = shared.client.get("/openapi.json").json()

    def form(method: str, path: str) -> str:
        content = document["paths"][path][method]["responses"]["400"]["content"]
        return content["application/json"]["schema"]["properties"]["error"]["type"]

    assert form("post", "/v1/embeddings") == form("get", "/v1/models") == "object"
    assert form("post", "/v1/models/{model}/tokens") == form("post", "/v2/models/{model}/infer") == "string"


def test_many_threads_get_their_own_answers(shared: Running) -> None:
    def work(seed: int) -> bool:
        with Client(base_url=shared.url) as client:
            for i in range(40):
                value = float(seed * 1000 + i)
                body = {"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [value] * 4}]}
                answer = client.post("/v2/models/identity/infer", json=body).json()
                if answer["outputs"][0]["data"] != [value] * 4:
                    return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert threading.active_count() < 60


def answer_to(server: Running, *pieces: bytes, shut: bool = False) -> bytes:
    """What comes back until the server closes the connection. `shut`: the client sends no more after the pieces."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        received = b""
        try:
            for piece in pieces:
                raw.sendall(piece)
                time.sleep(0.02)
            if shut:
                raw.shutdown(socket.SHUT_WR)
            while data := raw.recv(65536):
                received += data
        except ConnectionResetError:
            pass
        return received


LINE, ASK = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n", b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        (LINE + b"a: " + b"b" * 3000 + b"\r\n\r\n",),
        (LINE + b"a: " + b"b" * 1500, b"b" * 1500),
        (LINE, *[b"a: " + b"b" * 900 + b"\r\n"] * 3),
        (b"GET /" + b"x" * 3000,),
    ],
    ids=["whole", "one line", "many lines", "path"],
)
@pytest.mark.parametrize("before", [(), (ASK,)], ids=["first", "second"])
def test_a_large_header_is_refused(
    start: Start, repository: Path, pieces: tuple[bytes, ...], before: tuple[bytes, ...]
) -> None:
    server = start(repository, max_header_bytes=2048)
    answer = answer_to(server, *before, *pieces)
    assert answer.count(b"HTTP/1.1 200") == len(before)
    assert b"HTTP/1.1 431" in answer
    assert b"more than 2048 bytes" in answer
    assert server.identity([1.2345678] * 400).status_code == 200, "a body is no header"


@pytest.mark.parametrize("pieces", [(), (LINE,), (ASK, LINE), (ASK, b"\r\n")], ids=["none", "half", "second", "blank"])
def test_a_header_that_does_not_arrive_is_given_up(start: Start, repository: Path, pieces: tuple[bytes, ...]) -> None:
    server = start(repository, header_timeout=0.3)
    began = time.monotonic()
    answer = answer_to(server, *pieces)
    assert time.monotonic() - began < 8, "far less than the 75 s of an idle connection"
    assert answer.startswith(b"HTTP/1.1 200" if ASK in pieces else b"HTTP/1.1 408" if pieces else b"")


def test_a_long_answer_and_an_idle_connection_are_no_late_header(start: Start, repository: Path) -> None:
    server = start(repository, header_timeout=0.4)
    for _ in range(2):
        server.engine.gate.clear()
        threading.Timer(0.6, server.engine.gate.set).start()
        assert server.identity([1, 2, 3, 4]).status_code == 200
        time.sleep(0.6)


@pytest.mark.parametrize("path", ["/", "/nope", "/metrics", "/v2/health/live", "/v2/models/identity"])
def test_every_answer_says_how_long_it_took(shared: Running, path: str) -> None:
    (timing,) = shared.client.get(path).headers.get_list("server-timing")
    assert timing.startswith("total;dur=") and float(timing.partition("=")[2]) >= 0
