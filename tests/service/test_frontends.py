"""Several HTTP processes before one engine process: requests, changes, counters, and what the end of each one means."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from prometheus_client.samples import Exemplar

from service.frontend import FrontEndArguments
from service.merging import Merged, lasting, merge
from service.settings import Settings
from tests.service.conftest import ROOT, Process, add_model, children, common_models, sample, wait_for
from tests.service.fakes import WIDTH

FRONTENDS = 3
EVERY_S = 0.05  # between two looks at many processes, each of which takes them time that they need


class Fleet:
    """A server of several processes, asked through a connection per request, so that all front ends get their share."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.pid = process.process.pid
        self.url = process.url

    def front_ends(self) -> list[int]:
        return children(self.pid, "service.frontend")

    def engine(self) -> int:
        (found,) = children(self.pid, "service.workers.child")
        return found

    def ask(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        with httpx.Client(verify=False, timeout=30) as client:  # no certificates: reading those takes longest of all
            return client.request(method, f"{self.url}{path}", **kwargs)

    def identity(self, values: list[float], client: httpx.Client | None = None, model: str = "identity") -> Any:
        tensor = {"name": "input", "shape": [len(values) // 4, 4], "datatype": "FP32", "data": values}
        path, body = f"/v2/models/{model}/infer", {"inputs": [tensor]}
        if client is None:
            return self.ask("POST", path, json=body)
        return client.post(f"{self.url}{path}", json=body)

    def everywhere(self, path: str) -> set[int]:
        """Statuses of a path over many connections."""
        return {self.ask("GET", path).status_code for _ in range(24)}

    def wait_everywhere(self, path: str, status: int, seconds: float = 60.0) -> None:
        end, seen = time.monotonic() + seconds, self.everywhere(path)
        while seen != {status}:
            assert time.monotonic() < end, f"{path} is answered with {seen}, not {status} everywhere"
            time.sleep(EVERY_S)
            seen = self.everywhere(path)

    def metric(self, name: str, **labels: str) -> float:
        return sample(self.ask("GET", "/metrics").text, name, **labels)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = common_models(tmp_path_factory.mktemp("fleet") / "models")
    add_model(made, "slow", "identity", sleep=0.5)
    add_model(made, "wide", "wide")
    return made


@pytest.fixture(scope="module")
def fleet(root: Path) -> Iterator[Fleet]:
    # Nobody reads what they log before the end, and a pipe that is full stops them.
    quiet = ("--log-level", "warning")
    process = Process(root, "--frontends", str(FRONTENDS), "--shared-memory-prefixes", "/tilewave_fleet_", *quiet)
    try:
        made = Fleet(process)
        process.wait_ready()
        made.wait_everywhere("/v2/health/ready", 200)
        yield made
    finally:
        process.process.terminate()
        _, errors = process.process.communicate(timeout=60)
        print(errors)
        assert process.process.returncode == 0
    assert children(made.pid, "service.frontend") == [] and children(made.pid, "service.workers.child") == []


def test_there_are_so_many_processes_and_all_of_them_answer(fleet: Fleet) -> None:
    assert len(fleet.front_ends()) == FRONTENDS
    before = fleet.metric("inference_requests_total", model="identity", outcome="success")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: fleet.identity([float(i)] * 4), range(60)))
    for i, answer in enumerate(answers):
        assert answer.json()["outputs"][0]["data"] == [float(i)] * 4
    assert {fleet.metric("inference_requests_total", model="identity", outcome="success") for _ in range(8)} == {
        before + 60
    }, "every front end says the same sum"


def test_rows_of_different_front_ends_share_a_run(fleet: Fleet) -> None:
    runs = fleet.metric("inference_batch_size_count", model="slow")
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: fleet.identity([float(i)] * 4, model="slow"), range(16)))
    assert [answer.status_code for answer in answers] == [200] * 16
    assert fleet.metric("inference_batch_size_count", model="slow") - runs <= 6
    assert fleet.metric("inference_batch_size_sum", model="slow") >= 16


