"""Traffic for the tests that scrape a server: two small models, and three clients that ask them without end."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np

from tests.deploy.prometheus import ROOT

FIXTURES = ROOT / "tests" / "fixtures"


def repository(folder: Path) -> Path:
    """A model repository: "convnet" takes tensors, "bert" tokens."""
    for name in ("convnet", "bert"):
        (folder / name / "1").mkdir(parents=True)
        shutil.copy(FIXTURES / f"{name}_dynamo.onnx", folder / name / "1" / "model.onnx")
    return folder


@contextmanager
def flowing(url: str) -> Iterator[Counter[str]]:
    """Clients that go on until the end; what they were answered is counted by model, and complete when they have gone.
    Raises AssertionError at the end if an answer was not as it should be."""
    done = threading.Event()
    good: Counter[str] = Counter()
    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(_ask, url, done, send, good) for send in (_pictures, _tokens, _nonsense)]
        try:
            yield good
        finally:
            done.set()
        for client in clients:
            client.result(20)


def _ask(
    url: str, done: threading.Event, send: Callable[[httpx.Client, Counter[str]], None], good: Counter[str]
) -> None:
    while not done.is_set():
        # Connections of their own every now and then: with several front ends another one answers.
        with httpx.Client(base_url=url, timeout=20) as client:
            for _ in range(20):
                if done.wait(0.02):
                    return
                send(client, good)


def _pictures(client: httpx.Client, good: Counter[str]) -> None:
    pixels = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    tensor = {"name": "x", "shape": pixels.shape, "datatype": "FP32", "data": pixels.reshape(-1).tolist()}
    assert client.post("/v2/models/convnet/infer", json={"inputs": [tensor]}).status_code == 200
    good["convnet"] += 1


def _tokens(client: httpx.Client, good: Counter[str]) -> None:
    ids = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3]]
    assert client.post("/v1/models/bert/tokens", json={"ids": ids}).status_code == 200
    good["bert"] += 1


def _nonsense(client: httpx.Client, good: Counter[str]) -> None:
    assert client.post("/v2/models/convnet/infer", content=b"{").status_code == 400
    assert client.get("/nothing").status_code == 404
