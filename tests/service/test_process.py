"""The engine in a process of its own: what happens when it dies, hangs, fills its memory or is told to stop.

That it answers like the engine in the server's process is what the tests with the fixture `shared` show.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service import app
from service.settings import Settings
from service.workers import remote
from service.workers.clients import first_id
from service.workers.engine_api import import_path, real_engine
from service.workers.guest import GuestTransport
from service.workers.messages import (
    BatchingOptions,
    FailureCode,
    Infer,
    InferFailed,
    InferResult,
    LoadFailed,
    LoadModel,
    LocalTensor,
    ModelKey,
    ModelReady,
    Report,
    Stats,
    StatsReport,
    Stop,
    Stopped,
    Unload,
    Unloaded,
    WorkerLost,
    WorkerSilent,
)
from service.workers.process import ProcessOptions, ProcessTransport
from service.workers.shared_memory import create_region
from service.workers.transport import LocalTransport
from service.workers.wire import WireError, decode_report
from tests.service.conftest import Process, Running, Start, add_model, error_of, get, post, wait_for
from tests.service.fakes import WIDTH, FakeEngine


def own(start: Start, root: Path, **settings: Any) -> Running:
    return start(root, engine_process="always", **settings)


def transport(server: Running) -> ProcessTransport:
    found = server.serving.engine._transport
    assert isinstance(found, ProcessTransport)
    return found


def pid(server: Running) -> int:
    found = transport(server).pid
    assert found is not None
    return found


def ready(server: Running) -> bool:
    return server.client.get("/v2/health/ready").status_code == 200


def wide(server: Running, rows: int, seed: int = 0) -> tuple[httpx.Response, np.ndarray]:
    """An inference of `rows` × 256 KiB in binary form, and what the answer should be."""
    array = np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)
    tensor = {
        "name": "input",
        "shape": [rows, WIDTH],
        "datatype": "FP32",
        "parameters": {"binary_data_size": array.nbytes},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"inference-header-content-length": str(len(head))}
    return server.client.post("/v2/models/wide/infer", content=head + array.tobytes(), headers=headers), array


def content(response: httpx.Response, rows: int) -> np.ndarray:
    head = int(response.headers["inference-header-content-length"])
    return np.frombuffer(response.content[head:], np.float32).reshape(rows, WIDTH)


# ---- the end of the process


def test_kill_9_fails_what_is_in_flight_at_once_and_comes_back(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "identity", "identity", sleep=30, load_sleep=0.5)
    server = own(start, tmp_path)
    answers: list[tuple[float, httpx.Response]] = []

    def infer() -> None:
        response = server.identity([1, 2, 3, 4])
        answers.append((time.monotonic(), response))

    threads = [threading.Thread(target=infer) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: server.metric("inference_inflight", model="identity") == 4)
    before = pid(server)
    killed = time.monotonic()
    os.kill(before, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    for at, response in answers:
        assert at - killed < 15, "not after the 30 s that the run takes"
        assert response.status_code == 503
        assert error_of(response) == "the engine process ended unexpectedly; it is being restarted"
        assert response.headers["retry-after"] == "1"
    assert not ready(server)
    response = server.identity([1, 2, 3, 4])
    assert response.status_code == 503 and "restarted" in error_of(response)
    assert "restarted" in error_of(server.client.get("/v2/health/ready"))
    wait_for(lambda: ready(server), 60)
    assert pid(server) != before
    assert server.metric("engine_process_restarts_total") == 1


def test_kill_9_under_load_loses_only_what_was_in_flight(start: Start, repository: Path) -> None:
    server = own(start, repository)
    ended = time.monotonic() + 3
    wrong: list[httpx.Response] = []
    count = {200: 0, 503: 0}  # as many good ones as it takes time, on a slow machine
    lock = threading.Lock()

    def client(number: int) -> None:
        while time.monotonic() < ended or not ready(server) or count[200] <= 50:
            response = server.identity([number] * 4)
            with lock:
                count[response.status_code] += 1
                if response.status_code == 200 and response.json()["outputs"][0]["data"] != [number] * 4:
                    wrong.append(response)

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(client, number) for number in range(6)]
        for _ in range(2):
            wait_for(lambda: ready(server), 60)
            time.sleep(0.3)
            os.kill(pid(server), signal.SIGKILL)
            wait_for(lambda: not ready(server))
        for future in running:
            future.result(90)
    assert not wrong
    assert count[503] > 0
    wait_for(lambda: ready(server), 60)  # all clients may have ended before the second kill
    assert server.identity([1, 2, 3, 4]).status_code == 200


def test_kernel_counters_never_go_back(start: Start, repository: Path) -> None:
    server = own(start, repository)

    def launches() -> float:
        return server.metric("engine_kernel_launches_total", model="identity", kernel="gemm_f32")

    for _ in range(20):
        server.identity([1, 2, 3, 4])
    before = launches()
    assert before >= 20
    os.kill(pid(server), signal.SIGKILL)
    wait_for(lambda: not ready(server))
    assert launches() == before
    assert server.metric("engine_device_memory_bytes") == 0
    wait_for(lambda: ready(server), 60)
    for _ in range(5):
        server.identity([1, 2, 3, 4])
    assert before + 5 <= launches() < 2 * before + 5
    stats = server.client.get("/v2/models/identity/stats").json()["model_stats"][0]
    assert stats["inference_count"] == stats["inference_stats"]["success"]["count"] == 25


@pytest.mark.parametrize("fault", ["lost", "abort"])
def test_a_failed_device_costs_the_process_and_nothing_else(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    add_model(tmp_path, "identity", "identity", faults={"-7": fault})
    add_model(tmp_path, "encoder", "encoder")
    server = own(start, tmp_path)
    before = pid(server)
    with caplog.at_level(logging.INFO):
        response = server.identity([-7] * 4)
        assert response.status_code == 503
        wait_for(lambda: ready(server), 60)
        assert pid(server) != before
        assert server.identity([1, 2, 3, 4]).status_code == 200
        assert server.client.post("/v1/models/encoder/tokens", json={"ids": [[1, 2]]}).status_code == 200
        wait_for(lambda: ("exit status 70" if fault == "lost" else "SIGABRT") in caplog.text)
    if fault == "lost":
        assert "illegal address" in error_of(response)
    else:
        assert "last words of a library" in caplog.text


def test_a_batch_that_loses_the_device_fails_as_a_whole(start: Start, tmp_path: Path) -> None:
    """Not request by request: every further run would fail, too."""
    add_model(tmp_path, "identity", "identity", "[batching]\nmax_delay_ms = 300\n", faults={"-7": "lost"})
    server = own(start, tmp_path)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(server.identity, ([1] * 4, [-7] * 4, [2] * 4)))
    assert [answer.status_code for answer in answers] == [503, 503, 503]
    wait_for(lambda: ready(server), 60)
    assert server.metric("engine_process_restarts_total") == 1


def test_a_model_that_kills_the_process_while_loading_is_given_up(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "bad", "identity", fatal=True)
    add_model(tmp_path, "identity", "identity")
    server = own(start, tmp_path)
    assert ready(server)
    assert server.identity([1, 2, 3, 4]).status_code == 200
    response = server.client.get("/v2/models/bad/ready")
    assert response.status_code == 503 and "ended the engine process 3 times" in error_of(response)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that waits for its engine process for a second or two only."""

    def options(engine: str, transfer_bytes: int, light_run_us: int) -> ProcessOptions:
        return ProcessOptions(engine, transfer_bytes, light_run_us, silence_s=4.0, stuck_s=1.5)

    monkeypatch.setattr(app, "ProcessOptions", options)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("hang", ["stopped", "stuck"])
