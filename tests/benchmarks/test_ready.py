"""The server's start: what is waited for, what is asked, and that wrong answers do not count."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import ready
from benchmarks.cases.ready import CPU_CASES
from benchmarks.ready import check_photo, check_sentences, measure_all

SERVER = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert options["--device"] == "cpu" and options["--threads"] == "2" and options["--models"] == "some"
filled = Path(os.environ["TILEWAVE_CACHE_DIR"], "filled")
begin, wait = time.monotonic(), 0 if filled.exists() else 1.0
filled.touch()
photo = {"predictions": [{"labels": [{"label": LABEL, "probability": 0.97}]}]}
vectors = {"embeddings": [[1, 0], [0.755, 0.6557], [0.05, 0.9987]]}

class Handler(BaseHTTPRequestHandler):
    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        assert self.path == "/v2/health/ready"
        self.answer(200 if time.monotonic() - begin >= wait else 503, {})
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/images"):
            assert body.startswith(b"\\x89PNG")
            self.answer(200, photo)
        else:
            assert len(json.loads(body)["text"]) == 3
            self.answer(200, vectors)

HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""


def command(tmp_path: Path, source: str) -> list[str]:
    script = tmp_path / "server.py"
    script.write_text(source)
    return [sys.executable, str(script)]


def test_the_second_start_finds_what_the_first_has_left(tmp_path: Path) -> None:
    server = command(tmp_path, SERVER.replace("LABEL", "'espresso'"))
    cold, warm = (found for _, found in measure_all(CPU_CASES, Path("some"), 2, server))
    for found in (cold, warm):
        assert found.measurement.failure == ""
        assert list(found.seconds) == ["ready", "a photo", "sentences"]
        assert 0 < found.seconds["ready"] <= found.seconds["a photo"] <= found.seconds["sentences"]
    assert cold.seconds["ready"] >= 1.0


def test_a_wrong_answer_is_a_failure(tmp_path: Path) -> None:
    server = command(tmp_path, SERVER.replace("LABEL", "'teapot'"))
    ((_, found),) = measure_all(CPU_CASES[:1], Path("some"), 2, server)
    assert found.measurement.failure == "the photo of espresso is taken for teapot (0.97)"
    assert found.seconds == {}


def test_a_server_that_ends_is_a_failure_with_its_last_word(tmp_path: Path) -> None:
    server = command(tmp_path, "raise SystemExit('no such device')")
    ((_, found),) = measure_all(CPU_CASES[:1], Path("some"), 2, server)
    assert found.measurement.failure.startswith("not ready after ")
    assert found.measurement.failure.endswith("no such device")


def test_a_server_that_never_gets_ready_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "READY_SECONDS", 0.5)
    server = command(tmp_path, "import time; print('still loading', flush=True); time.sleep(600)")
    ((_, found),) = measure_all(CPU_CASES[:1], Path("some"), 2, server)
    assert found.measurement.failure.endswith("still loading")


def test_answers_are_judged() -> None:
    with pytest.raises(ValueError, match=r"taken for espresso \(0.50\)"):
        check_photo({"predictions": [{"labels": [{"label": "espresso", "probability": 0.5}]}]})
    check_sentences({"embeddings": [[1, 0], [0.76, 0.65], [0.0, 1]]})
    for second, third in ((0.7, 0.0), (0.755, 0.5)):
        with pytest.raises(ValueError, match="alike by"):
            check_sentences({"embeddings": [[1, 0], [second, 0.6], [third, 1]]})
