"""BERT encoders as ONNX graphs, from weights by Hugging Face's names.

The graph is spelled as PyTorch's exporter spells Hugging Face's ``BertModel``: linear layers as MatMul and Add
with transposed weights, heads by Reshape with sizes read from the input's shape, an additive attention mask,
GELU from Erf. It ends at the last hidden state. Used by ``minilm`` and by the benchmarks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from models.onnx_writer import GraphWriter
from models.weights import TensorSource

VOCABULARY = 30522
POSITIONS = 512
TOKEN_TYPES = 2
LAYER_NORM_EPSILON = 1e-12


@dataclass(frozen=True)
class BertSize:
    """What BERT encoders differ in."""

    layers: int
    hidden: int
    heads: int
    intermediate: int


def build_graph(name: str, size: BertSize, weights: TensorSource) -> onnx.ModelProto:
    """Return the model: ``input_ids``, ``attention_mask``, ``token_type_ids`` int64 [batch, sequence] →
    ``last_hidden_state`` float32 [batch, sequence, hidden]; sequence is at most 512.

    Raises:
        FormatError: a tensor is missing, or of the wrong shape.
    """
    writer = GraphWriter(name)
    encoder = _Encoder(writer, size, weights)
    mask = encoder.additive_mask()
    x = encoder.embeddings()
    for index in range(size.layers):
        x = encoder.layer(x, mask, f"encoder.layer.{index}")
    writer.result(x, "last_hidden_state")
    dims = ("batch", "sequence")
    return writer.model(
        dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (TensorProto.INT64, dims)),
        {"last_hidden_state": (*dims, size.hidden)},
    )


class _Encoder:
    """Adds the parts of the encoder to one graph."""

    def __init__(self, writer: GraphWriter, size: BertSize, weights: TensorSource) -> None:
        self._writer = writer
        self._size = size
        self._weights = weights

    def additive_mask(self) -> str:
        """0 where attended, the lowest float32 where not: [batch, 1, 1, sequence] from the 0/1 input."""
        w = self._writer
        mask = w.node("Unsqueeze", ["attention_mask", w.constant("", np.array([1], np.int64))], "")
        mask = w.node("Unsqueeze", [mask, w.constant("", np.array([2], np.int64))], "")
        mask = w.node("Cast", [mask], "", to=TensorProto.FLOAT)
        mask = w.node("Sub", [w.constant("", np.array(1.0, np.float32)), mask], "")
        return w.node("Mul", [mask, w.constant("", np.array(np.finfo(np.float32).min, np.float32))], "")

    def embeddings(self) -> str:
        """Word, token type and position embeddings, summed and normalised: [batch, sequence, hidden]."""
        w, scope = self._writer, "/embeddings"
        zero, one = (w.constant(scope, np.array([value], np.int64)) for value in (0, 1))
        length = w.node("Unsqueeze", [self._dim("input_ids", 1, scope), zero], scope)
        position_ids = w.weight("embeddings.position_ids", np.arange(POSITIONS, dtype=np.int64)[None])
        positions = w.node("Slice", [position_ids, zero, length, one, one], scope)
        word = self._lookup("word_embeddings", VOCABULARY, "input_ids")
        token_type = self._lookup("token_type_embeddings", TOKEN_TYPES, "token_type_ids")
        total = w.node("Add", [word, token_type], scope)
        total = w.node("Add", [total, self._lookup("position_embeddings", POSITIONS, positions)], scope)
        return self._layer_norm(total, "embeddings.LayerNorm")

    def layer(self, x: str, mask: str, name: str) -> str:
        """One post-norm Transformer layer: self-attention and a GELU feed-forward part, each with a residual."""
        w, hidden_size, intermediate = self._writer, self._size.hidden, self._size.intermediate
        attended = self._attention(x, mask, f"{name}.attention.self")
        attended = self._linear(attended, f"{name}.attention.output.dense", hidden_size, hidden_size)
        attended = w.node("Add", [attended, x], _scope(f"{name}.attention.output"))
        attended = self._layer_norm(attended, f"{name}.attention.output.LayerNorm")
        hidden = self._linear(attended, f"{name}.intermediate.dense", hidden_size, intermediate)
        hidden = self._gelu(hidden, _scope(f"{name}.intermediate.intermediate_act_fn"))
        hidden = self._linear(hidden, f"{name}.output.dense", intermediate, hidden_size)
        hidden = w.node("Add", [hidden, attended], _scope(f"{name}.output"))
        return self._layer_norm(hidden, f"{name}.output.LayerNorm")

    def _attention(self, x: str, mask: str, name: str) -> str:
        """Softmax(Q·Kᵀ / √head_dim + mask)·V for each head; heads are concatenated again."""
        w, scope, hidden = self._writer, _scope(name), self._size.hidden
        query = self._heads(self._linear(x, f"{name}.query", hidden, hidden), scope, (0, 2, 1, 3))
        key = self._heads(self._linear(x, f"{name}.key", hidden, hidden), scope, (0, 2, 3, 1))
        value = self._heads(self._linear(x, f"{name}.value", hidden, hidden), scope, (0, 2, 1, 3))
        scores = w.node("MatMul", [query, key], scope)
        scores = w.node("Div", [scores, w.constant(scope, np.array(math.sqrt(self._head_dim), np.float32))], scope)
        scores = w.node("Add", [scores, mask], scope)
        probabilities = w.node("Softmax", [scores], scope, axis=-1)
        context = w.node("MatMul", [probabilities, value], scope)
        context = w.node("Transpose", [context], scope, perm=[0, 2, 1, 3])
        return self._reshape(context, scope, (hidden,))

    @property
    def _head_dim(self) -> int:
        return self._size.hidden // self._size.heads

    def _heads(self, x: str, scope: str, permutation: tuple[int, ...]) -> str:
        """[batch, sequence, hidden] → [batch, sequence, heads, head_dim], transposed by ``permutation``."""
        return self._writer.node(
            "Transpose", [self._reshape(x, scope, (self._size.heads, self._head_dim))], scope, perm=list(permutation)
        )

    def _reshape(self, x: str, scope: str, tail: tuple[int, ...]) -> str:
        """Keep the first two dims of ``x``, as its shape says at run time, and replace the others by ``tail``."""
        w = self._writer
        zero = w.constant(scope, np.array([0], np.int64))
        kept = [w.node("Unsqueeze", [self._dim(x, axis, scope), zero], scope) for axis in (0, 1)]
        fixed = [w.constant(scope, np.array([size], np.int64)) for size in tail]
        shape = w.node("Concat", [*kept, *fixed], scope, axis=0)
        return w.node("Reshape", [x, shape], scope, allowzero=0)

    def _dim(self, x: str, axis: int, scope: str) -> str:
        w = self._writer
        return w.node(
            "Gather", [w.node("Shape", [x], scope), w.constant(scope, np.array(axis, np.int64))], scope, axis=0
        )

    def _lookup(self, table: str, rows: int, indices: str) -> str:
        name = f"embeddings.{table}.weight"
        weight = self._writer.weight(name, self._weights.take(name, rows, self._size.hidden))
        return self._writer.node("Gather", [weight, indices], f"/embeddings/{table}", axis=0)

    def _linear(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """x·Wᵀ + b; the checkpoint's [outputs, inputs] weight is stored transposed, as the exporter does."""
        w = self._writer
        weight = w.weight(f"{name}.weight_transposed", self._weights.take(f"{name}.weight", outputs, inputs).T)
        bias = w.weight(f"{name}.bias", self._weights.take(f"{name}.bias", outputs))
        return w.node("Add", [bias, w.node("MatMul", [x, weight], _scope(name))], _scope(name))

    def _layer_norm(self, x: str, name: str) -> str:
        fields = (f"{name}.weight", f"{name}.bias")
        parameters = [self._writer.weight(field, self._weights.take(field, self._size.hidden)) for field in fields]
        return self._writer.node(
            "LayerNormalization", [x, *parameters], _scope(name), axis=-1, epsilon=LAYER_NORM_EPSILON
        )

    def _gelu(self, x: str, scope: str) -> str:
        """x·(1 + erf(x/√2))·½, in the exporter's order."""
        w = self._writer
        error = w.node("Erf", [w.node("Div", [x, w.constant(scope, np.array(math.sqrt(2), np.float32))], scope)], scope)
        one_plus = w.node("Add", [error, w.constant(scope, np.array(1.0, np.float32))], scope)
        product = w.node("Mul", [x, one_plus], scope)
        return w.node("Mul", [product, w.constant(scope, np.array(0.5, np.float32))], scope)


def _scope(name: str) -> str:
    return "/" + name.replace(".", "/")
