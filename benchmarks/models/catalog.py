"""What can be built, and how: the graph, its weights, the statistics of batch normalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx
from onnx import TensorProto

import engine
from benchmarks.models import transformers
from benchmarks.models.convnets import CLASSES, CONVNETS
from benchmarks.models.layers import Layers, Map
from benchmarks.models.photos import photos
from benchmarks.models.weights import RandomWeights
from models import bert
from models.onnx_writer import GraphWriter
from models.weights import FloatArray

BERT_BASE = bert.BertSize(layers=12, hidden=768, heads=12, intermediate=3072)
IMAGE_SIZE = 224


@dataclass(frozen=True)
class Built:
    """A model, and its weights by the names of the peer's module."""

    model: onnx.ModelProto
    weights: dict[str, FloatArray]


@dataclass(frozen=True)
class Architecture:
    """How to build a model. `symbols`: the sizes that its caller chooses."""

    symbols: tuple[str, ...]
    make: Callable[[], Built]


def _convnet(name: str) -> Callable[[], Built]:
    def make() -> Built:
        weights = RandomWeights(given=_statistics(name))
        writer = GraphWriter(name)
        net = Layers(writer, weights)
        writer.result(CONVNETS[name](net, Map("input", 3)).value, "logits")
        return Built(writer.model(_images("batch"), {"logits": ("batch", CLASSES)}), weights.tensors)

    return make


def _statistics(name: str) -> dict[str, FloatArray]:
    """Means and variances of every batch normalisation on real photos."""
    writer = GraphWriter(name)
    net = Layers(writer, RandomWeights(), find_statistics=True)
    writer.result(CONVNETS[name](net, Map("input", 3)).value, "logits")
    assert net.statistics is not None
    if not net.statistics:
        return {}
    images = photos(IMAGE_SIZE)
    model = writer.model(_images(len(images)), dict.fromkeys(net.statistics.values(), (1, "channels", 1, 1)))
    with engine.load(model.SerializeToString(), device="cpu") as runner:
        found = runner.run({"input": images})
    return {name: found[value].reshape(-1) for name, value in net.statistics.items()}


def _images(batch: int | str) -> dict[str, tuple[int, tuple[int | str, ...]]]:
    return {"input": (TensorProto.FLOAT, (batch, 3, IMAGE_SIZE, IMAGE_SIZE))}


def _bert_base() -> Built:
    weights = RandomWeights()
    return Built(bert.build_graph("bert-base", BERT_BASE, weights), weights.tensors)


def _transformer(write: Callable[[RandomWeights], onnx.ModelProto]) -> Callable[[], Built]:
    def make() -> Built:
        weights = RandomWeights()
        return Built(write(weights), weights.tensors)

    return make


ARCHITECTURES: dict[str, Architecture] = {
    **{name: Architecture(("batch",), _convnet(name)) for name in CONVNETS},
    "vit_b_16": Architecture(("batch",), _transformer(transformers.vit_b_16)),
    "bert_base": Architecture(("batch", "sequence"), _bert_base),
    "gpt2": Architecture(("batch", "sequence"), _transformer(transformers.gpt2)),
}


def build(name: str) -> Built:
    """Build one of `ARCHITECTURES`. Raises KeyError for another name."""
    return ARCHITECTURES[name].make()
