"""A load changes all of a model or nothing of it, whoever asks for it: an administrator, SIGHUP, the folder's watch."""

from __future__ import annotations

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.service.conftest import Process, Running, Start, add_model, error_of, get, post, wait_for

ENGINES = pytest.mark.parametrize("where", ["never", "always"], ids=["same process", "own process"])


def change(server: Running, what: str, name: str = "identity") -> tuple[int, str]:
    response = server.client.post(f"/v2/repository/models/{name}/{what}", json={})
    return response.status_code, error_of(response) if response.status_code != 200 else ""


def index(server: Running, name: str = "identity") -> dict[str, tuple[str, str]]:
    entries = server.client.post("/v2/repository/index").json()
    return {entry["version"]: (entry["state"], entry["reason"]) for entry in entries if entry["name"] == name}


def datatype(server: Running, version: int = 1) -> str:
    document = server.client.get(f"/v2/models/identity/versions/{version}").json()
    return str(document["inputs"][0]["datatype"])


def break_version(root: Path, version: int, name: str = "identity") -> None:
    (root / name / str(version)).mkdir(exist_ok=True)
    (root / name / str(version) / "model.onnx").write_text("junk")


def open_models(server: Running) -> list[str]:
    return sorted(model.kind for model in server.engine.models if not model.closed)


@ENGINES
def test_a_good_version_beside_a_broken_one_does_not_take_over(start: Start, tmp_path: Path, where: str) -> None:
    add_model(tmp_path, "identity", "identity")
    server = start(tmp_path, engine_process=where)
    add_model(tmp_path, "identity", "int32")
    break_version(tmp_path, 2)
    status, error = change(server, "load")
    assert status == 400
    assert error.startswith("model 'identity' cannot be loaded: version 2: ") and "version 1" not in error
    assert datatype(server) == "FP32"
    assert server.identity([1, 2, 3, 4]).json()["model_version"] == "1"
    assert index(server) == {"1": ("READY", "")}
    add_model(tmp_path, "identity", "int32", version=2)
    assert change(server, "load") == (200, "")
    assert datatype(server) == datatype(server, 2) == "INT32"


def test_the_memory_of_what_was_prepared_is_back_before_the_answer(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "identity", "identity")
    server = start(tmp_path)
    add_model(tmp_path, "identity", "int32")
    add_model(tmp_path, "identity", "halves", version=3)
    break_version(tmp_path, 2)
    for _ in range(2):
        assert change(server, "load")[0] == 400
        assert open_models(server) == ["identity"]
    assert server.metric("engine_model_load_seconds", model="identity", version="1") > 0
    assert server.metric("engine_model_load_seconds", model="identity", version="3") == 0


def test_every_version_that_cannot_be_loaded_is_named(start: Start, repository: Path) -> None:
    server = start(repository)
    for version in (2, 4):
        break_version(repository, version)
    (repository / "identity" / "7").mkdir()
    _, error = change(server, "load")
    assert "version 7: version folder '7' has no model.onnx" in error
    (repository / "identity" / "7").rmdir()
    _, error = change(server, "load")
    assert "version 2: " in error and "version 4: " in error and "version 1" not in error
    (repository / "colours" / "labels.txt").write_text("only one\n")
    status, error = change(server, "load", "colours")
    assert status == 400 and "version 1: labels.txt has 1 lines" in error, "what the HTTP side finds out"
    assert index(server, "colours") == {"1": ("READY", "")}


@ENGINES
def test_a_model_that_was_unloaded_stays_unloaded(start: Start, tmp_path: Path, where: str) -> None:
    add_model(tmp_path, "identity", "identity")
    server = start(tmp_path, engine_process=where, poll_models=0.02)
    assert change(server, "unload") == (200, "")
    before = index(server)
    break_version(tmp_path, 2)
    assert change(server, "load")[0] == 400
    assert index(server) == before == {"1": ("UNAVAILABLE", "unloaded")}
    assert server.identity([1, 2, 3, 4]).status_code == 503
    shutil.rmtree(tmp_path / "identity" / "2")
    time.sleep(0.2)
    assert index(server) == before, "the watch leaves alone what an administrator unloaded"
    assert change(server, "load") == (200, "")
    assert server.identity([1, 2, 3, 4]).status_code == 200


