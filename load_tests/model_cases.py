"""The kinds of requests that `end_to_end` measures: what is sent to whom, and what ours is held to."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from load_tests.http_client import Exchange, post
from load_tests.payloads import photos
from load_tests.workloads import MODELS, Make, images, our_label, pixel_tensors, sentence_ids, sentence_rows, texts
from service.model_config import read_model_config

IMAGES, TEXTS = "efficientnet-lite0", "all-minilm-l6-v2"
ALONE, DECODING = "engine alone", "engine with the same decoding"


@dataclass(frozen=True)
class Case:
    """One kind of request to one model. `ours` and `peers` make requests, `kind` is what the peers' servers are started
    for, `goal` what ours is held to. `lengths`: the tokens of the rows that are sent, each as often as the others; none
    for a model without tokens."""

    model: str
    ours: Callable[[], Make]
    goal: str = ALONE
    kind: str = ""
    peers: Mapping[str, Callable[[], Make]] = field(default_factory=dict)
    lengths: Callable[[], Sequence[int]] = tuple


def _base64_photos() -> Make:
    """Photos as LitServe's users send them."""
    prepared = []
    for photo in photos():
        body = json.dumps({"image": base64.b64encode(photo.jpeg).decode()}).encode()
        request = post("/predict", body, {"Content-Type": "application/json"})
        problem = lambda answer, photo=photo: (  # noqa: E731
            None if photo.label in (None, json.loads(answer.body)["label"]) else "another label"
        )
        prepared.append(Exchange(request, problem))
    return lambda source: source.choice(prepared)


def _tensors() -> Make:
    folder = MODELS / IMAGES
    model = onnx.load(folder / "1" / "model.onnx", load_external_data=False)
    return pixel_tensors(IMAGES, model.graph.input[0].name, (folder / "labels.txt").read_text().splitlines())


def _rows() -> list[list[int]]:
    folder = MODELS / TEXTS
    tokens = read_model_config(folder / "model.toml").tokens
    return sentence_rows(folder / tokens.tokenizer, tokens.max_length)


def _lengths() -> list[int]:
    return list(map(len, _rows()))


CASES = {
    "photos": Case(
        IMAGES,
        lambda: images(f"/v1/models/{IMAGES}/images", our_label),
        DECODING,
        "images",
        {
            "litserve": _base64_photos,
            "mosec": lambda: images("/inference", lambda body: str(json.loads(body)["label"])),
        },
    ),
    "tensors": Case(IMAGES, _tensors),
    "texts": Case(
        TEXTS,
        lambda: texts(f"/v1/models/{TEXTS}/tokens", "text"),
        ALONE,
        "texts",
        {"litserve": lambda: texts("/predict", "text"), "mosec": lambda: texts("/inference", "text")},
        _lengths,
    ),
    "ids": Case(TEXTS, lambda: sentence_ids(f"/v1/models/{TEXTS}/tokens", _rows()), lengths=_lengths),
}
