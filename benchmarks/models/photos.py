"""Real photos as batches of images: those in the packages scikit-image and scikit-learn."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from models.weights import FloatArray

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in units of 0–1
_SKIMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg")
_SKLEARN = ("china.jpg", "flower.jpg")


@cache
def photos(size: int = 224) -> FloatArray:
    """[8, 3, size, size], read only: the middle of each photo, normalised as torchvision's models expect."""
    paths = [photo(name) for name in _SKIMAGE]
    paths += [_package("sklearn") / "datasets" / "images" / name for name in _SKLEARN]
    images = np.stack([_prepared(path, size) for path in paths])
    images.flags.writeable = False
    return images


def photo(name: str) -> Path:
    """The file of one of scikit-image's photos."""
    return _package("skimage") / "data" / name


def _package(name: str) -> Path:
    """Where a package lies. Not imported: only its files are needed. Raises ImportError."""
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"no package {name!r}, whose photos are needed: install the extra `test`")
    return Path(found.submodule_search_locations[0])


def _prepared(path: Path, size: int) -> FloatArray:
    with Image.open(path) as image:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box)
    levels = np.asarray(square, np.float32) / np.float32(255)
    mean, std = np.array(_MEAN, np.float32), np.array(_STD, np.float32)
    return np.ascontiguousarray(((levels - mean) / std).transpose(2, 0, 1))