def test_statistics_are_sums(fleet: Fleet) -> None:
    def count() -> int:
        (entry,) = fleet.ask("GET", "/v2/models/identity/stats").json()["model_stats"]
        return int(entry["inference_stats"]["success"]["count"])

    before = count()
    for _ in range(20):
        assert fleet.identity([1.0] * 4).status_code == 200
    assert {count() for _ in range(8)} == {before + 20}


def test_every_front_end_has_the_profile_of_the_one_engine(fleet: Fleet) -> None:
    def run() -> None:
        assert fleet.identity([1.0] * 28).status_code == 200

    def runs() -> int:
        answer = fleet.ask("GET", "/v2/models/identity/profile", params={"plan": "batch=7"}).json()
        assert [step["step"] for step in answer["steps"]] == ["sums", "copies"]
        return int(answer["steps"][0]["calls"])

    run()
    before = runs()  # other tests' requests may have made a batch of seven, too
    for _ in range(5):
        run()
    assert {runs() for _ in range(8)} == {before + 5}


def test_large_tensors_of_all_front_ends_cross_exactly(fleet: Fleet) -> None:
    generator = np.random.default_rng(5)
    arrays = [generator.standard_normal((rows, WIDTH), np.float32) for rows in (1, 2, 3, 7)]

    def work(array: np.ndarray) -> bool:
        given = triton.InferInput("input", list(array.shape), "FP32")
        given.set_data_from_numpy(array)
        with triton.InferenceServerClient(fleet.url.removeprefix("http://")) as client:
            return bool((client.infer("wide", [given]).as_numpy("output") == array).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, arrays * 6))


def test_a_change_through_one_front_end_is_a_change_of_all(fleet: Fleet, root: Path) -> None:
    ready = "/v2/models/colours/ready"
    assert fleet.everywhere(ready) == {200}
    assert fleet.ask("POST", "/v2/repository/models/colours/unload").status_code == 200
    assert fleet.everywhere(ready) == {503}
    assert fleet.ask("POST", "/v2/repository/models/colours/load").status_code == 200
    assert fleet.everywhere(ready) == {200}
    add_model(root, "later", "identity")
    assert fleet.ask("POST", "/v2/repository/models/later/load").status_code == 200
    assert fleet.everywhere("/v2/models/later/ready") == {200}
    (root / "later" / "1" / "model.onnx").write_text("junk")
    assert fleet.ask("POST", "/v2/repository/models/later/load").status_code == 400
    assert fleet.everywhere("/v2/models/later/ready") == {200}
    shutil.rmtree(root / "later")
    os.kill(fleet.pid, signal.SIGHUP)
    fleet.wait_everywhere("/v2/models/later/ready", 404)


def test_changes_through_several_front_ends_at_once_leave_all_of_them_alike(fleet: Fleet) -> None:
    def change(what: str) -> int:
        return fleet.ask("POST", f"/v2/repository/models/colours/{what}").status_code

    with ThreadPoolExecutor(6) as pool:
        for _ in range(8):
            assert set(pool.map(change, ["load", "unload"] * 3)) == {200}
            assert len(fleet.everywhere("/v2/models/colours/ready")) == 1
    assert change("load") == 200


def test_a_change_that_is_refused_because_too_many_wait_changes_nothing(fleet: Fleet, root: Path) -> None:
    add_model(root, "sleepy", "identity", load_sleep=1.0)

    def change(what: str) -> int:
        return fleet.ask("POST", f"/v2/repository/models/sleepy/{what}").status_code

    assert change("load") == 200
    add_model(root, "sleepy", "identity", load_sleep=1.0, flops=3)
    with ThreadPoolExecutor(16) as pool:
        loads = [pool.submit(change, "load") for _ in range(8)]
        time.sleep(0.3)
        assert {pool.submit(change, "unload").result() for _ in range(4)} == {429}
        assert {load.result() for load in loads} == {200}
    assert fleet.everywhere("/v2/models/sleepy/ready") == {200}
    shutil.rmtree(root / "sleepy")
    os.kill(fleet.pid, signal.SIGHUP)
    fleet.wait_everywhere("/v2/models/sleepy/ready", 404)


