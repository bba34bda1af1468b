"""Fixtures of the service's tests: a model repository of fake models and a real server around it on a free port."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from load_tests.documented import Documented
from load_tests.servers import free_port
from service.app import create_app
from service.direct_connection import connections
from service.serving import Serving
from service.settings import Settings
from tests.service.fakes import FakeEngine

ROOT = Path(__file__).parent.parent.parent
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "man", "is", "eating", "food", "bread", "the", "market", "fell")


def add_model(root: Path, name: str, kind: str, toml: str = "", version: int | None = 1, **arguments: Any) -> Path:
    """A folder with a fake model; `version=None` puts the file straight into the folder."""
    folder = root / name
    place = folder if version is None else folder / str(version)
    place.mkdir(parents=True, exist_ok=True)
    (place / "model.onnx").write_text(json.dumps({"kind": kind, **arguments}))
    if toml:
        (folder / "model.toml").write_text(toml)
    return folder


def add_tokenizer(folder: Path) -> None:
    """A word-level tokenizer that puts [CLS] and [SEP] around a text."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One model of each common kind."""
    return common_models(tmp_path / "models")


def common_models(root: Path) -> Path:
    """Make `root` a repository with one model of each common kind."""
    root.mkdir()
    add_model(root, "identity", "identity")
    colours = add_model(root, "colours", "colours", "[images]\nsize = 8\nresize = 8\n")
    (colours / "labels.txt").write_text("red\ngreen\nblue\n")
    add_tokenizer(add_model(root, "encoder", "encoder", "[tokens]\nmax_length = 16\n"))
    return root


@dataclass
class Running:
    """A server that runs, the engine behind it and a client."""

    url: str
    client: httpx.Client
    engine: FakeEngine
    serving: Serving

    def identity(self, values: list[float], **kwargs: Any) -> httpx.Response:
        """Infer the identity model on rows of four values."""
        tensor = {"name": "input", "shape": [len(values) // 4, 4], "datatype": "FP32", "data": values}
        return self.client.post("/v2/models/identity/infer", json={"inputs": [tensor]}, **kwargs)

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics; 0 if it is not there."""
        return sample(self.client.get("/metrics").text, name, **labels)

    def wait_ready(self) -> None:
        """Until nothing loads any more."""
        wait_for(lambda: not any(m.state == "LOADING" for m in self.serving.models.all_models()), 60)


def sample(text: str, name: str, **labels: str) -> float:
    """One sample of a Prometheus exposition."""
    for line in text.splitlines():
        head, _, value = line.rpartition(" ")
        if head.split("{")[0] == name and all(f'{key}="{wanted}"' in head for key, wanted in labels.items()):
            return float(value)
    return 0.0


def wait_for(condition: Callable[[], bool], seconds: float = 30.0, every: float = 0.002) -> None:
    """Wait until a condition holds; fail if it never does. It is looked at every so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        time.sleep(every)


# Everything here is plain HTTP. httpx reads the certificates of all authorities for each client and each single
# request, which takes 25 ms of a CPU: more than most tests.
Client = partial(httpx.Client, verify=False, timeout=30)
get = partial(httpx.get, verify=False)
post = partial(httpx.post, verify=False)


Start = Callable[..., Running]


def documented_by(document: dict[str, Any]) -> Callable[[httpx.Response], None]:
    """What fails where an answer has a status that the OpenAPI document does not have for its route."""
    documented = Documented(document)

    def check(response: httpx.Response) -> None:
        request = response.request
        path = request.url.raw_path.partition(b"?")[0].decode("latin-1")
        problem = documented.problem(request.method, path, response.status_code)
        assert problem is None, problem

    return check


class Starter:
    """Starts servers, and stops them all."""

    def __init__(self) -> None:
        self._stops: list[Callable[[], None]] = []

    def __call__(
        self,
        root: Path,
        engine: FakeEngine | None = None,
        ready: bool = True,
        engine_process: str = "never",
        **settings: Any,
    ) -> Running:
        """A server for `root`; `ready` waits until nothing loads any more. In a process of its own (`always`) the
        engine is another one than the `Running.engine` that the test sees."""
        engine = engine or FakeEngine()
        settings.setdefault("light_run_us", 0)  # tests hold runs back, which would hold back the event loop
        chosen = Settings(models=root, drain_timeout=5, engine_process=engine_process, **settings)
        app = create_app(chosen, FakeEngine if engine_process == "always" else lambda: engine)
        listener = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            http=connections(chosen, app.state.direct),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
        thread.start()
        client = Client(base_url=url, event_hooks={"response": [documented_by(app.openapi())]})
        running = Running(url, client, engine, app.state.serving)

        def stop() -> None:
            engine.gate.set()
            engine.load_gate.set()
            client.close()
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server did not stop"
            assert all(model.closed for model in engine.models), "a model was not closed"

        self._stops.append(stop)
        wait_for(lambda: server.started)
        if ready:
            running.wait_ready()
        return running

    def stop(self) -> None:
        """Stop every server; each must end by itself and close its models."""
        while self._stops:
            self._stops.pop()()


@pytest.fixture
def start() -> Iterator[Start]:
    """Start servers: `start(root, engine, ready=True, **settings)`."""
    starter = Starter()
    yield starter
    starter.stop()


@pytest.fixture(scope="module", params=["never", "always"], ids=["same process", "own process"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with the common models, the engine in its process and in another, for tests that leave no trace in it
    and do not look into the engine."""
    starter = Starter()
    yield starter(common_models(tmp_path_factory.mktemp("shared") / "models"), engine_process=request.param)
    starter.stop()


@pytest.fixture
def server(start: Start, repository: Path) -> Running:
    """A server with the common models."""
    return start(repository)


def error_of(response: httpx.Response) -> str:
    """The message of an error answer; it must have the form of its route."""
    body: Mapping[str, Any] = response.json()
    assert list(body) == ["error"], body
    error = body["error"]
    path = response.url.path
    if path.startswith("/v1/") and not path.endswith(("/images", "/tokens")):
        assert list(error) == ["message", "type", "param", "code"]
        assert error["type"] in ("invalid_request_error", "rate_limit_error", "server_error")
        assert error["param"] is None and isinstance(error["code"], str)
        error = error["message"]
    assert isinstance(error, str)
    return error


class Process:
    """`python -m service` with the fake engine."""

    def __init__(self, root: Path, *arguments: str, **environment: str) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "tests.service.serve_fake", "--models", str(root), "--port", str(self.port)]
        command += ["--light-run-us", "0"]
        self.process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.process.communicate()
            try:
                return get(f"{self.url}/v2/health/ready").status_code == 200
            except httpx.TransportError:
                return False

        wait_for(ready, 60, every=0.02)  # while it starts, it needs the CPU more

    def wait_inflight(self, count: int) -> None:
        """Until `count` requests of the identity model have been accepted."""
        url = f"{self.url}/metrics"
        wait_for(lambda: sample(get(url).text, "inference_inflight", model="identity") == count)


def children(pid: int, module: str) -> list[int]:
    """Process ids of the processes that `pid` started and that run a module."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0") if folder.name.isdigit() else []
            if module.encode() in command and int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(folder.name))
    return sorted(found)


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.process.kill()
        process.process.communicate(timeout=60)  # until all that it started have ended, too: they have its pipes
