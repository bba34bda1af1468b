"""The default models give the known answers, run by ONNX Runtime with preprocessing written for this test alone."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tokenizers
from PIL import Image

CAT_CLASSES = {"tabby, tabby cat", "tiger cat", "Persian cat", "Siamese cat, Siamese", "Egyptian cat"}


@pytest.fixture(scope="module")
def classifier(efficientnet_lite0: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(efficientnet_lite0 / "1/model.onnx", providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def encoder(all_minilm_l6_v2: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(all_minilm_l6_v2 / "1/model.onnx", providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def predictions(
    classifier: onnxruntime.InferenceSession, efficientnet_lite0: Path, photos: Mapping[str, Path]
) -> dict[str, tuple[str, float]]:
    """The first label of each photo and its probability, all photos in one batch."""
    labels = (efficientnet_lite0 / "labels.txt").read_text().splitlines()
    batch = np.stack([_pixels(path) for path in photos.values()])
    (logits,) = classifier.run(["logits"], {"input": batch})
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    return {
        name: (labels[int(row.argmax())], float(row.max())) for name, row in zip(photos, probabilities, strict=True)
    }


def _pixels(path: Path) -> np.ndarray:
    """TensorFlow's evaluation preprocessing: the central 87.5 %, resized to 224×224, (RGB − 127) / 128."""
    image = Image.open(path).convert("RGB")
    side = int(min(image.size) * 224 / 256)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
    return ((np.asarray(image, np.float32) - 127) / 128).transpose(2, 0, 1)


def test_chelsea_is_a_cat(predictions: dict[str, tuple[str, float]]) -> None:
    assert predictions["chelsea"][0] in CAT_CLASSES


@pytest.mark.parametrize(("photo", "label"), [("coffee", "espresso"), ("camera", "tripod")])
def test_photo_is_recognised_with_high_probability(
    predictions: dict[str, tuple[str, float]], photo: str, label: str
) -> None:
    assert predictions[photo][0] == label
    assert predictions[photo][1] > 0.9


def test_motorcycle_is_a_moped(predictions: dict[str, tuple[str, float]]) -> None:
    assert predictions["motorcycle"][0] == "moped"


def test_settings_describe_the_preprocessing(efficientnet_lite0: Path) -> None:
    settings = tomllib.loads((efficientnet_lite0 / "model.toml").read_text())
    assert settings["task"] == "image-classification"
    images = settings["images"]
    assert images["size"] / images["resize"] == 0.875
    assert (images["mean"], images["std"]) == ([127.0] * 3, [128.0] * 3)
    assert (images["interpolation"], images["layout"]) == ("bicubic", "NCHW")


def test_efficientnet_graph_is_as_an_exporter_leaves_it(efficientnet_lite0: Path) -> None:
    model = onnx.load(efficientnet_lite0 / "1/model.onnx")
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("Conv") == operators.count("BatchNormalization") == 49
    assert operators.count("Add") == 9
    assert operators[-3:] == ["GlobalAveragePool", "Flatten", "Gemm"]
    assert [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        3,
        224,
        224,
    ]


def _embed(encoder: onnxruntime.InferenceSession, folder: Path, sentences: list[str]) -> np.ndarray:
    """Mean over the attended tokens, scaled to unit length: [sentences, 384]."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(sentences)
    mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
    feeds = {
        "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(mask),
    }
    (states,) = encoder.run(["last_hidden_state"], feeds)
    means = (states * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def test_similar_sentences_are_near_and_unrelated_ones_far(
    encoder: onnxruntime.InferenceSession, all_minilm_l6_v2: Path
) -> None:
    sentences = ["A man is eating food.", "A man is eating a piece of bread.", "The stock market fell sharply."]
    eating, bread, market = _embed(encoder, all_minilm_l6_v2, sentences)
    assert eating @ bread == pytest.approx(0.755, abs=0.005)
    assert eating @ market < 0.1


def test_padding_does_not_change_an_embedding(encoder: onnxruntime.InferenceSession, all_minilm_l6_v2: Path) -> None:
    short, long = "A man is eating food.", "word " * 200
    alone = _embed(encoder, all_minilm_l6_v2, [short])
    padded = _embed(encoder, all_minilm_l6_v2, [short, long])[:1]
    np.testing.assert_allclose(padded, alone, atol=1e-6)


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (3, 7), (2, 512)])
def test_encoder_takes_any_batch_and_sequence(encoder: onnxruntime.InferenceSession, batch: int, sequence: int) -> None:
    ids = np.random.default_rng(0).integers(0, 30522, (batch, sequence))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    (states,) = encoder.run(None, feeds)
    assert states.shape == (batch, sequence, 384)
    assert np.isfinite(states).all()
