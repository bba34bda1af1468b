"""Load scenarios for locust: photos to the classifier, sentences and token ids to the encoder.

``locust -f load_tests/locustfile.py --headless -u 20 -r 20 -t 30s --host http://127.0.0.1:8000``. Every user sends
the next request when it has the last answer. An answer is a failure unless it is right: the status, the number
and length of the vectors, the first label of a photo that is beyond doubt. ``--tags images`` runs one scenario.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from typing import Any

from locust import FastHttpUser, constant, tag, task

from load_tests.payloads import photos, texts, token_ids

IMAGES_PATH = "/v1/models/efficientnet-lite0/images"
TOKENS_PATH = "/v1/models/all-minilm-l6-v2/tokens"
EMBEDDING_SIZE = 384

PHOTOS = photos()

_seeds = itertools.count()

Check = Callable[[Any], str | None]
"""Says what is wrong with a parsed answer, or None."""


class InferenceUser(FastHttpUser):
    """A client that checks what it gets."""

    abstract = True
    wait_time = constant(0)

    def on_start(self) -> None:
        self.random = random.Random(next(_seeds))

    def post(self, path: str, name: str, check: Check, **body: Any) -> None:
        """Send one request; it is counted under ``name``, as a failure if its answer is not right."""
        with self.client.request("POST", path, name=name, catch_response=True, **body) as response:
            if response.status_code == 0:
                response.failure(f"no answer: {response.error}")
            elif response.status_code != 200:
                response.failure(f"status {response.status_code}: {(response.text or '')[:200]}")
            else:
                problem = _problem(response.content or b"", check)
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


def _problem(content: bytes, check: Check) -> str | None:
    try:
        return check(json.loads(content))
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
