"""What the measurements send, what models they need, and when an answer is right."""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import orjson
import tokenizers
from onnx import TensorProto, helper

from load_tests.http_client import Answer, Connection, Exchange, post
from load_tests.payloads import PIXELS, SENTENCES, Photo, photos, pixels
from load_tests.servers import ROOT

MODELS = ROOT / "models"
IDENTITY = "identity"
WIDTH = 64
"""Floats of a row of the identity model."""

EMBEDDING_SIZE = 384

Make = Callable[[random.Random], Exchange]


def identity_repository(folder: Path) -> Path:
    """A repository with an ONNX model that answers with its input, (batch, 64) of fp32."""
    place = folder / "identity-models" / IDENTITY / "1"
    place.mkdir(parents=True, exist_ok=True)
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("input", "output")]
    graph = helper.make_graph([helper.make_node("Identity", ["input"], ["output"])], IDENTITY, infos[:1], infos[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, place / "model.onnx")
    return place.parent.parent


def default_repository(folder: Path, *names: str) -> Path:
    """A repository with copies of default models. Raises FileNotFoundError where `make models` has not been called."""
    root = folder / "default-models"
    for name in names:
        if not (MODELS / name / "1" / "model.onnx").exists():
            raise FileNotFoundError(f"model {name} is not built; call `make models`")
        if not (root / name).exists():
            shutil.copytree(MODELS / name, root / name)
    return root


@cache
def _row() -> tuple[list[float], bytes]:
    values = np.random.default_rng(0).standard_normal(WIDTH).astype(np.float32)
    return [float(value) for value in values], values.tobytes()


def _data_problem(read: Callable[[bytes], list[float]]) -> Callable[[Answer], str | None]:
    """Whether the row came back. A body that is the same as one that was right is right, and costs nothing to see."""
    right: set[bytes] = set()

    def problem(answer: Answer) -> str | None:
        if answer.body in right:
            return None
        if not np.array_equal(np.array(read(answer.body), np.float32), np.array(_row()[0], np.float32)):
            return "another row"
        right.add(answer.body)
        return None

    return problem


def _same_tail(answer: Answer) -> str | None:
    return None if answer.body.endswith(_row()[1]) else "another row"


def identity_json() -> Make:
    """A row as JSON."""
    tensor = {"name": "input", "shape": [1, WIDTH], "datatype": "FP32", "data": _row()[0]}
    problem = _data_problem(lambda body: json.loads(body)["outputs"][0]["data"])
    one = Exchange(post(f"/v2/models/{IDENTITY}/infer", json.dumps({"inputs": [tensor]}).encode()), problem)
    return lambda _: one


def identity_binary() -> Make:
    """A row as binary data, both ways."""
    tensor = {"name": "input", "shape": [1, WIDTH], "datatype": "FP32", "parameters": {"binary_data_size": WIDTH * 4}}
    document = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    header = json.dumps(document).encode()
    lengths = {"Inference-Header-Content-Length": str(len(header))}
    one = Exchange(post(f"/v2/models/{IDENTITY}/infer", header + _row()[1], lengths), _same_tail)
    return lambda _: one


def echo(body: bytes) -> Make:
    """Bytes that come back as they are."""
    one = Exchange(post("/echo", body), lambda answer: None if answer.body == body else "another body")
    return lambda _: one


def peer_json(path: str) -> Make:
    """The row as the peers' users send it."""
    body = json.dumps({"data": _row()[0]}).encode()

    problem = _data_problem(lambda body: json.loads(body)["data"])
    one = Exchange(post(path, body, {"Content-Type": "application/json"}), problem)
    return lambda _: one


def peer_base64(path: str) -> Make:
    """The row as base64 in JSON, for a peer that reads nothing but JSON."""
    text = base64.b64encode(_row()[1]).decode()
    body = json.dumps({"base64": text}).encode()

    def problem(answer: Answer) -> str | None:
        return None if json.loads(answer.body)["base64"] == text else "another row"

    one = Exchange(post(path, body, {"Content-Type": "application/json"}), problem)
    return lambda _: one


def peer_binary(path: str) -> Make:
    """The row as the whole body."""
    one = Exchange(post(path, _row()[1]), lambda answer: None if answer.body == _row()[1] else "another row")
    return lambda _: one


def images(path: str, label: Callable[[bytes], str]) -> Make:
    """Photos; `label` reads the first label from an answer."""
    prepared = [
        Exchange(
            post(path, photo.jpeg, {"Content-Type": "image/jpeg"}),
            lambda answer, photo=photo: _label_problem(label(answer.body), photo.label),  # type: ignore[misc]
        )
        for photo in photos()
    ]
    return lambda source: source.choice(prepared)


def pixel_tensors(model: str, tensor: str, labels: list[str]) -> Make:
    """Photos as the classifier takes them, (1, 3, 224, 224) of fp32, as binary data both ways. An answer is right
    where its highest score is that of the photo's label."""

    def problem(answer: Answer, photo: Photo) -> str | None:
        start = int(answer.headers[b"inference-header-content-length"])
        scores = np.frombuffer(answer.body, np.float32, offset=start)
        if scores.size != len(labels):
            return f"{scores.size} scores"
        return _label_problem(labels[int(scores.argmax())], photo.label)

    prepared = []
    for photo in photos():
        data = pixels(photo).tobytes()
        document = {
            "inputs": [
                {
                    "name": tensor,
                    "shape": [1, *PIXELS],
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": len(data)},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
        header = json.dumps(document).encode()
        request = post(
            f"/v2/models/{model}/infer", header + data, {"Inference-Header-Content-Length": str(len(header))}
        )
        prepared.append(Exchange(request, lambda answer, photo=photo: problem(answer, photo)))  # type: ignore[misc]
    return lambda source: source.choice(prepared)


def _label_problem(found: str, expected: str | None) -> str | None:
    return None if expected in (None, found) else f"{found!r} instead of {expected!r}"


def our_label(body: bytes) -> str:
    """The first label of one of our answers."""
    label: str = json.loads(body)["predictions"][0]["labels"][0]["label"]
    return label


def texts(path: str, key: str) -> Make:
    """One sentence a request, under a key of the body; the answer has its unit vector under `embeddings`."""
    return _embedded(path, [{key: [text]} for text in SENTENCES])


def sentence_rows(tokenizer: Path, max_length: int | None) -> list[list[int]]:
    """The same sentences as token ids, cut to `max_length`."""
    reader = tokenizers.Tokenizer.from_file(str(tokenizer))
    reader.no_truncation() if max_length is None else reader.enable_truncation(max_length)
    reader.no_padding()
    return [reader.encode(text).ids for text in SENTENCES]


def sentence_ids(path: str, rows: Sequence[Sequence[int]]) -> Make:
    """A row of token ids a request."""
    return _embedded(path, [{"ids": [row]} for row in rows])


def _embedded(path: str, documents: Sequence[Mapping[str, Any]]) -> Make:
    def problem(answer: Answer) -> str | None:
        vectors = np.array(orjson.loads(answer.body)["embeddings"])
        is_unit = vectors.shape == (1, EMBEDDING_SIZE) and abs(float(np.vdot(vectors, vectors)) - 1) < 2e-3
        return None if is_unit else f"vectors of shape {vectors.shape}"

    prepared = [
        Exchange(post(path, json.dumps(document).encode(), {"Content-Type": "application/json"}), problem)
        for document in documents
    ]
    return lambda source: source.choice(prepared)


VECTOR_TOLERANCE = 1e-5
"""Between the embeddings of one row in batches of other sizes."""


async def vector_alone(port: int, request: bytes) -> np.ndarray:
    """The embedding that a request gets over a connection of its own."""
    connection = Connection(port)
    answer = await connection.ask(request)
    connection.close()
    return _vector(answer)


def same_vectors(requests: list[bytes], expected: list[np.ndarray]) -> Make:
    """Requests drawn at random, each for one embedding that is known."""

    def make(draw: random.Random) -> Exchange:
        index = draw.randrange(len(requests))

        def problem(answer: Answer) -> str | None:
            worst = float(np.abs(_vector(answer) - expected[index]).max())
            return None if worst <= VECTOR_TOLERANCE else f"another vector: {worst:.2e}"

        return Exchange(requests[index], problem)

    return make


def _vector(answer: Answer) -> np.ndarray:
    return np.array(json.loads(answer.body)["embeddings"][0])