def test_a_front_end_that_dies_while_it_changes_a_model_leaves_the_turn_to_the_next(fleet: Fleet, root: Path) -> None:
    add_model(root, "sleepy", "identity", load_sleep=1.0)

    def load() -> int:
        try:
            return fleet.ask("POST", "/v2/repository/models/sleepy/load").status_code
        except httpx.TransportError:
            return 0

    before = fleet.front_ends()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(load)
        time.sleep(0.3)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert first.result() == 0
    wait_for(lambda: len(fleet.front_ends()) == FRONTENDS and not {*fleet.front_ends()} & {*before}, 30, EVERY_S)
    fleet.wait_everywhere("/v2/health/ready", 200)
    assert load() == 200
    shutil.rmtree(root / "sleepy")
    os.kill(fleet.pid, signal.SIGHUP)
    fleet.wait_everywhere("/v2/models/sleepy/ready", 404)


def test_reloading_under_load_loses_no_request(fleet: Fleet, root: Path) -> None:
    ended = threading.Event()

    def work(seed: int) -> list[int]:
        statuses = []
        while not ended.is_set():
            answer = fleet.identity([float(seed)] * 4)
            statuses.append(answer.status_code)
            assert answer.json()["outputs"][0]["data"] == [float(seed)] * 4
        return statuses

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(work, seed) for seed in range(4)]
        try:
            for turn in range(5):
                add_model(root, "identity", "identity", flops=turn + 2)
                assert fleet.ask("POST", "/v2/repository/models/identity/load").status_code == 200
        finally:
            ended.set()
        assert {status for worker in workers for status in worker.result()} == {200}


def test_shared_memory_is_registered_everywhere(fleet: Fleet) -> None:
    key = f"/tilewave_fleet_{os.getpid()}"
    segment = Path(f"/dev/shm{key}")
    segment.write_bytes(np.arange(4, dtype=np.float32).tobytes())
    try:
        region = "/v2/systemsharedmemory/region/r"
        assert fleet.ask("POST", f"{region}/register", json={"key": key, "byte_size": 16}).status_code == 200
        assert fleet.everywhere(f"{region}/status") == {200}
        place = {"shared_memory_region": "r", "shared_memory_byte_size": 16}
        tensor = {"name": "input", "shape": [1, 4], "datatype": "FP32", "parameters": place}
        for _ in range(12):
            answer = fleet.ask("POST", "/v2/models/identity/infer", json={"inputs": [tensor]})
            assert answer.json()["outputs"][0]["data"] == [0, 1, 2, 3]
        assert fleet.ask("POST", f"{region}/unregister").status_code == 200
        assert fleet.everywhere(f"{region}/status") == {404}
    finally:
        segment.unlink()


def test_a_front_end_that_dies_loses_only_its_own_connections(fleet: Fleet) -> None:
    """It is started again, knows what administrators changed, and what it counted stays counted."""
    assert fleet.ask("POST", "/v2/repository/models/colours/unload").status_code == 200
    before = fleet.metric("inference_requests_total", model="identity", outcome="success")
    victims = fleet.front_ends()
    outcomes: list[str] = []
    ended = threading.Event()

    def work(_: int) -> None:
        while not ended.is_set():
            with contextlib.ExitStack() as opened:
                client = opened.enter_context(httpx.Client(verify=False, timeout=30))
                for _ in range(5):
                    try:
                        answer = fleet.identity([2.0] * 4, client)
                    except httpx.TransportError:
                        outcomes.append("lost")
                        break
                    outcomes.append(str(answer.status_code))
                    assert answer.status_code != 200 or answer.json()["outputs"][0]["data"] == [2.0] * 4

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(work, i) for i in range(4)]
        time.sleep(0.3)
        os.kill(victims[0], signal.SIGKILL)
        wait_for(lambda: len(set(fleet.front_ends()) - set(victims)) == 1, 30, EVERY_S)
        time.sleep(1.5)
        ended.set()
        for worker in workers:
            worker.result()
    assert set(outcomes) <= {"200", "lost"}
    assert outcomes.count("lost") <= 4, "each client had one connection at most to the one that died"
    fleet.wait_everywhere("/v2/health/ready", 200)
    assert fleet.everywhere("/v2/models/colours/ready") == {503}, "unloaded is unloaded, also where it came after"
    assert fleet.metric("inference_requests_total", model="identity", outcome="success") >= before
    assert fleet.ask("POST", "/v2/repository/models/colours/load").status_code == 200
    assert fleet.everywhere("/v2/models/colours/ready") == {200}


