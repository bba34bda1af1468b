"""What the load tests send: photos, as JPEG files and as tensors, sentences and token ids of realistic sizes. Used by
``locustfile``."""

from __future__ import annotations

import importlib.util
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

JPEG_QUALITY = 85
SHORTER_SIDES = (240, 400, 720)
"""Pixels: a thumbnail, a preview and a screen-sized photo."""

PIXELS = (3, 224, 224)
"""The shape of a photo as the classifier takes it."""

FIRST_TOKEN, LAST_TOKEN = 101, 102
"""[CLS] and [SEP] of the BERT vocabulary."""

SENTENCES = (
    "Good morning!",
    "Where is my order?",
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The stock market fell sharply.",
    "How do I reset the password of an account I no longer have the e-mail address for?",
    "The new bridge shortens the way to work by twenty minutes, but the toll keeps many drivers on the old road.",
    "Refunds are paid to the card used for the purchase within five working days of the day we receive the parcel.",
    "In a matrix product every element that is loaded should be used as often as possible, because moving it from "
    "memory costs far more time and energy than the multiplication and addition it takes part in.",
    "The committee heard that the river had risen two metres in a single night; that the pumps, installed after "
    "the flood of 1953, had run without a pause for eleven hours; and that, had the wind not turned shortly "
    "before dawn, the lower quarter would have had to be evacuated. It resolved to raise the embankment, to "
    "replace the oldest pumps first, and to publish the readings of the gauges hourly, so that those who live "
    "near the water can decide for themselves.",
)


@dataclass(frozen=True)
class Photo:
    """A JPEG file, and the first label a right answer gives where that is beyond doubt."""

    name: str
    jpeg: bytes
    label: str | None = None


def photos() -> list[Photo]:
    """The photos of scikit-image in three sizes each, or generated pictures where it is not installed."""
    return [
        Photo(f"{name}-{side}", _jpeg(image, side), label)
        for name, image, label in _pictures()
        for side in SHORTER_SIDES
    ]


def _pictures() -> Iterator[tuple[str, Image.Image, str | None]]:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        for size in ((640, 480), (480, 640), (800, 600)):
            bands = [Image.effect_noise(size, 40 + 20 * band) for band in range(3)]
            yield "generated", Image.merge("RGB", bands), None
        return
    data = Path(spec.origin).parent / "data"
    known = {"chelsea.png": None, "coffee.png": "espresso", "camera.png": "tripod", "motorcycle_left.png": None}
    for name, label in known.items():
        yield Path(name).stem, Image.open(data / name).convert("RGB"), label


def _jpeg(image: Image.Image, shorter_side: int) -> bytes:
    scale = shorter_side / min(image.size)
    resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    resized.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def pixels(photo: Photo) -> NDArray[np.float32]:
    """A photo as the input of the classifier, of shape `PIXELS`: the centre, 0.875 of the shorter side, normalised."""
    image: Image.Image = Image.open(io.BytesIO(photo.jpeg))
    side = round(min(image.size) * 0.875)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize(PIXELS[:0:-1], Image.Resampling.BICUBIC)
    return np.ascontiguousarray(((np.asarray(image, np.float32) - 127) / 128).transpose(2, 0, 1))


def texts(source: random.Random) -> list[str]:
    """One to eight sentences of mixed lengths."""
    return source.choices(SENTENCES, k=source.randint(1, 8))


def token_ids(source: random.Random) -> list[list[int]]:
    """One to eight rows of ids; lengths are those of ordinary text: many short ones and a few long."""
    rows = source.randint(1, 8)
    lengths = [min(max(int(source.lognormvariate(3.2, 0.7)), 3), 256) for _ in range(rows)]
    return [[FIRST_TOKEN, *source.choices(range(1996, 29000), k=length - 2), LAST_TOKEN] for length in lengths]
