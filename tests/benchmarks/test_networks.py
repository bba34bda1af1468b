"""PyTorch's twins of the models, on the CPU: they have the weights of our files and give what ONNX Runtime gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("transformers")

import onnxruntime
import torch

from benchmarks.cases.models import (
    BERT,
    EFFICIENTNET,
    EFFICIENTNET_B0,
    GPT2,
    MINILM,
    MOBILENET,
    RESNET,
    VGG,
    VIT,
    ModelCase,
)
from benchmarks.gpu.networks import network
from benchmarks.gpu.references import References
from benchmarks.models.store import build_here, model_file, weights_file

TOLERANCE = 2e-5  # relative L2 in fp32, through up to 53 convolutions
SLOW = pytest.mark.slow


def checked(case: ModelCase, path: Path) -> None:
    net = network(case.model, path, "cpu", torch.float32)
    feeds = case.feeds()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (expected,) = session.run([net.output], feeds)
    with torch.inference_mode():
        found = net.call(*net.arguments(feeds)).numpy()
    assert np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected)


@pytest.mark.parametrize("case", [ModelCase(EFFICIENTNET, 2), ModelCase(MINILM, 3, 33)], ids=lambda case: case.name)
def test_networks_carry_the_weights_of_the_default_models(case: ModelCase, model_repository: Path) -> None:
    checked(case, model_file(model_repository, case.model))


@pytest.mark.parametrize(
    "case",
    [
        ModelCase(MOBILENET, 2),
        ModelCase(EFFICIENTNET_B0, 2),
        pytest.param(ModelCase(RESNET, 2), marks=SLOW),
        pytest.param(ModelCase(VGG, 1), marks=SLOW),
        pytest.param(ModelCase(VIT, 2), marks=SLOW),
        pytest.param(ModelCase(BERT, 3, 33), marks=SLOW),
        pytest.param(ModelCase(GPT2, 2, 20), marks=SLOW),
    ],
    ids=lambda case: case.name,
)
def test_networks_carry_the_weights_of_the_architectures(case: ModelCase, tmp_path: Path) -> None:
    build_here(case.model, tmp_path)
    checked(case, model_file(tmp_path, case.model))


def test_a_reference_of_other_weights_is_refused(tmp_path: Path) -> None:
    build_here(MOBILENET, tmp_path)
    path = model_file(tmp_path, MOBILENET)
    case = ModelCase(MOBILENET, 3)
    found = References("cpu").of(case, path)["logits"]
    assert found.shape == (3, 1000)
    with np.load(weights_file(path)) as archive:
        weights = dict(archive)
    weights["classifier.1.bias"] = weights["classifier.1.bias"] + np.float32(0.01)
    np.savez(weights_file(path), **weights)
    with pytest.raises(ValueError, match="differs from ONNX Runtime's"):
        References("cpu").of(case, path)
    del weights["classifier.1.bias"]
    np.savez(weights_file(path), **weights)
    with pytest.raises(ValueError, match="the weights of the file and of PyTorch's model differ"):
        References("cpu").of(case, path)