def test_front_ends_that_die_again_and_again_cost_nothing_but_their_own_connections(fleet: Fleet) -> None:
    """A new one accepts when it can answer as the others do: connections wait for that in its socket's backlog."""
    ended = threading.Event()
    outcomes: list[str] = []

    def work(path: str) -> None:
        """A connection for each request; what breaks without an answer was one to the process that was killed. One that
        waits for long is a time-out, and fails."""
        while not ended.is_set():
            try:
                answer = fleet.identity([2.0] * 4) if path == "infer" else fleet.ask("GET", path)
                outcomes.append(f"{path} {answer.status_code}")
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
                outcomes.append("reset")

    paths = ("infer", "infer", "/v2/health/ready", "/v2/models/colours/ready")
    good = {f"{path} 200" for path in paths}
    with ThreadPoolExecutor(len(paths)) as pool:
        workers = [pool.submit(work, path) for path in paths]
        try:
            for turn in range(6):
                before = set(fleet.front_ends())
                os.kill(sorted(before)[turn % FRONTENDS], signal.SIGKILL)
                wait_for(lambda before=before: len(set(fleet.front_ends()) - before) == 1, 30, EVERY_S)
                seen = Counter(outcomes)
                wait_for(lambda seen=seen: all(Counter(outcomes)[one] > seen[one] + 2 for one in good), 60, EVERY_S)
        finally:
            ended.set()
        for worker in workers:
            worker.result()
    assert set(outcomes) <= {"reset", *good}
    assert outcomes.count("reset") <= 6 * len(paths)


def test_a_load_that_fails_leaves_front_ends_to_come_as_those_that_are_there(fleet: Fleet, root: Path) -> None:
    """What was unloaded stays so in one that is started after a load which failed."""
    assert fleet.ask("POST", "/v2/repository/models/colours/unload").status_code == 200
    (root / "colours" / "2").mkdir()
    (root / "colours" / "2" / "model.onnx").write_text("junk")
    try:
        for _ in range(FRONTENDS):
            assert fleet.ask("POST", "/v2/repository/models/colours/load").status_code == 400
        before = set(fleet.front_ends())
        os.kill(min(before), signal.SIGKILL)
        wait_for(lambda: len(set(fleet.front_ends()) - before) == 1, 30, EVERY_S)
        fleet.wait_everywhere("/v2/health/ready", 200)
        assert fleet.everywhere("/v2/models/colours/ready") == {503}
        assert fleet.ask("POST", "/v2/repository/models/nobody/unload").status_code == 404
    finally:
        shutil.rmtree(root / "colours" / "2")
    assert fleet.ask("POST", "/v2/repository/models/colours/load").status_code == 200
    assert fleet.everywhere("/v2/models/colours/ready") == {200}


