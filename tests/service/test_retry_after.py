"""`Retry-After`: on every 429, and on every 503 that passes by itself; not where waiting does not help."""

from __future__ import annotations

import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from service.errors import NotServed, Overloaded, Unavailable, from_engine
from service.workers.messages import FailureCode
from tests.service.conftest import Process, Running, Start, add_model, post, wait_for
from tests.service.fakes import FakeEngine

ROW = {"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}


def plainly(server: Running) -> httpx.Response:
    """The same request by way of ASGI: a compressed answer is asked for."""
    return server.identity([1, 2, 3, 4], headers={"accept-encoding": "gzip"})


def test_while_a_model_loads_and_while_the_server_drains(start: Start, repository: Path) -> None:
    engine = FakeEngine()
    engine.load_gate.clear()
    server = start(repository, engine, ready=False)
    ready = "/v2/health/ready"
    for response in (server.identity([1, 2, 3, 4]), plainly(server), server.client.get(ready)):
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert "loading" in response.text
    engine.load_gate.set()
    server.wait_ready()
    server.serving.begin_drain()
    for response in (
        server.identity([1, 2, 3, 4]),
        plainly(server),
        server.client.get(ready),
        server.client.post("/v2/repository/models/identity/load"),
    ):
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert "shutting down" in response.text


def test_not_where_somebody_has_to_change_something(start: Start, repository: Path) -> None:
    add_model(repository, "typo", "identity", "tusk = 3")
    add_model(repository, "broken", "no such kind")
    server = start(repository)
    assert server.client.post("/v2/repository/models/identity/unload").status_code == 200
    for name in ("typo", "broken", "identity"):
        response = server.client.post(f"/v2/models/{name}/infer", json=ROW)
        assert response.status_code == 503 and "retry-after" not in response.headers


@pytest.mark.parametrize("headers", [{}, {"accept-encoding": "gzip"}], ids=["directly", "ASGI"])
def test_what_the_end_of_the_server_cuts_short(
    tmp_path: Path, processes: list[Process], headers: dict[str, str]
) -> None:
    add_model(tmp_path, "identity", "identity", sleep=60)
    process = Process(tmp_path, "--drain-timeout", "1")
    processes.append(process)
    process.wait_ready()
    with ThreadPoolExecutor(1) as pool:
        url = f"{process.url}/v2/models/identity/infer"
        waiting = pool.submit(post, url, json=ROW, headers=headers, timeout=60)
        process.wait_inflight(1)
        process.process.send_signal(signal.SIGTERM)
        response = waiting.result()
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "shut down" in response.text


def test_a_full_queue_says_how_long_what_waits_will_take(start: Start, tmp_path: Path) -> None:
    """16 batches of one row wait, 0.25 s each."""
    add_model(tmp_path, "identity", "identity", "[batching]\nmax_batch = 1\n", sleep=0.25)
    server = start(tmp_path)
    assert server.identity([1, 2, 3, 4]).status_code == 200  # its rate is known now
    refused: list[httpx.Response] = []
    lock = threading.Lock()

    def ask(_: int) -> None:
        response = server.identity([1, 2, 3, 4])
        if response.status_code != 200:
            with lock:
                refused.append(response)

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(ask, range(24)))
    assert {response.status_code for response in refused} == {429}
    assert all(3 <= int(response.headers["retry-after"]) <= 8 for response in refused)


def test_too_many_changes_of_a_model(start: Start, repository: Path) -> None:
    server = start(repository)
    server.engine.load_gate.clear()
    shutil.copytree(repository / "identity", repository / "later")
    with ThreadPoolExecutor(12) as pool:
        url = "/v2/repository/models/later/load"
        waiting = [pool.submit(server.client.post, url) for _ in range(12)]
        wait_for(lambda: sum(request.done() for request in waiting) == 4)
        refused = [request.result() for request in waiting if request.done()]
        server.engine.load_gate.set()
    assert [(response.status_code, response.headers["retry-after"]) for response in refused] == [(429, "1")] * 4


@pytest.mark.parametrize("code", list(FailureCode))
def test_failures_of_the_engine(code: FailureCode) -> None:
    """What stands for 429 and 503 says when to come back, also where the engine does not know."""
    error = from_engine(code, "why", None)
    assert (error.retry_after is not None) == isinstance(error, Overloaded | Unavailable)
    assert not isinstance(error, NotServed)
    assert isinstance(error, Overloaded | Unavailable) == (
        code in (FailureCode.OVERLOADED, FailureCode.NOT_LOADED, FailureCode.OUT_OF_MEMORY, FailureCode.WORKER_LOST)
    )
    assert from_engine(code, "why", 7.0).retry_after == 7.0
