"""The HTTP server with its engine on the GPU: photos, sentences, metrics; and a device fault that only the engine's
process does not survive."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from service.app import create_app
from service.settings import Settings
from service.workers.engine_api import EngineModule, real_engine
from service.workers.process import ProcessTransport
from tests.gpu.conftest import relative_error
from tests.gpu.faulty_engine import FAULT, faulty_engine

pytestmark = pytest.mark.gpu

IMAGES = "/v1/models/efficientnet-lite0/images"
TOKENS = "/v1/models/all-minilm-l6-v2/tokens"
INFER = "/v2/models/efficientnet-lite0/infer"
SENTENCES = ["A man is eating food.", "A man is eating a piece of bread.", "The stock market fell sharply."]
CATS = {"tabby", "tiger cat", "Egyptian cat", "Persian cat", "Siamese cat"}
READY_S = 300  # with cold caches: all kernels are compiled
SAME_ROW = 2e-3


@contextmanager
def serving(models: Path, engine: Callable[[], EngineModule]) -> Iterator[tuple[httpx.Client, ProcessTransport]]:
    app = create_app(Settings(models=models, device="cuda"), engine)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    began = time.monotonic()
    with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
        wait_ready(client)
        print(f"ready after {time.monotonic() - began:.1f} s")
        transport = app.state.serving.engine._transport
        assert isinstance(transport, ProcessTransport), "a GPU belongs to a process of its own"
        yield client, transport
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def wait_ready(client: httpx.Client) -> None:
    end = time.monotonic() + READY_S
    while client.get("/v2/health/ready").status_code != 200:
        assert time.monotonic() < end, client.post("/v2/repository/index").text
        time.sleep(0.05)
    states = {entry["name"]: entry["state"] for entry in client.post("/v2/repository/index").json()}
    assert states == {"efficientnet-lite0": "READY", "all-minilm-l6-v2": "READY"}, states


@pytest.fixture(scope="module")
def client(model_repository: Path) -> Iterator[httpx.Client]:
    with serving(model_repository, real_engine) as (client, _):
        yield client


def embed(client: httpx.Client, body: Mapping[str, Any]) -> np.ndarray:
    response = client.post(TOKENS, json=body)
    assert response.status_code == 200, response.text
    return np.array(response.json()["embeddings"])


@pytest.mark.parametrize(
    ("photo", "labels", "least"),
    [
        ("chelsea", CATS, 0.3),
        ("coffee", {"espresso"}, 0.9),
        ("camera", {"tripod"}, 0.9),
        ("motorcycle", {"moped"}, 0.3),
    ],
)
def test_photos(client: httpx.Client, photos: Mapping[str, Path], photo: str, labels: set[str], least: float) -> None:
    answer = client.post(IMAGES, content=photos[photo].read_bytes()).json()
    best = answer["predictions"][0]["labels"][0]
    assert best["label"] in labels
    assert best["probability"] > least


def test_similar_sentences_are_similar(client: httpx.Client) -> None:
    vectors = embed(client, {"text": SENTENCES})
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-3)
    assert vectors[0] @ vectors[1] == pytest.approx(0.755, abs=0.01)
    assert vectors[0] @ vectors[2] < 0.1


def test_batched_answers_equal_single_ones(client: httpx.Client) -> None:
    source = random.Random(0)
    requests = [
        [[source.randrange(1000, 30000) for _ in range(source.randint(1, 100))] for _ in range(source.randint(1, 4))]
        for _ in range(24)
    ]
    alone = [np.concatenate([embed(client, {"ids": [row]}) for row in rows]) for rows in requests]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda rows: embed(client, {"ids": rows}), requests))
    assert all(relative_error(a, b) < SAME_ROW for a, b in zip(together, alone, strict=True))


def test_the_metrics_have_the_device_and_its_kernels(client: httpx.Client) -> None:
    embed(client, {"text": SENTENCES})
    text = client.get("/metrics").text
    assert 'engine_info{arch="sm_' in text and 'device="cuda:' in text
    for model in ("efficientnet-lite0", "all-minilm-l6-v2"):
        assert f'engine_fallback_ops{{model="{model}",version="1"}} 0.0' in text
        assert f'engine_kernel_launches_total{{kernel="gemm",model="{model}"' in text


def test_a_device_fault_costs_the_engine_process_and_nothing_else(
    model_repository: Path, photos: Mapping[str, Path]
) -> None:
    photo = photos["coffee"].read_bytes()
    with serving(model_repository, faulty_engine) as (client, transport):
        expected = client.post(IMAGES, content=photo).json()["predictions"]
        before = transport.pid
        poison = {"name": "input", "shape": [1, 3, 224, 224], "datatype": "FP32", "data": [FAULT] * (3 * 224 * 224)}
        response = client.post(INFER, json={"inputs": [poison]})
        assert response.status_code == 503, response.text
        assert "lost to this process" in response.json()["error"]
        assert client.get("/v2/health/live").status_code == 200
        wait_ready(client)
        assert transport.pid != before
        assert client.post(IMAGES, content=photo).json()["predictions"] == expected
        assert "engine_process_restarts_total 1.0" in client.get("/metrics").text