def test_a_model_that_was_unloaded_and_removed_is_not_listed_and_comes_back_unloaded(
    start: Start, tmp_path: Path
) -> None:
    root, away = tmp_path / "models", tmp_path / "away"
    add_model(root, "identity", "identity")
    add_model(root, "witness", "identity")
    server = start(root, poll_models=0.02)
    assert change(server, "unload") == (200, "")
    (root / "identity").rename(away)
    wait_for(lambda: index(server) == {})
    assert server.client.get("/v2/models/identity").status_code == 404
    assert [entry["id"] for entry in server.client.get("/v1/models").json()["data"]] == ["witness"]
    away.rename(root / "identity")
    time.sleep(0.2)
    assert index(server) == {"": ("UNAVAILABLE", "it is not loaded")}
    assert change(server, "load") == (200, "")
    assert server.identity([1, 2, 3, 4]).status_code == 200


def test_a_new_model_with_a_broken_version_is_not_served_in_part(start: Start, repository: Path) -> None:
    server = start(repository)
    opened = open_models(server)
    add_model(repository, "later", "identity")
    break_version(repository, 2, "later")
    assert change(server, "load", "later")[0] == 400
    assert open_models(server) == opened
    assert index(server, "later") == {"": ("UNAVAILABLE", "it is not loaded")}
    assert server.client.get("/v2/models/later/ready").status_code == 404
    assert server.client.get("/v2/health/ready").status_code == 200


def test_what_the_start_left_out_bars_later_loads_until_it_is_mended(start: Start, tmp_path: Path) -> None:
    """At the start there is nothing to keep, and what loads is served; afterwards it is all or nothing."""
    add_model(tmp_path, "identity", "identity")
    break_version(tmp_path, 2)
    server = start(tmp_path)
    assert server.identity([1, 2, 3, 4]).status_code == 200
    assert index(server)["2"][0] == "UNAVAILABLE"
    add_model(tmp_path, "identity", "int32")
    assert change(server, "load")[0] == 400
    assert datatype(server) == "FP32"
    shutil.rmtree(tmp_path / "identity" / "2")
    assert change(server, "load") == (200, "")
    assert (datatype(server), list(index(server))) == ("INT32", ["1"])


def test_a_version_that_is_gone_from_the_disk_is_served_until_all_of_a_load_succeeds(
    start: Start, tmp_path: Path
) -> None:
    add_model(tmp_path, "identity", "identity")
    server = start(tmp_path)
    shutil.rmtree(tmp_path / "identity" / "1")
    add_model(tmp_path, "identity", "int32", version=2)
    break_version(tmp_path, 3)
    assert change(server, "load")[0] == 400
    assert server.identity([1, 2, 3, 4]).json()["model_version"] == "1"
    shutil.rmtree(tmp_path / "identity" / "3")
    assert change(server, "load") == (200, "")
    assert list(index(server)) == ["2"]


def test_versions_change_at_the_same_moment(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "identity", "identity")
    server = start(tmp_path)
    add_model(tmp_path, "identity", "int32")
    add_model(tmp_path, "identity", "int32", version=2, load_sleep=0.5)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(change, server, "load")
        seen = set()
        while datatype(server) != "INT32":
            seen.add(index(server).get("2", ("", ""))[0])
        assert index(server)["2"] == ("READY", "")
        assert "LOADING" in seen
        assert loading.result() == (200, "")


def test_the_watch_of_the_folder_changes_all_or_nothing(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "identity", "identity")
    server = start(tmp_path, poll_models=0.02)
    break_version(tmp_path, 2)
    wait_for(lambda: index(server).get("2", ("",))[0] == "UNAVAILABLE")
    assert "no ONNX model" in index(server)["2"][1]
    add_model(tmp_path, "identity", "int32")
    loads = len(server.engine.models)
    wait_for(lambda: len(server.engine.models) > loads)
    wait_for(lambda: open_models(server) == ["identity"])
    loads = len(server.engine.models)
    time.sleep(0.3)
    assert len(server.engine.models) == loads, "what has failed is tried again when it has changed"
    assert datatype(server) == "FP32"
    add_model(tmp_path, "identity", "int32", version=2)
    wait_for(lambda: datatype(server) == "INT32")
    assert index(server) == {"1": ("READY", ""), "2": ("READY", "")}