def test_a_front_end_to_come_serves_what_the_others_do_whatever_the_disk_has(fleet: Fleet, root: Path) -> None:
    """After a load that failed, or before one: models, labels and settings are those that were loaded."""

    def datatypes(model: str) -> set[str]:
        answers = [fleet.ask("GET", f"/v2/models/{model}").json() for _ in range(24)]
        return {answer["inputs"][0]["datatype"] for answer in answers}

    def best(value: float) -> set[str]:
        tensor = {"name": "input", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": [value] * 64 + [0.0] * 128}
        output = {"name": "logits", "parameters": {"classification": 1}}
        body = {"inputs": [tensor], "outputs": [output]}
        answers = [fleet.ask("POST", "/v2/models/colours/infer", json=body).json() for _ in range(24)]
        return {answer["outputs"][0]["data"][0].split(":")[2] for answer in answers}

    def index() -> set[str]:
        ours = ("identity", "colours", "encoder", "gone")
        answers = [fleet.ask("POST", "/v2/repository/index").json() for _ in range(24)]
        return {json.dumps([entry for entry in answer if entry["name"] in ours]) for answer in answers}

    add_model(root, "gone", "identity")
    add_model(root, "identity", "identity")
    labels = root / "colours" / "labels.txt"
    tokenizer = root / "encoder" / "tokenizer.json"
    good = labels.read_text()
    for model in ("gone", "identity", "colours", "encoder"):
        assert fleet.ask("POST", f"/v2/repository/models/{model}/load").status_code == 200
    assert (datatypes("identity"), best(1.0)) == ({"FP32"}, {"red"})
    try:
        add_model(root, "identity", "int32")
        (root / "identity" / "2").mkdir()
        (root / "identity" / "2" / "model.onnx").write_text("junk")
        assert fleet.ask("POST", "/v2/repository/models/identity/load").status_code == 400
        labels.write_text("rouge\nvert\nbleu\n")
        add_model(root, "encoder", "encoder", "[tokens]\nmax_length = 2\n")
        shutil.rmtree(root / "gone")
        before = index()
        texts = fleet.ask("POST", "/v1/models/encoder/tokens", json={"text": "a man is eating"}).json()
        for _ in range(2):
            victims = set(fleet.front_ends())
            os.kill(min(victims), signal.SIGKILL)
            wait_for(lambda victims=victims: len(set(fleet.front_ends()) - victims) == 1, 30, EVERY_S)
        fleet.wait_everywhere("/v2/health/ready", 200)
        assert (datatypes("identity"), datatypes("gone"), best(1.0)) == ({"FP32"}, {"FP32"}, {"red"})
        assert len(before) == 1 and index() == before
        for _ in range(24):
            again = fleet.ask("POST", "/v1/models/encoder/tokens", json={"text": "a man is eating"})
            assert again.json() == texts
    finally:
        shutil.rmtree(root / "identity" / "2")
        labels.write_text(good)
        add_model(root, "encoder", "encoder", "[tokens]\nmax_length = 16\n")
    assert tokenizer.exists()
    os.kill(fleet.pid, signal.SIGHUP)
    wait_for(lambda: datatypes("identity") == {"INT32"}, 30, EVERY_S)
    fleet.wait_everywhere("/v2/models/gone/ready", 404)
    add_model(root, "identity", "identity")
    assert fleet.ask("POST", "/v2/repository/models/identity/load").status_code == 200


def test_an_engine_process_that_dies_is_503_at_once_and_comes_back(fleet: Fleet) -> None:
    restarts = fleet.metric("engine_process_restarts_total")
    counted = fleet.metric("inference_requests_total", model="identity", outcome="success")

    def launches() -> float:
        return fleet.metric("engine_kernel_launches_total", model="identity", kernel="gemm_f32")

    before = launches()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(fleet.identity, [float(i)] * 4, None, "slow") for i in range(8)]
        wait_for(lambda: fleet.metric("inference_inflight", model="slow") > 0)
        began = time.monotonic()
        os.kill(fleet.engine(), signal.SIGKILL)
        statuses = [request.result().status_code for request in waiting]
    assert set(statuses) <= {200, 503} and 503 in statuses
    assert time.monotonic() - began < 15, "not after the 30 s of a request's deadline"
    assert len(fleet.front_ends()) == FRONTENDS
    fleet.wait_everywhere("/v2/health/ready", 200)
    assert fleet.identity([1.0] * 4).status_code == 200
    assert fleet.metric("engine_process_restarts_total") == restarts + 1
    assert fleet.metric("inference_requests_total", model="identity", outcome="success") > counted
    (after,) = {launches() for _ in range(24)}  # whichever front end is asked, those that never were before, too
    assert after > before > 0


