"""Load scenarios for locust: photos and binary tensors to the classifier, sentences and token ids to the encoder.

``locust -f load_tests/locustfile.py --headless -u 20 -r 20 -t 30s --host http://127.0.0.1:8000``. Every user sends
the next request when it has the last answer. An answer is a failure unless it is right: the status, the number
and length of the vectors, the first label of a photo that is beyond doubt. ``--tags images`` runs one scenario.
A server that asks for API keys gets that of ``API_KEY``. ``python -m load_tests.capacity`` (`make load`) has
these users find out what a server can do, and reports it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from locust import FastHttpUser, constant, tag, task

from load_tests.payloads import PIXELS, photos, pixels, texts, token_ids

IMAGES_PATH = "/v1/models/efficientnet-lite0/images"
TOKENS_PATH = "/v1/models/all-minilm-l6-v2/tokens"
TENSORS_PATH = "/v2/models/efficientnet-lite0/infer"
EMBEDDING_SIZE = 384
CLASSES = 1000

KEY = os.environ.get("API_KEY", "")
HEADERS = {"authorization": f"Bearer {KEY}"} if KEY else {}

PHOTOS = photos()
TENSOR = json.dumps(
    {
        "inputs": [
            {
                "name": "input",
                "shape": [1, *PIXELS],
                "datatype": "FP32",
                "parameters": {"binary_data_size": 4 * math.prod(PIXELS)},
            }
        ],
        "parameters": {"binary_data_output": True},
    }
).encode()
"""What precedes the pixels in a request with a binary tensor."""

_seeds = itertools.count()

Check = Callable[[Any], str | None]
"""Says what is wrong with a parsed answer, or None."""

Read = Callable[[bytes], Any]
"""Parses a body."""


class InferenceUser(FastHttpUser):
    """A client that checks what it gets."""

    abstract = True
    wait_time = constant(0)

    def on_start(self) -> None:
        self.random = random.Random(next(_seeds))

    def post(
        self,
        path: str,
        name: str,
        check: Check,
        headers: Mapping[str, str] | None = None,
        read: Read = json.loads,
        **body: Any,
    ) -> None:
        """Send one request; it is counted under ``name``, as a failure if its answer is not right."""
        sent = {**HEADERS, **(headers or {})}
        with self.client.request("POST", path, name=name, catch_response=True, headers=sent, **body) as response:
            if response.status_code == 0:
                response.failure(f"no answer: {response.error}")
            elif response.status_code != 200:
                response.failure(f"status {response.status_code}: {(response.text or '')[:200]}")
            else:
                problem = _problem(response.content or b"", read, check)
                if problem is None:
                    response.success()
                else:
                    response.failure(problem)


class ImageUser(InferenceUser):
    """Sends photos of several sizes as raw JPEG bodies."""

    @tag("images")
    @task
    def photo(self) -> None:
        photo = self.random.choice(PHOTOS)

        def check(answer: Any) -> str | None:
            label = answer["predictions"][0]["labels"][0]["label"]
            return None if photo.label in (None, label) else f"{photo.name} is {label!r}, expected {photo.label!r}"

        self.post(IMAGES_PATH, "images", check, data=photo.jpeg, headers={"content-type": "image/jpeg"})


class TokenUser(InferenceUser):
    """Sends one to eight sentences, or rows of token ids, of mixed lengths."""

    @tag("tokens")
    @task(2)
    def text(self) -> None:
        body = texts(self.random)
        self.post(TOKENS_PATH, "tokens (text)", _embeddings(len(body)), json={"text": body})

    @tag("tokens")
    @task(1)
    def ids(self) -> None:
        body = token_ids(self.random)
        self.post(TOKENS_PATH, "tokens (ids)", _embeddings(len(body)), json={"ids": body})


class TensorUser(InferenceUser):
    """Sends the pixels of photos as binary tensors, and gets the scores as one."""

    @tag("tensors")
    @task
    def tensor(self) -> None:
        index = self.random.randrange(len(PHOTOS))
        if index not in _tensors:
            _tensors[index] = pixels(PHOTOS[index]).tobytes()

        def check(scores: Any) -> str | None:
            if scores.shape != (CLASSES,) or not np.isfinite(scores).all():
                return f"scores of shape {scores.shape}"
            best = int(scores.argmax())
            first = _best.setdefault(index, best)
            return None if best == first else f"{PHOTOS[index].name} is class {best}, and was {first} before"

        headers = {"inference-header-content-length": str(len(TENSOR))}
        self.post(TENSORS_PATH, "tensors", check, headers, _scores, data=TENSOR + _tensors[index])


_tensors: dict[int, bytes] = {}  # of photos, made when they are first sent
_best: dict[int, int] = {}  # the first answers to them


def _scores(content: bytes) -> Any:
    return np.frombuffer(content[-4 * CLASSES :], np.float32)


def _problem(content: bytes, read: Read, check: Check) -> str | None:
    try:
        return check(read(content))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return f"an answer of another form: {error!r}"


def _embeddings(rows: int) -> Check:
    """The answer holds ``rows`` unit vectors."""

    def check(answer: Any) -> str | None:
        vectors = answer["embeddings"]
        if len(vectors) != rows:
            return f"{len(vectors)} embeddings for {rows} inputs"
        for vector in vectors:
            if len(vector) != EMBEDDING_SIZE or abs(math.hypot(*vector) - 1) > 1e-3:
                return f"an embedding of {len(vector)} values and length {math.hypot(*vector):.4f}"
        return None

    return check