def test_the_index_says_why_the_watch_serves_nothing_of_a_model(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "identity", "identity")
    server = start(tmp_path, poll_models=0.02)
    (tmp_path / "later" / "2").mkdir(parents=True)
    add_model(tmp_path, "later", "identity")
    wait_for(lambda: len(index(server, "later")) == 2)
    found = index(server, "later")
    assert found["1"] == ("UNAVAILABLE", "not loaded, because version 2 cannot be")
    assert found["2"][0] == "UNAVAILABLE" and "has no model.onnx" in found["2"][1]
    response = server.client.get("/v2/models/later/ready")
    assert response.status_code == 503 and "has no model.onnx" in error_of(response)
    add_model(tmp_path, "later", "identity", version=2)
    wait_for(lambda: server.client.get("/v2/models/later/ready").status_code == 200)
    assert index(server, "later") == {"1": ("READY", ""), "2": ("READY", "")}


@ENGINES
def test_sighup_changes_all_or_nothing(tmp_path: Path, processes: list[Process], where: str) -> None:
    add_model(tmp_path, "identity", "identity")
    add_model(tmp_path, "witness", "identity")
    process = Process(tmp_path, "--engine-process", where)
    processes.append(process)
    process.wait_ready()

    def served(name: str) -> str:
        return str(get(f"{process.url}/v2/models/{name}/versions/1").json()["inputs"][0]["datatype"])

    add_model(tmp_path, "identity", "int32")
    break_version(tmp_path, 2)
    add_model(tmp_path, "witness", "int32")  # comes after the other one
    process.process.send_signal(signal.SIGHUP)
    wait_for(lambda: served("witness") == "INT32")
    assert served("identity") == "FP32"
    entries = post(f"{process.url}/v2/repository/index").json()
    states = {entry["version"]: entry["state"] for entry in entries if entry["name"] == "identity"}
    assert states == {"1": "READY", "2": "UNAVAILABLE"}


def transport_pid(server: Running) -> int:
    found = server.serving.engine._transport.pid  # type: ignore[attr-defined]
    assert isinstance(found, int)
    return found


def test_an_engine_process_that_dies_between_two_versions_loads_both_again(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "identity", "identity")
    server = start(tmp_path, engine_process="always")
    add_model(tmp_path, "identity", "int32")
    add_model(tmp_path, "identity", "int32", version=2, load_sleep=1.0)
    models = server.serving.models
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(change, server, "load")
        wait_for(lambda: len(models._held) == 2 and len(models._loading) == 1)
        os.kill(transport_pid(server), signal.SIGKILL)
        wait_for(lambda: len(models._loading) == 3)
        assert loading.result() == (200, "")
    assert datatype(server) == datatype(server, 2) == "INT32"
    assert server.client.get("/v2/health/ready").status_code == 200


def test_a_version_that_ends_the_engine_process_changes_nothing(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "identity", "identity")
    add_model(tmp_path, "other", "identity")
    server = start(tmp_path, engine_process="always")
    add_model(tmp_path, "identity", "int32", version=2)
    add_model(tmp_path, "identity", "int32", version=3, fatal=True)
    status, error = change(server, "load")
    assert status == 400 and "version 3: loading it ended the engine process 3 times" in error
    wait_for(lambda: server.client.get("/v2/health/ready").status_code == 200, 60)
    assert index(server) == {"1": ("READY", "")}
    assert server.identity([1, 2, 3, 4]).json()["model_version"] == "1"
    assert index(server, "other")["1"][0] == "READY"


def test_what_could_not_be_read_is_tried_again_when_the_disk_is_back(start: Start, tmp_path: Path) -> None:
    root, away = tmp_path / "models", tmp_path / "away"
    add_model(root, "identity", "identity")
    add_model(root, "other", "identity")
    server = start(root, engine_process="always", poll_models=0.2)
    root.rename(away)
    os.kill(transport_pid(server), signal.SIGKILL)
    wait_for(lambda: "no model can be served" in server.client.get("/v2/health/ready").text)
    away.rename(root)
    wait_for(lambda: server.client.get("/v2/health/ready").status_code == 200)
    wait_for(lambda: index(server) == index(server, "other") == {"1": ("READY", "")})