def test_an_engine_process_that_stands_still_makes_every_front_end_unready(fleet: Fleet) -> None:
    engine = fleet.engine()
    os.kill(engine, signal.SIGSTOP)
    try:
        fleet.wait_everywhere("/v2/health/ready", 503)
        assert {fleet.identity([1.0] * 4).status_code for _ in range(12)} == {503}
    finally:
        os.kill(engine, signal.SIGCONT)
    fleet.wait_everywhere("/v2/health/ready", 200)
    assert {fleet.identity([1.0] * 4).status_code for _ in range(12)} == {200}
    assert fleet.engine() == engine


def test_an_answer_that_cannot_be_read_costs_a_front_end_its_connection_and_no_process(
    fleet: Fleet, root: Path
) -> None:
    """The engine process lives on; the front end asks the supervisor for another connection."""
    engine, front_ends = fleet.engine(), fleet.front_ends()
    add_model(root, "garbling", "garbling")
    try:
        assert fleet.ask("POST", "/v2/repository/models/garbling/load").status_code == 200
        fleet.wait_everywhere("/v2/models/garbling/ready", 200)
        for _ in range(4):
            lost = fleet.identity([13.0] * 4, None, "garbling")
            assert lost.status_code == 503 and "cannot be read" in lost.json()["error"], lost.text
            fleet.wait_everywhere("/v2/health/ready", 200)
            fleet.wait_everywhere("/v2/models/garbling/ready", 200)
            assert {fleet.identity([1.0] * 4).status_code for _ in range(12)} == {200}
        assert (fleet.engine(), fleet.front_ends()) == (engine, front_ends)
    finally:
        shutil.rmtree(root / "garbling")
        fleet.ask("POST", "/v2/repository/models/garbling/unload")


def test_a_front_end_that_dies_has_its_queued_work_dropped(fleet: Fleet) -> None:
    """What waits for a client of it is dropped before compute; the others' requests go on."""
    victims = fleet.front_ends()
    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(fleet.identity, [float(i)] * 64, None, "slow") for i in range(16)]
        wait_for(lambda: fleet.metric("inference_inflight", model="slow") >= 12)
        os.kill(victims[1], signal.SIGKILL)
        outcomes = []
        for request in waiting:
            try:
                outcomes.append(request.result().status_code)
            except httpx.TransportError:
                outcomes.append("lost")
    assert set(outcomes) <= {200, "lost"} and 200 in outcomes
    fleet.wait_everywhere("/v2/health/ready", 200)
    assert fleet.metric("inference_inflight", model="slow") == 0


def test_sigterm_answers_what_was_accepted_by_all(root: Path, processes: list[Process]) -> None:
    process = Process(root, "--frontends", "2", "--log-format", "json")
    processes.append(process)
    process.wait_ready()
    fleet = Fleet(process)
    fleet.wait_everywhere("/v2/health/ready", 200)
    with ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(fleet.identity, [float(i)] * 64, None, "slow") for i in range(12)]
        wait_for(lambda: fleet.metric("inference_inflight", model="slow") == 12)
        process.process.terminate()
        assert [request.result().status_code for request in waiting] == [200] * 12
    _, errors = process.process.communicate(timeout=30)
    assert process.process.returncode == 0, errors
    assert not re.search(r'"level":"error"', errors), errors


