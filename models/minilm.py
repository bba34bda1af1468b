"""all-MiniLM-L6-v2, a BERT encoder, as an ONNX graph from a safetensors checkpoint. Called through ``catalog``.

It ends at the last hidden state; the service pools and normalises as ``model.toml`` says.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx

from models import bert
from models.weights import Weights

SIZE = bert.BertSize(layers=6, hidden=384, heads=12, intermediate=1536)


def build_graph(tensors: dict[str, npt.NDArray[Any]]) -> onnx.ModelProto:
    """Return the model: ``input_ids``, ``attention_mask``, ``token_type_ids`` int64 [batch, sequence] →
    ``last_hidden_state`` float32 [batch, sequence, 384]; sequence is at most 512.

    Raises:
        FormatError: a tensor is missing, unknown, or of the wrong shape.
    """
    weights = Weights(tensors)
    model = bert.build_graph("all-minilm-l6-v2", SIZE, weights)
    weights.expect_left("position_ids", "pooler.dense.weight", "pooler.dense.bias")
    return model
