"""Health, the repository, loading in the background, draining; and the real process: settings, signals, exit status."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engine.targets.cuda import probe as gpu_probe
from engine.targets.cuda.probe import Gpu, Survey
from service import __main__ as main
from service.errors import InvalidRequest
from service.model_config import ModelConfigError, Pooling, Task, read_model_config
from service.repository import Repository, check_name
from service.settings import Packed, Precision, Settings, SettingsError, read_settings, unknown_variables
from tests.service.conftest import Process, Running, Start, add_model, error_of, get, post, wait_for
from tests.service.fakes import FakeEngine

ROOT = Path(__file__).parent.parent.parent


def test_live_at_once_ready_when_loaded(start: Start, repository: Path) -> None:
    engine = FakeEngine()
    engine.load_gate.clear()
    server = start(repository, engine, ready=False)
    assert server.client.get("/v2/health/live").status_code == 200
    response = server.client.get("/v2/health/ready")
    assert response.status_code == 503
    assert "loading" in error_of(response)
    response = server.identity([1, 2, 3, 4])
    assert response.status_code == 503
    assert "loading" in error_of(response)
    assert server.client.get("/v2/models/identity/ready").status_code == 503
    engine.load_gate.set()
    wait_for(lambda: server.client.get("/v2/health/ready").status_code == 200)
    assert server.identity([1, 2, 3, 4]).status_code == 200


def test_a_broken_model_takes_nothing_else_down(start: Start, repository: Path) -> None:
    (repository / "junk" / "1").mkdir(parents=True)
    (repository / "junk" / "1" / "model.onnx").write_bytes(b"\x00")
    (repository / "typo").mkdir()
    (repository / "typo" / "model.toml").write_text("tusk = 3")
    server = start(repository)
    assert server.client.get("/v2/health/ready").status_code == 200
    assert server.identity([1, 2, 3, 4]).status_code == 200
    response = server.client.get("/v2/models/junk/ready")
    assert response.status_code == 503
    assert "no ONNX model" in error_of(response)
    response = server.client.post("/v1/models/typo/images", content=b"x")
    assert response.status_code == 503
    assert "'tusk'" in error_of(response)
    index = {entry["name"]: entry for entry in server.client.post("/v2/repository/index").json()}
    assert index["typo"]["state"] == "UNAVAILABLE"


@pytest.mark.parametrize("broken", [True, False], ids=["only broken models", "no models"])
def test_a_server_that_can_serve_nothing_is_not_ready(start: Start, tmp_path: Path, broken: bool) -> None:
    if broken:
        add_model(tmp_path, "x", "no such kind")
    server = start(tmp_path)
    response = server.client.get("/v2/health/ready")
    assert response.status_code == 503
    assert "no model" in error_of(response)
    assert server.client.get("/v2/health/live").status_code == 200


def test_draining_refuses_new_work_and_answers_what_was_accepted(server: Running) -> None:
    server.engine.gate.clear()
    results: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: results.append(server.identity([1, 2, 3, 4])))
    thread.start()
    assert server.engine.running.acquire(timeout=30)
    server.serving.begin_drain()
    response = server.identity([1, 2, 3, 4])
    assert response.status_code == 503
    assert "shutting down" in error_of(response)
    assert server.client.get("/v2/health/ready").status_code == 503
    server.engine.gate.set()
    thread.join()
    assert results[0].status_code == 200


# ---- the repository


def test_an_onnx_file_alone_is_a_model(start: Start, tmp_path: Path) -> None:
    folder = add_model(tmp_path, "pictures", "colours", version=None)
    (folder / "model.onnx").rename(folder / "anything.onnx")
    add_model(tmp_path, "words", "encoder", version=None)
    add_model(tmp_path, "numbers", "identity", version=None)
    server = start(tmp_path)
    tasks = {entry["id"]: entry["task"] for entry in server.client.get("/v1/models").json()["data"]}
    assert tasks == {"pictures": "image-classification", "words": "sentence-embedding", "numbers": "tensors"}
    assert server.client.post("/v1/models/words/tokens", json={"ids": [[1, 2]]}).status_code == 200


def test_a_folder_whose_name_no_model_may_have_is_passed_over_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_model(tmp_path, "my model", "identity")
    add_model(tmp_path, "good", "identity")
    (tmp_path / "no model").mkdir()
    assert [folder.name for folder in Repository(tmp_path).scan()] == ["good"]
    assert [record.message for record in caplog.records] == [
        "folder 'my model' is passed over: a model name has letters, digits, '.', '_' and '-', "
        "and starts with a letter or a digit"
    ]


def test_a_folder_that_cannot_be_read_is_a_problem_of_that_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("closed", "open"):
        add_model(tmp_path, name, "identity")
    iterdir = Path.iterdir

    def refused(path: Path) -> Iterator[Path]:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    problems = {folder.name: folder.problem for folder in Repository(tmp_path).scan()}
    assert problems["open"] == ""
    assert "Permission denied" in problems["closed"]


def test_clients_do_not_learn_where_the_repository_lies(start: Start, repository: Path) -> None:
    path = add_model(repository, "lost", "identity") / "1" / "model.onnx"
    path.unlink()
    path.symlink_to("/nowhere")
    server = start(repository)
    reason = error_of(server.client.get("/v2/models/lost/ready"))
    assert "lost/1/model.onnx" in reason
    assert str(repository) not in reason


def test_scan_passes_over_what_is_no_model(tmp_path: Path) -> None:
    add_model(tmp_path, "good", "identity")
    for name in (".cache", "__pycache__", "empty", "-x", "a b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a b" / "model.onnx").write_text("{}")
    (tmp_path / "readme.onnx").write_text("{}")
    assert [folder.name for folder in Repository(tmp_path).scan()] == ["good"]


def test_versions_are_integer_folders(tmp_path: Path) -> None:
    for version in (1, 2, 10):
        add_model(tmp_path, "m", "identity", version=version)
    for name in ("0", "01", "latest", "1.5"):
        (tmp_path / "m" / name).mkdir()
    (folder,) = Repository(tmp_path).scan()
    assert [version for version, _ in folder.versions] == [1, 2, 10]


@pytest.mark.parametrize("files", [[], ["a.onnx", "b.onnx"]])
def test_a_version_without_one_model_file_says_what_to_do(tmp_path: Path, files: list[str]) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    for name in files:
        (tmp_path / "m" / "1" / name).write_text("{}")
    (folder,) = Repository(tmp_path).scan()
    assert "model.onnx" in folder.problem


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc", "a/b", "a\\b", "-x", "a b", "x" * 129, "a\n", "%2e"])
def test_names_that_leave_the_repository_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "all-minilm-l6-v2", "A_1.b", "7b"])
def test_ordinary_names_are_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("task = 'magic'", "'task'"),
        ("tusk = 'x'", "unknown key 'tusk'"),
        ("[batching]\nmax_batch = 0", "'batching.max_batch'"),
        ("[batching]\nmax_batch = 1.5", "'batching.max_batch'"),
        ("[batching]\nmax_batch = 99999999999999999999", "'batching.max_batch'"),
        ("[batching]\nmax_batch = '8'", "'batching.max_batch'"),
        ("[batching]\nmax_delay_ms = -1", "'batching.max_delay_ms'"),
        ("[batching]\nmax_delay_ms = nan", "'batching.max_delay_ms'"),
        ("[batching]\nbuckets = []", "'batching.buckets'"),
        ("[batching]\nbuckets = [8, 4]", "'batching.buckets'"),
        ("[batching]\nspeed = 1", "unknown key 'batching.speed'"),
        ("batching = 3", "'batching'"),
        ("[images]\nsize = [1, 2, 3]", "'images.size"),
        ("[images]\nsize = 100000", "'images.size"),
        ("[images]\nstd = [0.0]", "'images.std'"),
        ("[images]\nmean = ['x']", "'images.mean'"),
        ("[images]\nmean = [1e400]", "'images.mean'"),
        ("[images]\ninterpolation = 'magic'", "'images.interpolation'"),
        ("[images]\nlayout = 'HWC'", "'images.layout'"),
        ("[tokens]\npooling = 'max'", "'tokens.pooling'"),
        ("[tokens]\nmax_length = 0", "'tokens.max_length'"),
        ("[tokens]\nnormalize = 1", "'tokens.normalize'"),
        ("a = [", "cannot be read"),
        ("a = " + "[" * 5000, "cannot be read"),
        ("\x00", "cannot be read"),
        ("x = '" + "y" * (1 << 21) + "'", "over 1048576 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_hostile_model_toml_names_the_key_and_the_remedy(tmp_path: Path, toml: str, words: str) -> None:
    file = tmp_path / "model.toml"
    file.write_text(toml)
    with pytest.raises(ModelConfigError) as refused:
        read_model_config(file)
    assert words in str(refused.value)
    assert "model.toml" in str(refused.value)
    assert any(word in str(refused.value) for word in ("correct", "remove", "should"))


def test_a_full_model_toml(tmp_path: Path) -> None:
    file = tmp_path / "model.toml"
    file.write_text(
        'task = "sentence-embedding"\nsource = "s"\nlicense = "MIT"\nprecision = "fp32"\n'
        "[batching]\nmax_batch = 4\nmax_tokens = 99\nmax_delay_ms = 2\nbuckets = [4, 8]\n"
        '[images]\nsize = [8, 9]\nresize = 10\ninterpolation = "bicubic"\nmean = [1, 2.5, 3]\nstd = [4, 5, 6]\n'
        'layout = "NHWC"\n[tokens]\ntokenizer = "t.json"\nmax_length = 5\npooling = "cls"\nnormalize = false\n'
    )
    config = read_model_config(file)
    assert config.task is Task.SENTENCE_EMBEDDING
    assert config.batching.buckets == (4, 8)
    assert config.images.size == (8, 9)
    assert config.images.mean == (1.0, 2.5, 3.0)
    assert config.tokens.pooling is Pooling.CLS


@pytest.mark.parametrize("name", ["../other/tokenizer.json", "/etc/passwd", "missing.json", ".."])
def test_a_tokenizer_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    add_model(tmp_path, "other", "encoder")
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    add_model(tmp_path, "m", "encoder", f'[tokens]\ntokenizer = "{name}"\n')
    problems = {folder.name: folder.problem for folder in Repository(tmp_path).scan()}
    assert "tokens.tokenizer" in problems["m"]
    assert problems["other"] == ""


def test_labels_that_do_not_fit_are_found_at_load(start: Start, repository: Path) -> None:
    (repository / "colours" / "labels.txt").write_text("red\ngreen\n")
    server = start(repository)
    response = server.client.get("/v2/models/colours/ready")
    assert response.status_code == 503
    assert "labels.txt has 2 lines" in error_of(response)
    wait_for(lambda: any(model.kind == "colours" and model.closed for model in server.engine.models))


# ---- settings


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TILEWAVE_PORT", "9001")
    monkeypatch.setenv("TILEWAVE_MODELS", str(tmp_path))
    monkeypatch.setenv("TILEWAVE_MAX_BODY_BYTES", "77")
    settings = read_settings(["--port", "9002", "--device", "cpu"])
    assert (settings.port, settings.max_body_bytes, settings.device) == (9002, 77, "cpu")
    assert settings.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--port", "x"], {}, "--port"),
        (["--port", "70000"], {}, "--port"),
        ([], {"TILEWAVE_PORT": "x"}, "TILEWAVE_PORT"),
        ([], {"TILEWAVE_PORT": "tcp://10.0.0.1:80"}, "enableServiceLinks"),
        (["--threads", "0"], {}, "--threads"),
        (["--device", "tpu"], {}, "--device"),
        (["--models", "/nowhere/at/all"], {}, "/nowhere/at/all"),
        (["--request-timeout", "-1"], {}, "--request-timeout"),
        (["--engine-process", "never", "--frontends", "2"], {}, "--frontends: front ends share an engine in a process"),
        (["--frontends", "1"], {"TILEWAVE_ENGINE_PROCESS": "never"}, "--engine-process is never"),
        ([], {"TILEWAVE_LOG_FORMAT": "xml"}, "TILEWAVE_LOG_FORMAT"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], environment: dict[str, str], words: str
) -> None:
    if "--models" not in arguments:
        monkeypatch.setenv("TILEWAVE_MODELS", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as refused:
        read_settings(arguments)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_unknown_variables_are_noticed() -> None:
    assert not unknown_variables({"TILEWAVE_CACHE_DIR": "/", "TILEWAVE_CPU_ISA": "avx2", "TILEWAVE_PRINT_AFTER": "all"})
    assert unknown_variables({"TILEWAVE_PROT": "1", "TILEWAVE_PORT": "1", "HOME": "/"}) == {
        "TILEWAVE_PROT": "TILEWAVE_PORT"
    }
    assert unknown_variables({"tilewave_max_body_byte": "1", "TILEWAVE_XYZZY": "1"}) == {
        "TILEWAVE_XYZZY": "",
        "tilewave_max_body_byte": "TILEWAVE_MAX_BODY_BYTES",
    }


def test_a_misspelt_variable_is_named_at_start(repository: Path, processes: list[Process]) -> None:
    process = Process(repository, TILEWAVE_PROT="1")
    processes.append(process)
    process.wait_ready()
    process.process.terminate()
    assert (
        "TILEWAVE_PROT is no setting of this service; did you mean TILEWAVE_PORT?" in process.process.communicate()[1]
    )


def test_help_shows_what_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_settings(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "--precision {auto,fp32,tf32,bf16,fp16} arithmetic where model.toml says nothing (default: auto)" in shown
    assert "--threads int engine threads; all cores when not set --" in shown
    assert "--access-log, --no-access-log" in shown
    assert "None" not in shown and "AUTO" not in shown


@pytest.mark.parametrize("where", ["auto", "always", "never"])
def test_front_ends_go_with_an_engine_process(tmp_path: Path, where: str) -> None:
    alone = read_settings(["--models", str(tmp_path), "--engine-process", where])
    assert (alone.engine_process, alone.frontends) == (where, 0)
    if where != "never":
        assert read_settings(["--models", str(tmp_path), "--engine-process", where, "--frontends", "2"]).frontends == 2


@pytest.mark.parametrize("precision", list(Precision))
def test_the_values_that_help_shows_are_read(tmp_path: Path, precision: Precision) -> None:
    settings = read_settings(["--models", str(tmp_path), "--precision", precision.value, "--threads", "3"])
    assert (settings.precision, settings.threads) == (precision, 3)


@pytest.mark.parametrize("packed", list(Packed))
def test_packing_is_switched(tmp_path: Path, packed: Packed) -> None:
    assert read_settings(["--models", str(tmp_path), "--packed", packed.value]).packed == packed


def test_every_setting_has_a_description() -> None:
    assert all(field.description for field in Settings.model_fields.values())


# ---- the process


@pytest.mark.parametrize("where", ["never", "always"], ids=["same process", "own process"])
def test_sigterm_answers_what_was_accepted_and_exits_0(tmp_path: Path, processes: list[Process], where: str) -> None:
    add_model(tmp_path, "identity", "identity", sleep=1.0)
    process = Process(tmp_path, "--engine-process", where)
    processes.append(process)
    process.wait_ready()
    body = {"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    statuses: list[int] = []

    def infer() -> None:
        statuses.append(post(f"{process.url}/v2/models/identity/infer", json=body, timeout=20).status_code)

    threads = [threading.Thread(target=infer) for _ in range(3)]
    for thread in threads:
        thread.start()
    process.wait_inflight(3)
    process.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    _, errors = process.process.communicate(timeout=60)
    assert statuses == [200, 200, 200]
    assert process.process.returncode == 0, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("where", ["never", "always"], ids=["same process", "own process"])
def test_sigterm_does_not_wait_for_ever(tmp_path: Path, processes: list[Process], where: str) -> None:
    add_model(tmp_path, "identity", "identity", sleep=60)
    process = Process(tmp_path, "--drain-timeout", "1", "--engine-process", where)
    processes.append(process)
    process.wait_ready()
    body = {"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}

    answers: list[httpx.Response] = []

    def infer() -> None:
        answers.append(post(f"{process.url}/v2/models/identity/infer", json=body, timeout=60))

    thread = threading.Thread(target=infer)
    thread.start()
    process.wait_inflight(1)
    started = time.monotonic()
    process.process.send_signal(signal.SIGTERM)
    _, errors = process.process.communicate(timeout=60)
    assert time.monotonic() - started < 25, "not after the 60 s of the run, nor the 30 s of the request's deadline"
    assert process.process.returncode == 0, errors
    thread.join()
    assert answers[0].status_code == 503
    assert "shut down" in error_of(answers[0])


def test_logs_are_json_on_request(tmp_path: Path, processes: list[Process]) -> None:
    add_model(tmp_path, "identity", "identity")
    process = Process(tmp_path, TILEWAVE_LOG_FORMAT="json", TILEWAVE_ACCESS_LOG="true")
    processes.append(process)
    process.wait_ready()
    get(f"{process.url}/v2", headers={"x-request-id": "find-me"})
    process.process.send_signal(signal.SIGINT)
    _, errors = process.process.communicate(timeout=60)
    lines = [json.loads(line) for line in errors.splitlines()]
    assert process.process.returncode == 0
    (access,) = [x for x in lines if x["logger"] == "service.access" and x.get("request_id") == "find-me"]
    assert access["message"].startswith("GET /v2 200")
    assert {"time", "level", "logger", "message"} <= set(access)


def test_a_wrong_setting_ends_the_process_with_2(tmp_path: Path, processes: list[Process]) -> None:
    process = Process(tmp_path, "--threads", "many")
    processes.append(process)
    _, errors = process.process.communicate(timeout=60)
    assert process.process.returncode == 2
    assert len(errors.splitlines()) == 1
    assert errors.startswith("--threads: ")


def test_a_taken_port_is_said_in_one_line(tmp_path: Path, processes: list[Process]) -> None:
    add_model(tmp_path, "identity", "identity")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = Process(tmp_path, "--port", str(taken.getsockname()[1]))
        processes.append(process)
        _, errors = process.process.communicate(timeout=60)
    assert process.process.returncode == 1
    assert "cannot listen on 127.0.0.1" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("device", ["cuda:99", "cuda:0", "cpu"])
def test_a_gpu_that_was_asked_for_and_cannot_be_used_ends_the_process(
    tmp_path: Path, processes: list[Process], device: str
) -> None:
    process = Process(tmp_path, "--device", device)
    processes.append(process)
    if device != "cuda:99":
        wait_for(lambda: _is_live(process), 60)  # as long as any process may take to start
        return
    _, errors = process.process.communicate(timeout=60)
    assert process.process.returncode == 1
    assert errors == "--device cuda:99: device 'cuda:99' does not exist. Use another GPU or --device cpu\n"


def _is_live(process: Process) -> bool:
    try:
        return get(f"{process.url}/v2/health/live").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (
            Survey(problem="there is no NVIDIA driver"),
            ["there is no NVIDIA driver. Install NVIDIA driver 580 or newer"],
        ),
        (Survey(cuda=(13, 0), problem="the NVIDIA driver sees no GPU"), ["sees no GPU"]),
        (Survey((Gpu(0, "Tesla T4", (7, 5)),), (13, 0)), ["GPU 0 (Tesla T4)", "7.5", "8.0 (Ampere) or newer"]),
        (Survey((Gpu(0, "NVIDIA H100", (9, 0)),), (12, 4)), ["driver is too old", "CUDA 12.4", "Install driver 580"]),
    ],
    ids=["no driver", "no GPU", "old GPU", "old driver"],
)
def test_the_real_engine_says_what_is_wrong_with_the_gpu_and_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: Survey,
    says: list[str],
) -> None:
    monkeypatch.setattr(gpu_probe, "survey", lambda: found)
    monkeypatch.setattr(main, "configure", lambda *_: None)
    monkeypatch.setattr(main, "_bind", None)  # it does not come so far
    assert main.serve(Settings(models=tmp_path, device="cuda")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--device cuda: ") and line.endswith("--device cpu")
    assert all(part in line for part in says), line


def test_the_highest_version_that_loads_is_served(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "identity", "identity", version=1)
    add_model(tmp_path, "identity", "broken", version=2)
    (tmp_path / "identity" / "3").mkdir()
    server = start(tmp_path)
    assert server.identity([1, 2, 3, 4]).json()["model_version"] == "1"
    index = {entry["version"]: entry for entry in server.client.post("/v2/repository/index").json()}
    assert [index[version]["state"] for version in "123"] == ["READY", "UNAVAILABLE", "UNAVAILABLE"]
    assert "model.onnx" in index["3"]["reason"]
    assert server.client.get("/v2/models/identity/versions/3/ready").status_code == 503
