"""The load tests send valid bodies, and the answers they insist on are right."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from load_tests.payloads import FIRST_TOKEN, LAST_TOKEN, SHORTER_SIDES, photos, pixels, texts, token_ids


def test_photos_are_jpegs_of_the_sizes_promised() -> None:
    sides = [min(Image.open(io.BytesIO(photo.jpeg)).size) for photo in photos()]
    assert sides == list(SHORTER_SIDES) * 4


def test_labels_insisted_on_are_those_of_the_model(efficientnet_lite0: Path) -> None:
    session = onnxruntime.InferenceSession(efficientnet_lite0 / "1/model.onnx", providers=["CPUExecutionProvider"])
    labels = (efficientnet_lite0 / "labels.txt").read_text().splitlines()
    known = [photo for photo in photos() if photo.label]
    (logits,) = session.run(None, {"input": np.stack([pixels(photo) for photo in known])})
    assert [labels[index] for index in logits.argmax(axis=1)] == [photo.label for photo in known]


def test_token_rows_are_complete_and_within_the_model() -> None:
    source = random.Random(0)
    rows = [row for _ in range(200) for row in token_ids(source)]
    assert all(row[0] == FIRST_TOKEN and row[-1] == LAST_TOKEN for row in rows)
    assert all(3 <= len(row) <= 256 and max(row) < 30522 for row in rows)
    assert np.median([len(row) for row in rows]) < 64 < max(len(row) for row in rows)


def test_texts_come_one_to_eight_at_a_time() -> None:
    source = random.Random(0)
    assert {len(texts(source)) for _ in range(200)} == set(range(1, 9))
