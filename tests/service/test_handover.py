"""What a front end tells one to come of the models that it serves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import orjson
import pytest

from service.handover import HandedOver, describe, hand_over
from service.metrics import Metrics
from service.model import ModelState, ServedModel
from service.repository import Repository
from service.workers.messages import BatchingOptions, ModelKey
from tests.service.conftest import add_model, add_tokenizer


def served(root: Path, version: int, state: ModelState = ModelState.READY, reason: str = "") -> ServedModel:
    folder = Repository(root).find("encoder")
    assert folder is not None
    key = ModelKey("encoder", version, 7 + version)
    return ServedModel(key, folder, BatchingOptions(), Metrics().model(key), state=state, reason=reason)


def through(*models: ServedModel) -> list[HandedOver]:
    documents: Any = orjson.loads(orjson.dumps([describe(model) for model in models]))
    return hand_over(documents)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    toml = '[tokens]\nmax_length = 16\npooling = "cls"\n[batching]\nbuckets = [4, 8]\n[images]\nsize = [3, 4]\n'
    folder = add_model(tmp_path, "encoder", "encoder", toml)
    (folder / "labels.txt").write_text("rot\ngrün\n")
    add_tokenizer(folder)
    (folder / "2").mkdir()
    return tmp_path


def test_folders_arrive_as_they_were_read(root: Path) -> None:
    one, two = served(root, 1), served(root, 2, ModelState.UNAVAILABLE, "it has no model.onnx")
    (root / "encoder" / "model.toml").write_text("[tokens]\nmax_length = 3\n")
    (root / "encoder" / "labels.txt").unlink()
    first, second = through(one, two)
    assert (first.key, first.reason) == (one.key, "")
    assert (second.key, second.reason) == (two.key, "it has no model.onnx")
    for attribute in ("name", "path", "config", "versions", "labels", "tokenizer", "tokenizer_mark"):
        assert getattr(first.folder, attribute) == getattr(one.folder, attribute)
    assert first.folder.config.model_fields_set == one.folder.config.model_fields_set
    assert first.folder.labels == ("rot", "grün")


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_model_whose_tokenizer_is_gone_is_not_handed_over(
    root: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    """Nor in part: one version with the tokenizer of another one would be neither what is there nor what was."""
    one, tokenizer = served(root, 1), root / "encoder" / "tokenizer.json"
    if change == "replaced":
        content = tokenizer.read_bytes()
        tokenizer.write_bytes(content + b"\n")
    else:
        tokenizer.unlink()
    with caplog.at_level(logging.ERROR):
        assert through(one, served(root, 2)) == []
    assert "model encoder is served with a tokenizer that is gone" in caplog.text
