"""BERT on PyTorch's jagged nested tensors, the way PyTorch has for batches without padding. Needs PyTorch.

Written as PyTorch's tutorial on Transformers with nested tensors writes its own: linear layers and normalisations on
the nested tensor, one product for q, k and v, SDPA on nested heads. Weights are those of the padded twin. Nothing is
padded anywhere: token ids, positions and types come nested, and the result stays nested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

Jagged = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Token ids, token types and positions, each a nested tensor [batch, (length)] int64 with the same offsets."""


@dataclass(frozen=True)
class _Layer:
    """Weights of one encoder layer; q, k and v are one product."""

    projection: tuple[torch.Tensor, torch.Tensor]
    attention_out: tuple[torch.Tensor, torch.Tensor]
    attention_norm: tuple[torch.Tensor, torch.Tensor]
    up: tuple[torch.Tensor, torch.Tensor]
    down: tuple[torch.Tensor, torch.Tensor]
    norm: tuple[torch.Tensor, torch.Tensor]


class JaggedBert:
    """transformers' `BertModel` without a pooling layer, on jagged nested tensors."""

    def __init__(self, module: torch.nn.Module) -> None:
        """`module`: the padded twin, whose weights are taken as they are."""
        weights = dict(module.state_dict())
        config = module.config
        self._heads = int(config.num_attention_heads)
        self._epsilon = float(config.layer_norm_eps)
        tables = ("word_embeddings", "token_type_embeddings", "position_embeddings")
        self._tables = tuple(weights[f"embeddings.{table}.weight"] for table in tables)
        self._norm = _pair(weights, "embeddings.LayerNorm")
        self._layers = [_layer(weights, f"encoder.layer.{i}") for i in range(int(config.num_hidden_layers))]

    def __call__(self, ids: torch.Tensor, types: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The last hidden state, nested [batch, (length), hidden]."""
        words, kinds, places = (
            F.embedding(by, table) for by, table in zip((ids, types, positions), self._tables, strict=True)
        )
        x = self._normed(words + kinds + places, self._norm)
        for layer in self._layers:
            x = self._normed(x + F.linear(self._attended(x, layer), *layer.attention_out), layer.attention_norm)
            x = self._normed(x + F.linear(F.gelu(F.linear(x, *layer.up)), *layer.down), layer.norm)
        return x

    def _normed(self, x: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), *pair, self._epsilon)

    def _attended(self, x: torch.Tensor, layer: _Layer) -> torch.Tensor:
        parts = F.linear(x, *layer.projection).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, [self._heads, -1]).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def jagged(feeds: Mapping[str, np.ndarray], device: str = "cuda") -> Jagged:
    """The arguments of a `JaggedBert` for padded feeds, their padding left out. The longest length is said with them:
    looking it up would wait for the device in every attention."""
    mask = feeds["attention_mask"]
    real, lengths = mask.astype(bool), mask.sum(1)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(device)
    positions = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    ids, types, places = (
        torch.nested.nested_tensor_from_jagged(
            torch.from_numpy(array[real]).to(device),
            offsets,
            min_seqlen=int(lengths.min()),
            max_seqlen=int(lengths.max()),
        )
        for array in (feeds["input_ids"], feeds["token_type_ids"], positions)
    )
    return ids, types, places


def without_waiting(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run what shall be captured in a graph. Raises RuntimeError where it waits for the device, which would break off
    the capture and leave the memory pool of the graph behind."""
    call()  # what is done once is done
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _pair(weights: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _layer(weights: Mapping[str, torch.Tensor], name: str) -> _Layer:
    parts = [_pair(weights, f"{name}.attention.self.{part}") for part in ("query", "key", "value")]
    projection = torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])
    return _Layer(
        projection,
        _pair(weights, f"{name}.attention.output.dense"),
        _pair(weights, f"{name}.attention.output.LayerNorm"),
        _pair(weights, f"{name}.intermediate.dense"),
        _pair(weights, f"{name}.output.dense"),
        _pair(weights, f"{name}.output.LayerNorm"),
    )
