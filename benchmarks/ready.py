"""``python -m benchmarks ready``: seconds from the start of ``python -m service`` until it is ready, and until it has
answered a photo and three sentences rightly: with empty caches, then with what that start has left in them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases.models import EFFICIENTNET, MINILM
from benchmarks.cases.ready import ReadyCase
from benchmarks.measure import Measurement, reason
from benchmarks.models.photos import photo

READY_SECONDS = 240.0
_ANSWER_SECONDS = 60.0
_POLL_SECONDS = 0.01
_DRAIN_SECONDS = 30.0

# What EfficientNet-Lite0 sees in the photo, and how alike MiniLM finds the first sentence and the two others.
_PHOTO, _LABEL, _LEAST = "coffee.png", "espresso", 0.9
_SENTENCES = ("A man is eating food.", "A man is eating a piece of bread.", "The stock market fell sharply.")
_ALIKE, _TOLERANCE, _UNLIKE = 0.755, 0.01, 0.1

Seconds = dict[str, float]


@dataclass(frozen=True)
class Started:
    """What came out: seconds from the start of the process, by event."""

    measurement: Measurement
    seconds: Seconds


def measure_all(
    cases: Sequence[ReadyCase], models: Path, threads: int, command: Sequence[str] = (sys.executable, "-m", "service")
) -> Iterator[tuple[ReadyCase, Started]]:
    """One start after the other, on caches that begin empty and that all of them share. `threads` are the engine's
    on a CPU; `command` starts the server."""
    with tempfile.TemporaryDirectory() as caches:
        for case in cases:
            seconds: Seconds = {}
            try:
                for event, value in started([*command, *_arguments(case, models, threads)], Path(caches)):
                    seconds[event] = value
            except Exception as problem:
                yield case, Started(Measurement(failure=reason(problem)), {})
            else:
                yield case, Started(Measurement(), seconds)


def _arguments(case: ReadyCase, models: Path, threads: int) -> list[str]:
    given = ["--models", str(models), "--device", case.device]
    return given if case.device != "cpu" else [*given, "--threads", str(threads)]


def started(command: Sequence[str], caches: Path) -> Iterator[tuple[str, float]]:
    """Start a server by `command`, which is told its port; each event with the seconds until then; end it. Raises
    RuntimeError where it ends or is not ready in time, ValueError where it answers wrongly."""
    port = _free_port()
    with tempfile.TemporaryFile() as log:
        begin = time.monotonic()
        environment = {**os.environ, "TILEWAVE_CACHE_DIR": str(caches)}
        server = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=log, stderr=log)
        try:
            while _status(port) != 200:
                if server.poll() is not None or time.monotonic() - begin > READY_SECONDS:
                    log.seek(0)
                    said = log.read().decode(errors="replace").strip().splitlines()
                    raise RuntimeError(f"not ready after {time.monotonic() - begin:.0f} s: {said[-1] if said else ''}")
                time.sleep(_POLL_SECONDS)
            yield "ready", time.monotonic() - begin
            check_photo(_post(port, f"/v1/models/{EFFICIENTNET}/images", photo(_PHOTO).read_bytes()))
            yield "a photo", time.monotonic() - begin
            body = json.dumps({"text": _SENTENCES}).encode()
            check_sentences(_post(port, f"/v1/models/{MINILM}/tokens", body, "application/json"))
            yield "sentences", time.monotonic() - begin
        finally:
            _end(server)


def check_photo(answer: Mapping[str, Any]) -> None:
    """Raises ValueError where the label is another."""
    best = answer["predictions"][0]["labels"][0]
    if best["label"] != _LABEL or best["probability"] < _LEAST:
        raise ValueError(f"the photo of {_LABEL} is taken for {best['label']} ({best['probability']:.2f})")


def check_sentences(answer: Mapping[str, Any]) -> None:
    """Raises ValueError where the sentences are as alike as they should not be."""
    vectors = np.array(answer["embeddings"])
    alike, unlike = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    if abs(alike - _ALIKE) > _TOLERANCE or unlike > _UNLIKE:
        raise ValueError(f"the sentences are alike by {alike:.3f} and {unlike:.3f}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _status(port: int) -> int:
    """The status of the server's readiness; 0 where it does not listen yet."""
    connection = HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status
        except (OSError, HTTPException):
            return 0


def _post(port: int, path: str, body: bytes, content_type: str = "application/octet-stream") -> Any:
    connection = HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)
    with contextlib.closing(connection):
        connection.request("POST", path, body, {"Content-Type": content_type})
        response = connection.getresponse()
        content = response.read()
    if response.status != 200:
        raise RuntimeError(f"{path}: {response.status} {content[:100].decode(errors='replace')}")
    return json.loads(content)


def _end(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(_DRAIN_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