def test_a_process_that_hangs_is_ended(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, hang: str
) -> None:
    add_model(tmp_path, "identity", "identity", faults={"-7": "stuck"})
    server = own(start, tmp_path)
    before = pid(server)
    if hang == "stopped":
        os.kill(before, signal.SIGSTOP)
    response = server.identity([-7] * 4)
    assert response.status_code == 503
    assert ("said nothing" if hang == "stopped" else "computing for") in error_of(response)
    wait_for(lambda: ready(server), 60)
    assert pid(server) != before


def test_a_process_that_stands_still_makes_the_server_unready_and_refuses_requests(
    start: Start, repository: Path
) -> None:
    """Within seconds, not when it is ended; what it had before is answered when it goes on."""
    server = own(start, repository)
    before = pid(server)
    os.kill(before, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        try:
            accepted = pool.submit(server.identity, [1, 2, 3, 4])
            late = server.identity([1, 2, 3, 4], headers={"x-timeout-ms": "500"})
            assert late.status_code == 504
            wait_for(lambda: not ready(server), 12, every=0.05)
            for response in (server.identity([1, 2, 3, 4]), server.client.get("/v2/health/ready")):
                assert response.status_code == 503 and "the engine process does not answer" in error_of(response)
                assert response.headers["retry-after"] == "1"
            assert server.client.get("/v2/health/live").status_code == 200
            assert not accepted.done()
        finally:
            os.kill(before, signal.SIGCONT)
        assert accepted.result().status_code == 200
    wait_for(lambda: ready(server), 12, every=0.05)
    assert server.identity([1, 2, 3, 4]).status_code == 200
    assert pid(server) == before and server.metric("engine_process_restarts_total") == 0


def test_a_server_that_stood_still_itself_does_not_blame_its_engine_process(
    tmp_path: Path, processes: list[Process]
) -> None:
    add_model(tmp_path, "identity", "identity")
    process = Process(tmp_path, "--engine-process", "always")
    processes.append(process)
    process.wait_ready()
    time.sleep(1.5)  # until the engine process has been heard
    process.process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    process.process.send_signal(signal.SIGCONT)
    for _ in range(20):
        assert get(f"{process.url}/v2/health/ready").status_code == 200
        time.sleep(0.1)
    process.process.terminate()
    assert "said nothing" not in process.process.communicate(timeout=60)[1]


def test_signals_for_the_whole_group_do_not_end_the_process(start: Start, repository: Path) -> None:
    """Ctrl-C reaches it too; when it ends is for the server to say, which drains first."""
    server = own(start, repository)
    before = pid(server)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(before, number)
    time.sleep(0.2)
    assert server.identity([1, 2, 3, 4]).status_code == 200
    assert pid(server) == before


def test_the_process_ends_with_a_server_that_is_killed(tmp_path: Path, processes: list[Process]) -> None:
    add_model(tmp_path, "identity", "identity")
    process = Process(tmp_path, "--engine-process", "always")
    processes.append(process)
    process.wait_ready()
    (child,) = children(process.process.pid)
    process.process.kill()
    wait_for(lambda: not Path(f"/proc/{child}").exists(), 20)


def test_the_log_has_what_the_process_says(tmp_path: Path, processes: list[Process]) -> None:
    add_model(tmp_path, "identity", "identity", faults={"-7": "abort"})
    (tmp_path / "junk" / "1").mkdir(parents=True)
    (tmp_path / "junk" / "1" / "model.onnx").write_bytes(b"junk")
    process = Process(tmp_path, "--engine-process", "always", "--log-format", "json")
    processes.append(process)
    process.wait_ready()
    body = {"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [-7] * 4}]}
    assert post(f"{process.url}/v2/models/identity/infer", json=body).status_code == 503
    process.wait_ready()
    process.process.send_signal(signal.SIGTERM)
    _, errors = process.process.communicate(timeout=30)
    lines = [json.loads(line) for line in errors.splitlines()]
    said = {(line["logger"], line["message"]) for line in lines}
    assert ("engine.output", "last words of a library") in said
    assert any(
        logger == "service.workers.engine_worker" and "junk/1 could not be loaded" in text for logger, text in said
    )
    assert process.process.returncode == 0


def test_a_crash_while_it_finishes_its_work_is_a_crash(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It was told to stop, but had not: what was in flight fails, and the log does not say that it was stopped."""
    path = add_model(tmp_path, "identity", "identity", sleep=30) / "1" / "model.onnx"
    key = ModelKey("identity", 1)
    reports: list[Report] = []

    async def until(kind: type) -> None:
        async with asyncio.timeout(30):
            while not any(isinstance(report, kind) for report in reports):
                await asyncio.sleep(0.01)

    async def scenario() -> None:
        process = ProcessTransport(ProcessOptions(import_path(FakeEngine), 1 << 20))
        process.start(reports.append)
        process.send(LoadModel(key, str(path), "cpu", "auto", None, BatchingOptions(), None))
        await until(ModelReady)
        now = time.monotonic()
        inputs = (("input", LocalTensor(np.ones((1, 4), np.float32))),)
        process.send(Infer(1, key, inputs, ("output",), (), now, now + 60, 50))
        process.send(Stop())
        await asyncio.sleep(0.3)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        await until(Stopped)
        async with asyncio.timeout(10):
            while "SIGKILL" not in caplog.text:
                await asyncio.sleep(0.01)
        process.close()

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    reason = "the engine process ended unexpectedly"
    assert reports[1:] == [
        InferFailed(1, FailureCode.WORKER_LOST, f"{reason}; the server is shutting down", 1.0),
        WorkerLost(reason, restarting=False),
        Stopped(),
    ]
    (ended,) = [record for record in caplog.records if "SIGKILL" in record.message]
    assert ended.levelno == logging.ERROR
    assert "was stopped" not in caplog.text


@pytest.mark.parametrize("when", ["at work", "at rest"])
def test_a_crash_is_logged_however_soon_the_server_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    """The transport is closed before its own look at the child that has ended."""
    path = add_model(tmp_path, "identity", "identity", sleep=30) / "1" / "model.onnx"
    key = ModelKey("identity", 1)

    async def scenario() -> int:
        seen = {kind: asyncio.Event() for kind in (ModelReady, Stopped)}

        def receive(report: Report) -> None:
            if type(report) in seen:
                seen[type(report)].set()

        process = ProcessTransport(ProcessOptions(import_path(FakeEngine), 1 << 20))
        process.start(receive)
        process.send(LoadModel(key, str(path), "cpu", "auto", None, BatchingOptions(), None))
        await asyncio.wait_for(seen[ModelReady].wait(), 30)
        child = process.pid
        assert child is not None
        if when == "at work":
            now = time.monotonic()
            inputs = (("input", LocalTensor(np.ones((1, 4), np.float32))),)
            process.send(Infer(1, key, inputs, ("output",), (), now, now + 60, 50))
            await asyncio.sleep(0.3)
            process.send(Stop())
            os.kill(child, signal.SIGKILL)
            await asyncio.wait_for(seen[Stopped].wait(), 30)
        else:
            process.send(Stop())
            await asyncio.wait_for(seen[Stopped].wait(), 30)
            os.kill(child, signal.SIGKILL)
        process.close()
        return child

    with caplog.at_level(logging.INFO):
        child = asyncio.run(scenario())
    ends = [(r.levelno, r.message) for r in caplog.records if r.message.startswith(f"engine process {child} ")][1:]
    assert ends == [
        (logging.ERROR, f"engine process {child} ended: SIGKILL; the kernel does this where memory runs out")
    ]


def test_a_crash_while_the_server_drains_is_logged_and_answered(tmp_path: Path, processes: list[Process]) -> None:
    add_model(tmp_path, "identity", "identity", sleep=30)
    process = Process(tmp_path, "--engine-process", "always")
    processes.append(process)
    process.wait_ready()
    answers: list[httpx.Response] = []
    body = {"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1] * 4}]}
    url = f"{process.url}/v2/models/identity/infer"
    thread = threading.Thread(target=lambda: answers.append(post(url, json=body, timeout=30)))
    thread.start()
    process.wait_inflight(1)
    (child,) = children(process.process.pid)
    process.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    os.kill(child, signal.SIGKILL)
    thread.join()
    _, errors = process.process.communicate(timeout=30)
    assert answers[0].status_code == 503
    assert "ended unexpectedly" in error_of(answers[0])
    assert any(" ERROR " in line and f"{child} ended: SIGKILL" in line for line in errors.splitlines()), errors
    assert f"{child} was stopped" not in errors
    assert process.process.returncode == 0


def test_an_idle_process_ends_at_once(start: Start, repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = own(start, repository)
    process = transport(server)._process
    assert process is not None
    with caplog.at_level(logging.INFO):
        start.stop()  # type: ignore[attr-defined]
        assert process.returncode == 0, "one that did not end by itself is killed"
        assert "was stopped" in caplog.text
        assert "unexpectedly" not in caplog.text


def children(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").iterdir()
    return [int(word) for task in tasks for word in (task / "children").read_text().split()]


# ---- several clients of one process


def connect(attach: socket.socket, number: int) -> tuple[GuestTransport, socket.socket]:
    """A front end's transport to the process behind `attach`, and the end that keeps it there. It has another
    connection whenever one has ended, as long as there is that end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def again(connection: int) -> None:
        if ours.fileno() != -1:
            join(attach, number, ours, connection + 1)

    join(attach, number, ours, 1)
    return GuestTransport(theirs, again), ours


def join(attach: socket.socket, number: int, end: socket.socket, connection: int) -> None:
    """Bring the process behind `attach` and the front end behind `end` together, as the supervisor does."""
    near, far = socket.socketpair()
    regions = [create_region(1 << 20) for _ in range(2)]
    socket.send_fds(attach, [b"%d" % number], [far.fileno(), *regions])
    socket.send_fds(end, [b"%d" % connection], [near.fileno(), *regions])
    for side in (near, far):
        side.close()
    for region in regions:
        os.close(region)


def test_a_front_end_has_a_model_back_that_others_held_meanwhile(tmp_path: Path) -> None:
    """It lets the model go and waits for no other front end, which may never do the same."""
    path = add_model(tmp_path, "identity", "identity") / "1" / "model.onnx"
    key = ModelKey("identity", 1)
    command = LoadModel(key, str(path), "cpu", "auto", None, BatchingOptions(), None)

    async def scenario() -> None:
        async with asyncio.timeout(60):
            attached: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
            process = ProcessTransport(ProcessOptions(import_path(FakeEngine), 1 << 20), attached.set_result)
            process.start(lambda report: None)
            queues: list[asyncio.Queue[Report]] = [asyncio.Queue() for _ in range(2)]
            connected = [connect(await attached, number) for number in (1, 2)]
            for (transport, _), reports in zip(connected, queues, strict=True):
                transport.start(reports.put_nowait)
            (first, _), (second, _) = connected
            for transport, reports in zip((first, second), queues, strict=True):
                transport.send(command)
                assert isinstance(await reports.get(), ModelReady)
            for _ in range(2):
                first.send(Unload(key))
                assert await queues[0].get() == Unloaded(key)
                first.send(command)
                assert isinstance(await queues[0].get(), ModelReady)
            for transport, reports in zip((second, first), reversed(queues), strict=True):
                transport.send(Unload(key))
                assert await reports.get() == Unloaded(key)
            for transport, kept in connected:
                transport.close()
                kept.close()
            process.close()

    asyncio.run(scenario())


def test_a_front_end_that_cannot_read_what_a_model_says_serves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine process lives on and knows nothing of it. A model that always does so is given up; an answer that
    does so once costs what was in flight."""
    commands = {
        name: LoadModel(ModelKey(name, 1), str(add_model(tmp_path, name, "identity") / "1" / "model.onnx"), "cpu",
                        "auto", None, BatchingOptions(), None)
        for name in ("good", "odd")
    }  # fmt: skip
    unreadable: list[type[Report]] = []

    def decode(text: bytes, payload: bytes, leases: Any) -> Any:
        report = decode_report(text, payload, leases)
        if isinstance(report, ModelReady) and report.key.name == "odd":
            raise WireError("no such type")
        if type(report) in unreadable:
            unreadable.remove(type(report))
            raise WireError("no such type")
        return report

    monkeypatch.setattr("service.workers.link.decode_report", decode)

    async def scenario() -> None:
        async with asyncio.timeout(60):
            attached: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
            process = ProcessTransport(ProcessOptions(import_path(FakeEngine), 1 << 20), attached.set_result)
            process.start(lambda report: None)
            reports: asyncio.Queue[Report] = asyncio.Queue()
            transport, kept = connect(await attached, 1)
            transport.start(reports.put_nowait)
            pid = process.pid

            async def until(*kinds: type[Report]) -> Report:
                while not isinstance(report := await reports.get(), kinds):
                    pass
                return report

            async def answer(number: int) -> Report:
                row, now = LocalTensor(np.ones((1, 4), np.float32)), time.monotonic()
                key = commands["good"].key
                transport.send(Infer(first_id(1) + number, key, (("input", row),), ("output",), (), now, now + 60, 50))
                return await until(InferResult, InferFailed)

            transport.send(commands["good"])
            await until(ModelReady)
            transport.send(commands["odd"])
            given_up = await until(LoadFailed)
            assert isinstance(given_up, LoadFailed) and given_up.key.name == "odd"
            await until(ModelReady)
            unreadable.append(InferResult)
            failed = await answer(1)
            assert isinstance(failed, InferFailed) and failed.code is FailureCode.WORKER_LOST
            assert "cannot be read" in failed.reason
            await until(ModelReady)
            assert isinstance(await answer(2), InferResult)
            assert process.pid == pid, "which has not ended"
            kept.close()
            transport.close()
            process.close()

    asyncio.run(scenario())


# ---- shared memory


def test_a_thousand_requests_leave_nothing_behind(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "wide", "wide")
    server = own(start, tmp_path)

    def some(count: int) -> None:
        with ThreadPoolExecutor(4) as pool:
            for response, array in pool.map(lambda seed: wide(server, 1, seed), range(count)):
                assert response.status_code == 200
                assert np.array_equal(content(response, 1), array)

    def held() -> tuple[list[str], int, int]:
        gc.collect()
        descriptors = sum(len(os.listdir(f"/proc/{process}/fd")) for process in ("self", pid(server)))
        return sorted(os.listdir("/dev/shm")), descriptors, transport(server).shared_bytes

    some(50)
    wait_for(lambda: transport(server).shared_bytes == 0)
    before, resident = held(), resident_bytes(pid(server))
    some(1000)
    wait_for(lambda: transport(server).shared_bytes == 0)
    after = held()
    assert after[0] == before[0] and after[2] == 0
    assert abs(after[1] - before[1]) <= 8, "file descriptors (idle connections of the client come and go)"
    assert resident_bytes(pid(server)) - resident < 32 << 20


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096


def test_large_tensors_cross_exactly(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "wide", "wide", "[batching]\nmax_batch = 64\n")
    server = own(start, tmp_path)
    for rows in (1, 3, 64):
        response, array = wide(server, rows)
        assert response.status_code == 200, response.text
        assert np.array_equal(content(response, rows), array)


def test_a_request_larger_than_the_shared_memory_is_refused(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "wide", "wide")
    server = own(start, tmp_path, transfer_bytes=1 << 20)
    response, _ = wide(server, 5)
    assert response.status_code == 413
    assert "--transfer-bytes" in error_of(response)
    response, array = wide(server, 4)
    assert response.status_code == 200 and np.array_equal(content(response, 4), array)


def test_an_answer_larger_than_the_shared_memory_is_refused(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "grow", "grow")
    server = own(start, tmp_path, transfer_bytes=1 << 20)

    def infer(rows: int) -> httpx.Response:
        tensor = {"name": "input", "shape": [rows, 4], "datatype": "FP32", "data": [1.0] * rows * 4}
        body = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
        return server.client.post("/v2/models/grow/infer", json=body)

    response = infer(2)
    assert response.status_code == 413 and "--transfer-bytes" in error_of(response)
    assert infer(1).status_code == 200


def test_full_shared_memory_is_back_pressure(start: Start, tmp_path: Path) -> None:
    """More requests than fit at once: each is answered rightly or told to come back, and the memory comes back."""
    add_model(tmp_path, "wide", "wide", sleep=0.05)
    server = own(start, tmp_path, transfer_bytes=1 << 20)
    statuses: list[int] = []

    def ask(seed: int) -> tuple[httpx.Response, np.ndarray]:
        response, array = wide(server, 1, seed)
        if response.status_code == 429:
            time.sleep(0.01)  # or all would have been refused before the first run is over
        return response, array

    with ThreadPoolExecutor(12) as pool:
        for response, array in pool.map(ask, range(120)):
            statuses.append(response.status_code)
            if response.status_code == 200:
                assert np.array_equal(content(response, 1), array)
            else:
                assert response.status_code == 429 and response.headers["retry-after"] == "1"
                assert "shared memory" in error_of(response)
    assert statuses.count(200) > 0 and statuses.count(429) > 0
    wait_for(lambda: transport(server).shared_bytes == 0)


def test_a_cancelled_request_gives_its_memory_back(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "wide", "wide", sleep=0.3)
    server = own(start, tmp_path)
    url = f"{server.url}/v2/models/wide/infer"
    array = np.zeros((1, WIDTH), np.float32)
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": "0"}
    for _ in range(4):
        with pytest.raises(httpx.ReadTimeout):
            post(url, content=array.tobytes(), headers=headers, timeout=httpx.Timeout(30, read=0.1))
    wait_for(lambda: transport(server).shared_bytes == 0)


# ---- which transport


@pytest.mark.parametrize(
    ("where", "gpu", "expected"),
    [
        ("auto", False, LocalTransport),
        ("auto", True, ProcessTransport),
        ("always", False, ProcessTransport),
        ("never", True, LocalTransport),
    ],
)
def test_the_engine_runs_where_the_setting_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: Any, gpu: bool, expected: type
) -> None:
    monkeypatch.setattr(app, "uses_gpu", lambda device: gpu)
    made = app._transport(Settings(models=tmp_path, engine_process=where), real_engine)
    assert isinstance(made, expected)


def test_an_engine_for_another_process_must_have_a_name() -> None:
    assert import_path(real_engine) == "service.workers.engine_api:real_engine"
    assert import_path(FakeEngine) == "tests.service.fakes:FakeEngine"
    unnamed: Callable[[], Any] = lambda: FakeEngine()  # noqa: E731  (a lambda is the point)
    with pytest.raises(ValueError, match="cannot be imported"):
        import_path(unnamed)


def test_a_bug_at_the_start_of_a_process_costs_that_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another one is started."""
    path = add_model(tmp_path, "identity", "identity") / "1" / "model.onnx"
    key = ModelKey("identity", 1)
    started: list[socket.socket] = []

    def on_started(attach: socket.socket) -> None:
        started.append(attach)
        if len(started) == 1:
            raise RuntimeError("a bug")

    async def scenario() -> None:
        async with asyncio.timeout(60):
            process = ProcessTransport(ProcessOptions(import_path(FakeEngine), 1 << 20), on_started)
            reports: asyncio.Queue[Report] = asyncio.Queue()
            process.start(reports.put_nowait)
            process.send(LoadModel(key, str(path), "cpu", "auto", None, BatchingOptions(), None))
            while not isinstance(await reports.get(), ModelReady):
                pass
            process.close()

    asyncio.run(scenario())
    assert len(started) == 2 and "a bug" in caplog.text


def test_a_front_end_without_files_for_a_connection_asks_for_another(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(60):
            attached: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
            process = ProcessTransport(ProcessOptions(import_path(FakeEngine), 1 << 20), attached.set_result)
            process.start(lambda report: None)
            attach = await attached
            theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            asked: asyncio.Queue[int] = asyncio.Queue()
            guest = GuestTransport(theirs, asked.put_nowait)
            reports: asyncio.Queue[Report] = asyncio.Queue()
            guest.start(reports.put_nowait)
            near, far = socket.socketpair()
            socket.send_fds(ours, [b"7"], [near.fileno()])  # as where the others could not be opened
            socket.send_fds(attach, [b"1"], [far.fileno()])
            assert await asked.get() == 7
            near.close()
            far.close()
            near, far = socket.socketpair()
            regions = [create_region(1 << 20) for _ in range(2)]
            socket.send_fds(attach, [b"1"], [far.fileno(), *regions])
            socket.send_fds(ours, [b"8"], [near.fileno(), *regions])
            guest.send(Stats(first_id(1)))
            while not isinstance(report := await reports.get(), StatsReport):
                pass
            assert report.models == ()
            guest.close()
            process.close()
            for end in (near, far, ours, theirs):
                end.close()
            for region in regions:
                os.close(region)

    asyncio.run(scenario())


def test_silence_shows_to_a_process_that_is_late_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its looks comes late, but an engine process that never says anything is silent all the same."""
    monkeypatch.setattr(remote, "_WATCH_EVERY_S", 0.02)
    monkeypatch.setattr(remote, "_SILENT_S", 0.3)
    reports: list[Report] = []

    async def scenario() -> None:
        found = GuestTransport(socket.socket(), lambda number: None)
        found._receive = reports.append
        found._heard = time.monotonic()
        watch = asyncio.get_running_loop().create_task(found._watch())
        async with asyncio.timeout(30):
            while not reports:
                time.sleep(0.06)
                await asyncio.sleep(0.001)
        watch.cancel()

    asyncio.run(scenario())
    assert isinstance(reports[0], WorkerSilent) and reports[0].seconds > 0.3