def test_more_front_ends_than_cores(root: Path, processes: list[Process]) -> None:
    count = (os.cpu_count() or 1) + 2
    process = Process(root, "--frontends", str(count))
    processes.append(process)
    process.wait_ready()
    fleet = Fleet(process)
    wait_for(lambda: len(fleet.front_ends()) == count, 60, EVERY_S)
    fleet.wait_everywhere("/v2/health/ready", 200)
    os.kill(fleet.engine(), signal.SIGKILL)
    wait_for(lambda: fleet.metric("engine_process_restarts_total") == 1, 30, EVERY_S)
    fleet.wait_everywhere("/v2/health/ready", 200)
    process.process.terminate()
    process.process.communicate(timeout=60)
    assert process.process.returncode == 0


def test_front_ends_end_with_a_supervisor_that_is_killed(root: Path, processes: list[Process]) -> None:
    process = Process(root, "--frontends", "2")
    processes.append(process)
    process.wait_ready()
    fleet = Fleet(process)
    pids = [*fleet.front_ends(), fleet.engine()]
    process.process.kill()

    def gone(pid: int) -> bool:
        with contextlib.suppress(OSError):
            return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return True

    wait_for(lambda: all(map(gone, pids)), 30, EVERY_S)


def test_a_front_end_ends_where_its_supervisor_was_gone_before_it_had_joined(root: Path) -> None:
    """As where both are started and the supervisor is killed at once."""
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
        ends = [socket.socketpair(), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
        for supervisors, _ in ends:
            supervisors.close()
        (_, peer), (_, connections) = ends
        opened.enter_context(peer)
        opened.enter_context(connections)
        settings = Settings(models=root).model_dump_json()
        arguments = FrontEndArguments(listener.fileno(), peer.fileno(), connections.fileno(), 1, settings)
        command = [sys.executable, "-m", "service.frontend", *arguments.to_list()]
        inherited = (listener.fileno(), peer.fileno(), connections.fileno())
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=inherited, stderr=subprocess.DEVNULL)
    try:
        process.wait(60)
    finally:
        process.kill()


def test_a_port_that_another_server_shares_is_taken(fleet: Fleet, root: Path, processes: list[Process]) -> None:
    process = Process(root, "--frontends", "2", "--port", str(fleet.process.port))
    processes.append(process)
    _, errors = process.process.communicate(timeout=30)
    assert process.process.returncode == 1 and "cannot listen" in errors


def test_merged_counters_are_sums_and_what_is_gone_keeps_its_counters() -> None:
    def snapshot(requests: float, inflight: float, starts: float, trace: str | None = None) -> dict[str, Any]:
        labels = {"model": "m"}
        exemplar = [{"trace_id": trace}, 0.5, starts] if trace else None
        return {
            "metrics": [
                ["requests", "text", "counter", [["requests_total", labels, requests, exemplar]]],
                ["inflight", "text", "gauge", [["inflight", labels, inflight, None]]],
                ["engine_process_restarts", "text", "counter", [["engine_process_restarts_total", {}, starts, None]]],
            ],
            "statistics": {
                "m/1": {
                    "name": "m",
                    "last_inference": starts,
                    "inference_count": requests,
                    "inference_stats": {"success": {"count": requests, "ns": 10}},
                    "batch_stats": [{"batch_size": requests, "compute_infer": {"count": 1, "ns": 2}}],
                }
            },
        }

    gone = lasting(merge([snapshot(1, 1, 1, "older"), snapshot(2, 1, 2, "newer")]))
    total = merge([gone, snapshot(2, 4, 1)])
    values = {samples[0][0]: samples[0][2] for _, _, _, samples in total["metrics"]}
    assert values == {"requests_total": 5, "inflight": 4, "engine_process_restarts_total": 2}
    (family, *_) = Merged(total).collect()
    assert family.samples[0].exemplar == Exemplar({"trace_id": "newer"}, 0.5, 2)
    entry = total["statistics"]["m/1"]
    assert (entry["name"], entry["last_inference"], entry["inference_count"]) == ("m", 2, 5)
    assert entry["inference_stats"]["success"] == {"count": 5, "ns": 30}
    assert [(size["batch_size"], size["compute_infer"]["count"]) for size in entry["batch_stats"]] == [(1, 1), (2, 2)]
