"""ONNX Runtime behind the peers: the same model files and the same steps before and after as ours has, in a batch.

Imported by the servers beside it, inside the peers' own environment: it knows nothing of this project's packages.
"""

import io
import os
import tomllib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tokenizers
from PIL import Image


def _session(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("PEER_THREADS", os.cpu_count() or 1))
    return onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"), options, providers=["CPUExecutionProvider"])


class Images:
    """JPEG files to the label of the most probable class."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config: dict[str, Any] = tomllib.loads((folder / "model.toml").read_text())["images"]
        self._labels = (folder / "labels.txt").read_text().splitlines()

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        return _session(self._folder)  # not in a process that only decodes

    def read(self, data: bytes) -> np.ndarray:
        """(3, size, size)."""
        config = self._config
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = config["resize"] / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        size = config["size"]
        left, top = (image.width - size) // 2, (image.height - size) // 2
        pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32)
        mean, std = np.array(config["mean"], np.float32), np.array(config["std"], np.float32)
        return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))

    def run(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """The label of each."""
        (scores,) = self._session.run(None, {self._session.get_inputs()[0].name: np.stack(pictures)})
        return [self._labels[i] for i in scores.reshape(len(pictures), -1).argmax(axis=1)]


class Texts:
    """Sentences to unit vectors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        config = tomllib.loads((folder / "model.toml").read_text())["tokens"]
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(config["max_length"])
        self._tokenizer.no_padding()

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        return _session(self._folder)

    def read(self, text: str) -> list[int]:
        """Token ids."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def run(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """The vector of each."""
        width = max(map(len, rows))
        ids, mask = (np.zeros((len(rows), width), np.int64) for _ in range(2))
        for position, row in enumerate(rows):
            ids[position, : len(row)], mask[position, : len(row)] = row, 1
        values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = self._session.run(None, {spec.name: values[spec.name] for spec in self._session.get_inputs()})[0]
        weights = mask[:, :, None].astype(np.float32)
        pooled = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
        vectors: list[list[float]] = (pooled / np.linalg.norm(pooled, axis=1, keepdims=True)).tolist()
        return vectors
