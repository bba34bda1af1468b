"""The default models through HTTP on the real engine: right answers, batched ones equal to single ones."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn

from service.app import create_app
from service.settings import Settings
from tests.service.conftest import error_of, sample

IMAGES = "/v1/models/efficientnet-lite0/images"
TOKENS = "/v1/models/all-minilm-l6-v2/tokens"
SENTENCES = ["A man is eating food.", "A man is eating a piece of bread.", "The stock market fell sharply."]
# The same sentences in the ids of the model's own tokenizer.
IDS = [
    [101, 1037, 2158, 2003, 5983, 2833, 1012, 102],
    [101, 1037, 2158, 2003, 5983, 1037, 3538, 1997, 7852, 1012, 102],
    [101, 1996, 4518, 3006, 3062, 9249, 1012, 102],
]
CATS = {"tabby", "tiger cat", "Egyptian cat", "Persian cat", "Siamese cat"}


@pytest.fixture(scope="module")
def client(model_repository: Path) -> Iterator[httpx.Client]:
    app = create_app(Settings(models=model_repository, device="cpu", threads=2))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
        end = time.monotonic() + 120
        while client.get("/v2/health/ready").status_code != 200:
            assert time.monotonic() < end, client.post("/v2/repository/index").text
            time.sleep(0.05)
        yield client
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def embed(client: httpx.Client, body: Mapping[str, Any]) -> np.ndarray:
    response = client.post(TOKENS, json=body)
    assert response.status_code == 200, response.text
    return np.array(response.json()["embeddings"])


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_both_models_are_batched(client: httpx.Client) -> None:
    batching = {entry["id"]: entry["batching"] for entry in client.get("/v1/models").json()["data"]}
    assert batching["all-minilm-l6-v2"].startswith("rows of any length side by side")
    assert batching["efficientnet-lite0"].startswith("rows along")


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


def test_photos_of_one_form_are_as_alone(client: httpx.Client, photos: Mapping[str, Path]) -> None:
    files = [("image", (name, path.read_bytes())) for name, path in photos.items()]
    together = np.array(client.post(f"{IMAGES}?raw=true", files=files).json()["outputs"]["logits"])
    for row, (_, (_, data)) in zip(together, files, strict=True):
        alone = np.array(client.post(f"{IMAGES}?raw=true", content=data).json()["outputs"]["logits"][0])
        assert relative_error(row, alone) < 1e-5


@pytest.mark.parametrize("way", ["text", "ids", "openai float", "openai base64"])
def test_similar_sentences_are_similar(client: httpx.Client, way: str) -> None:
    if way.startswith("openai"):
        public = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none")
        encoding: Any = "float" if way == "openai float" else openai.NOT_GIVEN
        answer = public.embeddings.create(model="all-minilm-l6-v2", input=SENTENCES, encoding_format=encoding)
        vectors = np.array([entry.embedding for entry in answer.data])
    else:
        vectors = embed(client, {"text": SENTENCES} if way == "text" else {"ids": IDS})
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[1] == pytest.approx(0.755, abs=0.005)
    assert vectors[0] @ vectors[2] < 0.1


def test_texts_become_the_ids_of_the_models_own_tokenizer(client: httpx.Client) -> None:
    assert relative_error(embed(client, {"text": SENTENCES}), embed(client, {"ids": IDS})) < 1e-6


def test_batched_answers_equal_single_ones(client: httpx.Client) -> None:
    """Rows of 1 to 100 tokens, alone and from eight clients at once."""
    source = random.Random(0)
    requests = [
        [[source.randrange(1000, 30000) for _ in range(source.randint(1, 100))] for _ in range(source.randint(1, 4))]
        for _ in range(24)
    ]
    alone = [np.concatenate([embed(client, {"ids": [row]}) for row in rows]) for rows in requests]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda rows: embed(client, {"ids": rows}), requests))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(together, alone, strict=True))


def test_padding_is_what_the_engine_computes_beside_the_tokens(client: httpx.Client) -> None:
    """One run of four rows: 123 tokens, for which it has a plan of 128; padded to the longest they would be 400."""

    def counted() -> tuple[float, float, float]:
        lines = [line for line in client.get("/metrics").text.splitlines() if 'model="all-minilm-l6-v2"' in line]
        names = ("inference_batch_tokens_count", "inference_batch_tokens_sum", "inference_padding_tokens_total")
        runs, tokens, padding = (
            sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{")) for name in names
        )
        return runs, tokens, padding

    before = counted()
    embed(client, {"ids": [[101] * length for length in (3, 100, 13, 7)]})
    runs, tokens, padding = (now - then for now, then in zip(counted(), before, strict=True))
    assert (runs, tokens, padding) == (1, 123, 5)


def test_an_id_out_of_range_is_named(client: httpx.Client) -> None:
    response = client.post(TOKENS, json={"ids": [[101, 99999, 102]]})
    assert response.status_code == 400
    assert "99999" in error_of(response)
    names = [spec["name"] for spec in client.get("/v2/models/all-minilm-l6-v2").json()["inputs"]]
    inputs = [
        {"name": name, "shape": [1, 1], "datatype": "INT64", "data": [99999 if name == "input_ids" else 1]}
        for name in names
    ]
    response = client.post("/v2/models/all-minilm-l6-v2/infer", json={"inputs": inputs})
    assert response.status_code == 400
    assert "out of range" in error_of(response)
    assert embed(client, {"ids": [[101, 102]]}).shape == (1, 384)


def test_kernels_of_both_models_are_in_the_metrics(client: httpx.Client, photos: Mapping[str, Path]) -> None:
    client.post(IMAGES, content=photos["coffee"].read_bytes())
    embed(client, {"ids": IDS})
    text = client.get("/metrics").text
    for model in ("efficientnet-lite0", "all-minilm-l6-v2"):
        for field in ("launches", "seconds", "flops", "bytes"):
            assert sample(text, f"engine_kernel_{field}_total", model=model) > 0
        assert sample(text, "engine_fallback_ops", model=model) == 0
        assert sample(text, "engine_kernel_roofline_ratio", model=model) > 0


def test_the_profile_and_the_metrics_count_the_same(client: httpx.Client, photos: Mapping[str, Path]) -> None:
    photo = photos["chelsea"].read_bytes()

    def counted() -> tuple[dict[tuple[str, str, str], float], dict[tuple[str, str, str], float]]:
        """By kernel, op and what is counted: of one plan's steps, and of /metrics."""
        client.post(IMAGES, content=photo).raise_for_status()
        profile = client.get("/v2/models/efficientnet-lite0/profile", params={"plan": "batch=1"}).json()
        text = client.get("/metrics").text
        steps: defaultdict[tuple[str, str, str], float] = defaultdict(float)
        for step in profile["steps"]:
            of = step["kernel"], step["op"]
            steps[*of, "launches"] += step["calls"]
            for what in ("seconds", "flops", "bytes", "cached_bytes"):
                steps[*of, what] += step["calls"] * step[what]
        labels = {"model": "efficientnet-lite0", "version": "1"}
        metrics = {
            (kernel, op, what): sample(text, f"engine_kernel_{what}_total", **labels, kernel=kernel, op=op)
            for kernel, op, what in steps
        }
        return dict(steps), metrics

    (steps, metrics), (steps_after, metrics_after) = counted(), counted()
    assert len(steps) == 25, "five kernels and ops, five counters each"
    for key in steps:
        grown = steps_after[key] - steps[key]
        assert grown > 0 and metrics_after[key] - metrics[key] == pytest.approx(grown, rel=1e-6), key
