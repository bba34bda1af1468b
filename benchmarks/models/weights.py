"""Random weights by name and shape. A draw depends on the seed, the name and the shape, not on the order of drawing."""

from __future__ import annotations

import hashlib
from math import prod, sqrt

import numpy as np

from models.weights import FloatArray

# Stored [inputs, outputs] where others are [outputs, inputs]: the linear layers of Hugging Face's GPT-2.
_INPUTS_FIRST = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_TABLES = ("embeddings.weight", "wte.weight", "wpe.weight", "class_token", "pos_embedding")


class RandomWeights:
    """A source of weights for a builder; remembers what it gave in `tensors`.

    Products keep the size of what they multiply: their weights have variance 1 / inputs. Scales of norms lie in
    [0.8, 1.2], shifts and biases have a standard deviation of 0.1, tables of embeddings one of 1.
    """

    def __init__(self, seed: int = 0, given: dict[str, FloatArray] | None = None) -> None:
        self._seed = seed
        self._given = given or {}
        self.tensors: dict[str, FloatArray] = {}

    def take(self, name: str, *shape: int, factor: float = 1.0, offset: float = 0.0) -> FloatArray:
        """float32 tensor `name` of `shape`, the same every time; `factor` times what is drawn, plus `offset`."""
        if name not in self.tensors:
            drawn = self._given[name] if name in self._given else self._drawn(name, shape)
            self.tensors[name] = np.float32(factor) * drawn + np.float32(offset)
        tensor = self.tensors[name]
        assert tensor.shape == shape, f"{name} was {tensor.shape} before, is {shape} now"
        return tensor

    def _drawn(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        digest = hashlib.sha256(f"{self._seed} {name} {shape}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        if name.endswith(_TABLES):
            return rng.standard_normal(shape, np.float32)
        if len(shape) == 1 and name.endswith("weight"):
            return rng.uniform(0.8, 1.2, shape).astype(np.float32)
        if len(shape) == 1:
            return 0.1 * rng.standard_normal(shape, np.float32)
        inputs = shape[0] if name.endswith(_INPUTS_FIRST) else prod(shape[1:])
        return np.float32(1 / sqrt(inputs)) * rng.standard_normal(shape, np.float32)
