"""API keys: who may do what, where keys are needed, and how a file of keys may look."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import openai
import pytest
import tritonclient.http as triton

from service.access import Access, Right, read_access, right_for
from service.settings import Settings, SettingsError, read_settings
from tests.service.conftest import Process, Running, Start, children, error_of, get, wait_for

KEYS = {
    "user": ("inference", "u" * 16),
    "admin": ("administration", "a" * 20),
    "scraper": ("metrics", "m" * 32),
    "root": ("inference,administration,metrics", "r" * 256),
}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# who may what\n\n" + "".join(f"{rights}  {key}\n" for rights, key in KEYS.values()))
    file.chmod(0o600)
    return file


def bearer(who: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[who][1]}"}


@pytest.fixture
def server(start: Start, repository: Path, keys: Path) -> Running:
    # The fixture's own calls need no key: it asks the serving object, not the server.
    return start(repository, api_keys=keys)


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("/", None),
        ("/page/main.js", None),
        ("/page/", Right.INFERENCE),
        ("/page/a/b", Right.INFERENCE),
        ("/docs", None),
        ("/docs/oauth2-redirect", Right.INFERENCE),
        ("/redoc", Right.INFERENCE),
        ("/openapi.json", None),
        ("/v2", None),
        ("/v2/health/live", None),
        ("/v2/health/ready", None),
        ("/v2/health/ready/", Right.INFERENCE),
        ("/v2/", Right.INFERENCE),
        ("/v1/models", Right.INFERENCE),
        ("/v1/embeddings", Right.INFERENCE),
        ("/v2/models/m/infer", Right.INFERENCE),
        ("/v2/models/stats", Right.INFERENCE),
        ("/nope", Right.INFERENCE),
        ("/metrics", Right.METRICS),
        ("/metrics/", Right.INFERENCE),
        ("/v2/repository/index", Right.ADMINISTRATION),
        ("/v2/repository/models/m/load", Right.ADMINISTRATION),
        ("/v2/systemsharedmemory/status", Right.ADMINISTRATION),
    ],
)
def test_the_right_that_a_path_needs(path: str, right: Right | None) -> None:
    assert right_for(path) is right


def test_every_route_has_its_right(shared: Running) -> None:
    """A new route that nobody thought of is for inference at the least."""
    document = shared.client.get("/openapi.json").json()
    unguarded = {path for path in document["paths"] if right_for(path) is None}
    assert unguarded == {"/", "/v2", "/v2/health/live", "/v2/health/ready"}
    assert document["security"] == [{}, {"key": []}]


@pytest.mark.parametrize(
    ("path", "method", "allowed"),
    [
        ("/v1/models", "GET", {"user", "root"}),
        ("/metrics", "GET", {"scraper", "root"}),
        ("/v2/repository/index", "POST", {"admin", "root"}),
        ("/v2/health/ready", "GET", {"user", "admin", "scraper", "root", "nobody"}),
    ],
)
def test_a_key_does_what_its_rights_allow(server: Running, path: str, method: str, allowed: set[str]) -> None:
    for who in KEYS:
        response = server.client.request(method, path, headers=bearer(who))
        assert response.status_code == (200 if who in allowed else 403)
        if who not in allowed:
            assert "has not the right" in error_of(response)
    response = server.client.request(method, path)
    assert response.status_code == (200 if "nobody" in allowed else 401)
    if response.status_code == 401:
        assert "needs an API key" in error_of(response)
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header", ["Bearer " + "x" * 16, "Bearer", "Basic " + "u" * 16, "u" * 16, "Bearer ü" + "u" * 15, ""]
)
def test_what_is_no_key(server: Running, header: str) -> None:
    response = server.client.get("/v1/models", headers={"authorization": header.encode("latin-1")})
    assert response.status_code == 401
    assert KEYS["user"][1] not in error_of(response)


def test_a_refused_request_costs_no_body_and_reaches_no_route(server: Running) -> None:
    response = server.client.post("/v2/models/identity/infer", content=b"{" * 100_000)
    assert response.status_code == 401
    assert "server-timing" in response.headers and "x-request-id" in response.headers
    assert server.engine.calls == []


def test_public_clients_send_keys(server: Running) -> None:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        assert client.get_model_metadata("identity", headers=bearer("user"))["name"] == "identity"
    models = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS["user"][1]).models.list()
    assert {model.id for model in models} == {"colours", "encoder", "identity"}
    with pytest.raises(openai.AuthenticationError, match="not known"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x" * 16).models.list()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("inference\n", "line 1"),
        ("\ninference a b\n", "line 2"),
        ("root " + "x" * 16, "line 1"),
        ("inference, metrics " + "x" * 16, "line 1"),
        ("inference " + "x" * 15, "16 to 256"),
        ("inference " + "x" * 257, "16 to 256"),
        ("inference " + "ü" * 16, "16 to 256"),
        (f"inference {'x' * 16}\nmetrics {'x' * 16}", "line 2 of "),
        ("inference \udcff" + "x" * 16, "no text"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(SettingsError) as refused:
        Access(file)
    assert words in str(refused.value) and "x" * 16 not in str(refused.value)
    with pytest.raises(SettingsError, match="cannot be read"):
        Access(tmp_path / "none")


def test_a_file_that_everybody_reads_is_warned_of(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        Access(keys)
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_keys_are_needed_where_others_reach(tmp_path: Path, keys: Path, host: str) -> None:
    with pytest.raises(SettingsError, match=f"on {host}.*--authentication off"):
        read_access(Settings(models=tmp_path, host=host))
    read_access(Settings(models=tmp_path, host=host, authentication="off")).check("/metrics", "")
    read_access(Settings(models=tmp_path, host=host, api_keys=keys))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_keys_are_not_needed_where_only_this_machine_reaches(tmp_path: Path, host: str) -> None:
    read_access(Settings(models=tmp_path, host=host)).check("/metrics", "")
    with pytest.raises(SettingsError, match="is required"):
        read_access(Settings(models=tmp_path, host=host, authentication="required"))


@pytest.mark.parametrize("site", ["cross-site", "same-site", "same-origin", "none"])
@pytest.mark.parametrize("expect", [{}, {"expect": "100-continue"}], ids=["direct", "through ASGI"])
def test_pages_of_other_sites_may_send_nothing(
    start: Start, repository: Path, site: str, expect: dict[str, str]
) -> None:
    server = start(repository)
    headers, status = {"sec-fetch-site": site, **expect}, 403 if site == "cross-site" else 200
    tensor = {"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    for path, body in (
        ("/v2/models/identity/infer", {"inputs": [tensor]}),
        ("/v2/repository/index", {}),
        ("/v2/repository/models/colours/unload", {}),
    ):
        answer = server.client.post(path, json=body, headers=headers)
        assert answer.status_code == status, answer.text
    assert server.client.get("/v2/models/colours/ready").status_code == (200 if status == 403 else 503)
    for path in ("/", "/v2/health/ready", "/v1/models"):
        assert server.client.get(path, headers=headers).status_code == 200


def test_the_process_says_what_is_missing(repository: Path, processes: list[Process]) -> None:
    process = Process(repository, "--host", "0.0.0.0")
    processes.append(process)
    _, errors = process.process.communicate(timeout=60)
    assert process.process.returncode == 2
    assert errors.count("\n") == 1 and "--authentication off" in errors


def test_sighup_reads_the_keys_again(repository: Path, keys: Path, processes: list[Process]) -> None:
    process = Process(repository, "--api-keys", str(keys))
    processes.append(process)
    process.wait_ready()

    def status(who: str) -> int:
        return get(f"{process.url}/v1/models", headers=bearer(who)).status_code

    assert status("user") == 200
    keys.write_text("nonsense\n")
    process.process.send_signal(signal.SIGHUP)
    keys_after = f"inference {KEYS['admin'][1]}\n"
    assert status("user") == 200
    keys.write_text(keys_after)
    process.process.send_signal(signal.SIGHUP)
    wait_for(lambda: status("user") == 401)
    assert status("admin") == 200


def test_a_front_end_to_come_knows_the_keys_of_the_others_whatever_the_file_has(
    repository: Path, keys: Path, processes: list[Process]
) -> None:
    process = Process(repository, "--api-keys", str(keys), "--frontends", "2")
    processes.append(process)
    process.wait_ready()
    before = children(process.process.pid, "service.frontend")

    def statuses(who: str) -> set[int]:
        return {get(f"{process.url}/v1/models", headers=bearer(who)).status_code for _ in range(16)}

    keys.write_text("nonsense\n")
    process.process.send_signal(signal.SIGHUP)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not {*before} & {*(now := children(process.process.pid, "service.frontend"))} and len(now) == 2)
    assert (statuses("user"), statuses("admin")) == ({200}, {403})
    keys.write_text(f"inference {KEYS['admin'][1]}\n")
    process.process.send_signal(signal.SIGHUP)
    wait_for(lambda: (statuses("user"), statuses("admin")) == ({401}, {200}))


def test_a_pipe_in_the_place_of_the_keys_stops_nothing(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    access = Access(keys)
    keys.unlink()
    os.mkfifo(keys)
    access.reload()  # nobody writes: reading it would never end
    assert "not a regular file" in caplog.text
    access.check("/v1/models", bearer("user")["authorization"])


def test_settings_name_the_file(tmp_path: Path, keys: Path) -> None:
    settings = read_settings(["--models", str(tmp_path), "--api-keys", str(keys), "--authentication", "required"])
    assert settings.api_keys == keys
