"""Models that come and go while others are served: load, unload, reload, SIGHUP, changes on the disk."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.model import ServedModel
from service.repository import Repository
from tests.service.conftest import Client, Process, Running, Start, add_model, error_of, get, sample, wait_for
from tests.service.fakes import FakeModel


def change(server: Running, name: str, what: str) -> httpx.Response:
    return server.client.post(f"/v2/repository/models/{name}/{what}", json={})


def states(server: Running) -> dict[tuple[str, str], str]:
    index = server.client.post("/v2/repository/index").json()
    return {(entry["name"], entry["version"]): entry["state"] for entry in index}


def live(server: Running) -> list[FakeModel]:
    return [model for model in server.engine.models if not model.closed]


@pytest.fixture
def pool() -> Any:
    with ThreadPoolExecutor(16) as made:
        yield made


def test_a_folder_that_is_new_is_loaded_on_request(start: Start, repository: Path) -> None:
    server = start(repository)
    add_model(repository, "later", "identity")
    assert states(server)["later", ""] == "UNAVAILABLE"
    assert server.client.get("/v2/models/later").status_code == 404
    assert change(server, "later", "load").status_code == 200
    assert states(server)["later", "1"] == "READY"
    assert ("later", "") not in states(server)
    assert server.metric("engine_model_load_seconds", model="later") > 0


def test_loading_what_is_there_already_does_nothing(start: Start, repository: Path) -> None:
    server = start(repository)
    before = list(server.engine.models)
    assert change(server, "identity", "load").status_code == 200
    assert server.engine.models == before


def test_a_new_version_warms_up_before_it_takes_over(start: Start, repository: Path, pool: Any) -> None:
    server = start(repository)
    server.engine.load_gate.clear()
    add_model(repository, "identity", "int32", version=2)
    loading = pool.submit(change, server, "identity", "load")
    wait_for(lambda: ("identity", "2") in states(server))
    assert states(server)["identity", "2"] == "LOADING"
    assert server.client.get("/v2/health/ready").status_code == 200, "a server that serves stays ready"
    answer = server.identity([1, 2, 3, 4])
    assert (answer.status_code, answer.json()["model_version"]) == (200, "1")
    server.engine.load_gate.set()
    assert loading.result().status_code == 200
    assert server.client.get("/v2/models/identity").json()["inputs"][0]["datatype"] == "INT32"
    assert states(server)["identity", "1"] == "READY", "the version that is still in the folder stays"
    shutil.rmtree(repository / "identity" / "1")
    assert change(server, "identity", "load").status_code == 200
    assert ("identity", "1") not in states(server)


def test_a_changed_file_replaces_the_model_and_what_it_accepted_is_answered(
    start: Start, repository: Path, pool: Any
) -> None:
    server = start(repository)
    (old,) = [model for model in server.engine.models if model.kind == "identity"]
    server.engine.gate.clear()
    waiting = [pool.submit(server.identity, [float(i)] * 4) for i in range(5)]
    wait_for(lambda: server.metric("inference_inflight", model="identity") == 5)
    add_model(repository, "identity", "identity", flops=7)
    assert change(server, "identity", "load").status_code == 200
    assert len([model for model in live(server) if model.kind == "identity"]) == 2
    after = [pool.submit(server.identity, [float(i)] * 4) for i in range(5, 10)]
    wait_for(lambda: server.metric("inference_inflight", model="identity") == 10)
    server.engine.gate.set()
    for i, request in enumerate([*waiting, *after]):
        assert request.result().json()["outputs"][0]["data"] == [float(i)] * 4
    wait_for(lambda: old.closed)
    assert len([model for model in live(server) if model.kind == "identity"]) == 1
    assert states(server)["identity", "1"] == "READY"


def test_a_request_that_is_still_being_sent_keeps_its_model(start: Start, repository: Path) -> None:
    server = start(repository)
    (old,) = [model for model in server.engine.models if model.kind == "identity"]
    tensor = {"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    body = json.dumps({"inputs": [tensor]}).encode()
    head = f"POST /v2/models/identity/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as slow:
        slow.sendall(head.encode() + body[:10])
        wait_for(lambda: server.metric("inference_inflight", model="identity") == 1)
        add_model(repository, "identity", "identity", flops=7)
        assert change(server, "identity", "load").status_code == 200
        time.sleep(0.1)
        assert not old.closed
        slow.sendall(body[10:])
        assert slow.recv(65536).startswith(b"HTTP/1.1 200")
    wait_for(lambda: old.closed)


def test_reloading_under_load_loses_no_request(start: Start, repository: Path, pool: Any) -> None:
    server = start(repository)
    ended = threading.Event()
    statuses: list[int] = []

    def work(seed: int) -> None:
        with Client(base_url=server.url) as client:
            tensor = {"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [float(seed)] * 4}
            while not ended.is_set():
                answer = client.post("/v2/models/identity/infer", json={"inputs": [tensor]})
                statuses.append(answer.status_code)
                assert answer.json()["outputs"][0]["data"] == [float(seed)] * 4

    workers: list[Future[None]] = [pool.submit(work, seed) for seed in range(4)]
    for turn in range(15):
        add_model(repository, "identity", "identity", flops=turn + 1)
        before = len(statuses)
        assert change(server, "identity", "load").status_code == 200
        wait_for(lambda before=before: len(statuses) > before or any(worker.done() for worker in workers))
    ended.set()
    for worker in workers:
        worker.result()
    assert set(statuses) == {200}
    wait_for(lambda: len([model for model in live(server) if model.kind == "identity"]) == 1)


@pytest.mark.parametrize("content", ["junk", '{"kind": "identity", "bug": true}'])
def test_what_fails_to_load_leaves_the_model_as_it_was(start: Start, repository: Path, content: str) -> None:
    server = start(repository)
    (repository / "identity" / "1" / "model.onnx").write_text(content)
    response = change(server, "identity", "load")
    assert response.status_code == 400
    assert "model 'identity' cannot be loaded: " in error_of(response)
    assert str(repository) not in error_of(response)
    assert states(server)["identity", "1"] == "READY"
    assert server.identity([1, 2, 3, 4]).status_code == 200
    (repository / "identity" / "model.toml").write_text("task = 3")
    assert "'task'" in error_of(change(server, "identity", "load"))
    assert server.identity([1, 2, 3, 4]).status_code == 200


def test_a_model_that_failed_is_loaded_when_it_is_mended(start: Start, repository: Path) -> None:
    file = repository / "identity" / "1" / "model.onnx"
    good = file.read_text()
    file.write_text("junk")
    server = start(repository)
    assert server.identity([1, 2, 3, 4]).status_code == 503
    assert change(server, "identity", "load").status_code == 400
    file.write_text(good)
    assert change(server, "identity", "load").status_code == 200
    assert server.identity([1, 2, 3, 4]).status_code == 200


def test_a_broken_folder_is_served_when_it_is_mended(start: Start, repository: Path) -> None:
    toml = repository / "identity" / "model.toml"
    toml.write_text("task = 3")
    server = start(repository)
    assert server.identity([1, 2, 3, 4]).status_code == 503
    assert change(server, "identity", "unload").status_code == 200
    toml.unlink()
    assert change(server, "identity", "load").status_code == 200
    assert server.identity([1, 2, 3, 4]).status_code == 200


def test_unloading_answers_what_was_accepted_and_refuses_the_rest(start: Start, repository: Path, pool: Any) -> None:
    server = start(repository)
    server.engine.gate.clear()
    waiting = [pool.submit(server.identity, [float(i)] * 4) for i in range(3)]
    wait_for(lambda: server.metric("inference_inflight", model="identity") == 3)
    unloading = pool.submit(change, server, "identity", "unload")
    wait_for(lambda: states(server)["identity", "1"] == "UNAVAILABLE")
    assert server.identity([1, 2, 3, 4]).status_code == 503
    assert not unloading.done()
    server.engine.gate.set()
    assert [request.result().status_code for request in waiting] == [200] * 3
    assert unloading.result().status_code == 200
    assert not [model for model in live(server) if model.kind == "identity"]
    assert server.metric("engine_model_load_seconds", model="identity") == 0
    assert server.metric("inference_requests_total", model="identity", outcome="success") == 3
    assert change(server, "identity", "unload").status_code == 200


@pytest.mark.parametrize("name", ["nobody", "x" * 200, "..", ".hidden", "a b", "%2e%2e%2fetc"])
@pytest.mark.parametrize("what", ["load", "unload"])
def test_names_of_no_model(shared: Running, name: str, what: str) -> None:
    response = change(shared, name, what)
    assert response.status_code in (400, 404)
    assert error_of(response)


def test_too_many_changes_of_one_model_are_refused(start: Start, repository: Path, pool: Any) -> None:
    server = start(repository)
    server.engine.load_gate.clear()
    add_model(repository, "identity", "identity", flops=7)
    waiting = [pool.submit(change, server, "identity", "load") for _ in range(12)]
    wait_for(lambda: sum(request.done() for request in waiting) == 4)
    assert [request.result().status_code for request in waiting if request.done()] == [429] * 4
    server.engine.load_gate.set()
    assert sorted(request.result().status_code for request in waiting) == [200] * 8 + [429] * 4


def test_cycles_leave_nothing_behind(start: Start, repository: Path) -> None:
    server = start(repository)
    file = repository / "identity" / "1" / "model.onnx"
    good = file.read_text()

    def cycle(number: int) -> None:
        broken = number % 10 == 9
        file.write_text("junk" if broken else good)
        assert change(server, "identity", "load").status_code == (400 if broken else 200)
        assert change(server, "identity", "unload").status_code == 200

    for number in range(10):
        cycle(number)
    gc.collect()
    models = sum(isinstance(found, ServedModel) for found in gc.get_objects())
    descriptors = len(os.listdir("/proc/self/fd"))
    for number in range(40):
        cycle(number)
    server.engine.models[:] = live(server)
    gc.collect()
    assert sum(isinstance(found, ServedModel) for found in gc.get_objects()) <= models
    leaked = len(os.listdir("/proc/self/fd")) - descriptors
    assert leaked < 4, "four of the cycles fail, and other tests' sockets come and go in this process"
    file.write_text(good)
    assert change(server, "identity", "load").status_code == 200
    assert server.identity([1, 2, 3, 4]).status_code == 200


def test_the_repository_is_followed_where_that_is_set(start: Start, repository: Path) -> None:
    server = start(repository, poll_models=0.02)
    add_model(repository, "later", "identity")
    wait_for(lambda: states(server).get(("later", "1")) == "READY")
    add_model(repository, "later", "int32")
    url = "/v2/models/later"
    wait_for(lambda: server.client.get(url).json()["inputs"][0]["datatype"] == "INT32")
    (repository / "later" / "1" / "model.onnx").write_text("junk")
    loads = len(server.engine.models)
    time.sleep(0.3)
    assert states(server)["later", "1"] == "READY"
    assert len(server.engine.models) == loads
    shutil.rmtree(repository / "later")
    wait_for(lambda: server.client.get(url).status_code == 404)
    assert change(server, "identity", "unload").status_code == 200
    time.sleep(0.1)
    assert states(server)["identity", "1"] == "UNAVAILABLE", "what an administrator unloaded stays unloaded"


def test_sighup_follows_the_repository(repository: Path, processes: list[Process]) -> None:
    process = Process(repository, "--engine-process", "always")
    processes.append(process)
    process.wait_ready()
    add_model(repository, "later", "identity")
    shutil.rmtree(repository / "colours")
    process.process.send_signal(signal.SIGHUP)
    wait_for(lambda: get(f"{process.url}/v2/models/later/ready").status_code == 200)
    wait_for(lambda: get(f"{process.url}/v2/models/colours/ready").status_code == 404)
    assert process.process.poll() is None


def test_a_model_that_comes_and_goes_in_another_process(start: Start, repository: Path) -> None:
    server = start(repository, engine_process="always")
    for turn in range(3):
        add_model(repository, "identity", "identity", flops=turn + 1)
        assert change(server, "identity", "load").status_code == 200
        assert server.identity([1, 2, 3, 4]).status_code == 200
    launches = [
        line
        for line in server.client.get("/metrics").text.splitlines()
        if line.startswith("engine_kernel_launches_total") and 'model="identity"' in line
    ]
    assert len(launches) == 2, "one sample a kernel, though two generations were there"
    assert change(server, "identity", "unload").status_code == 200
    assert server.identity([1, 2, 3, 4]).status_code == 503


def test_a_change_ends_when_the_engine_process_does(start: Start, tmp_path: Path, pool: Any) -> None:
    add_model(tmp_path, "identity", "identity", faults={"-7": "stuck"})
    server = start(tmp_path, engine_process="always")
    stuck = pool.submit(server.identity, [-7.0] * 4)
    wait_for(lambda: server.metric("inference_inflight", model="identity") == 1)
    unloading = pool.submit(change, server, "identity", "unload")
    wait_for(lambda: states(server)["identity", "1"] == "UNAVAILABLE")
    transport = server.serving.engine._transport
    os.kill(transport.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    assert stuck.result().status_code == 503
    assert unloading.result().status_code == 200
    assert change(server, "identity", "load").status_code == 200
    assert server.identity([1, 2, 3, 4]).status_code == 200
    assert sample(server.client.get("/metrics").text, "engine_process_restarts_total") == 1


@pytest.mark.parametrize("name", ["model.toml", "labels.txt"])
def test_a_pipe_in_a_model_folder_is_refused(tmp_path: Path, name: str) -> None:
    """To open one waits until somebody writes: nobody may."""
    folder = tmp_path / "piped"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"x")
    os.mkfifo(folder / name)
    found = Repository(tmp_path).find("piped")
    assert found is not None
    assert found.problem.startswith(f"{name}: not a file")


def test_labels_of_another_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "linked"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"x")
    (tmp_path / "secret").write_text("red\n")
    (folder / "labels.txt").symlink_to(tmp_path / "secret")
    found = Repository(tmp_path / "models").find("linked")
    assert found is not None
    assert found.problem == "labels.txt: it leaves the model's folder; copy the file there" and found.labels == ()


def test_a_repository_that_is_gone_is_no_internal_error(start: Start, repository: Path) -> None:
    server = start(repository)
    repository.rename(repository.with_name("away"))
    answer = server.client.post("/v2/repository/index")
    assert answer.status_code == 503
    assert "folder cannot be read" in answer.json()["error"]


def test_a_file_whose_name_no_json_can_carry_is_refused_and_harms_no_other(start: Start, repository: Path) -> None:
    server = start(repository, engine_process="always")
    folder = repository / "accent"
    folder.mkdir()
    (folder / os.fsdecode(b"mod\xe8le.onnx")).write_bytes((repository / "identity" / "1" / "model.onnx").read_bytes())
    for _ in range(2):
        answer = change(server, "accent", "load")
        assert answer.status_code == 400 and "mod\\udce8le.onnx is not UTF-8; rename it" in error_of(answer)
    assert server.client.post("/v2/repository/index").status_code == 200
    assert server.identity([1, 2, 3, 4]).status_code == 200
    again = start(repository, engine_process="always")
    again.wait_ready()
    assert states(again)["identity", "1"] == "READY"
    assert [state for (name, _), state in states(again).items() if name == "accent"] == ["UNAVAILABLE"]
