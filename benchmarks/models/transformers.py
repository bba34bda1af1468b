"""ViT-B/16 as torchvision has it and GPT-2 as transformers has it; BERT is `models.bert`.

Papers: Dosovitskiy et al. 2020; Radford et al. 2019.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import onnx
from onnx import TensorProto

from models.onnx_writer import GraphWriter
from models.weights import TensorSource

HIDDEN, HEADS, LAYERS, INTERMEDIATE = 768, 12, 12, 3072
HEAD_DIM = HIDDEN // HEADS
IMAGE_SIZE, PATCH, CLASSES = 224, 16, 1000
VOCABULARY, POSITIONS = 50257, 1024


class _Blocks:
    """Pre-norm Transformer blocks in one graph."""

    def __init__(self, writer: GraphWriter, weights: TensorSource, epsilon: float) -> None:
        self.writer = writer
        self.weights = weights
        self.epsilon = epsilon

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        return self.writer.node(op, list(inputs), "", **attributes)

    def weight(self, name: str, *shape: int) -> str:
        return self.writer.weight(name, self.weights.take(name, *shape))

    def floats(self, value: float) -> str:
        return self.writer.constant("", np.array(value, np.float32))

    def ints(self, *values: int) -> str:
        return self.writer.constant("", np.array(values, np.int64))

    def layer_norm(self, x: str, name: str) -> str:
        scale, shift = (self.weight(f"{name}.{field}", HIDDEN) for field in ("weight", "bias"))
        return self.node("LayerNormalization", x, scale, shift, axis=-1, epsilon=self.epsilon)

    def linear(self, x: str, name: str, inputs: int, outputs: int, inputs_first: bool = False) -> str:
        """MatMul and Add, the weight stored as [inputs, outputs]."""
        shape = (inputs, outputs) if inputs_first else (outputs, inputs)
        weight = self.weights.take(f"{name}weight", *shape)
        stored = self.writer.weight(f"{name}weight.matmul", weight if inputs_first else weight.T)
        return self.node("Add", self.node("MatMul", x, stored), self.weight(f"{name}bias", outputs))

    def attend(self, q: str, k: str, v: str, mask: tuple[str, str] | None = None) -> str:
        """softmax(q kᵀ / √d) v of [n, heads, s, d]; `mask`: (where True, else) for the scores."""
        scores = self.node("MatMul", q, self.node("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.node("Div", scores, self.floats(sqrt(HEAD_DIM)))
        if mask is not None:
            scores = self.node("Where", mask[0], scores, mask[1])
        context = self.node("MatMul", self.node("Softmax", scores, axis=-1), v)
        return self.node("Reshape", self.node("Transpose", context, perm=[0, 2, 1, 3]), self.ints(0, 0, HIDDEN))


def vit_b_16(weights: TensorSource) -> onnx.ModelProto:
    """``input`` float32 [batch, 3, 224, 224] → ``logits`` float32 [batch, 1000]."""
    writer = GraphWriter("vit_b_16")
    b = _Blocks(writer, weights, 1e-6)
    kernel, bias = b.weight("conv_proj.weight", HIDDEN, 3, PATCH, PATCH), b.weight("conv_proj.bias", HIDDEN)
    x = b.node("Conv", "input", kernel, bias, kernel_shape=[PATCH] * 2, strides=[PATCH] * 2, pads=[0] * 4)
    patches = (IMAGE_SIZE // PATCH) ** 2
    x = b.node("Transpose", b.node("Reshape", x, b.ints(0, HIDDEN, patches)), perm=[0, 2, 1])
    batch = b.node("Slice", b.node("Shape", x), b.ints(0), b.ints(1), b.ints(0))
    token_shape = b.node("Concat", batch, b.ints(1), b.ints(HIDDEN), axis=0)
    x = b.node("Concat", b.node("Expand", b.weight("class_token", 1, 1, HIDDEN), token_shape), x, axis=1)
    x = b.node("Add", x, b.weight("encoder.pos_embedding", 1, patches + 1, HIDDEN))
    for index in range(LAYERS):
        name = f"encoder.layers.encoder_layer_{index}"
        joined = b.linear(b.layer_norm(x, f"{name}.ln_1"), f"{name}.self_attention.in_proj_", HIDDEN, 3 * HIDDEN)
        joined = b.node("Reshape", joined, b.ints(0, 0, 3, HEADS, HEAD_DIM))
        joined = b.node("Transpose", joined, perm=[2, 0, 3, 1, 4])
        q, k, v = (b.node("Gather", joined, writer.constant("", np.array(i, np.int64)), axis=0) for i in range(3))
        attended = b.linear(b.attend(q, k, v), f"{name}.self_attention.out_proj.", HIDDEN, HIDDEN)
        x = b.node("Add", attended, x)
        hidden = b.linear(b.layer_norm(x, f"{name}.ln_2"), f"{name}.mlp.0.", HIDDEN, INTERMEDIATE)
        error = b.node("Erf", b.node("Div", hidden, b.floats(sqrt(2))))
        hidden = b.node("Mul", b.node("Mul", hidden, b.node("Add", error, b.floats(1.0))), b.floats(0.5))
        x = b.node("Add", x, b.linear(hidden, f"{name}.mlp.3.", INTERMEDIATE, HIDDEN))
    x = b.node("Gather", b.layer_norm(x, "encoder.ln"), writer.constant("", np.array(0, np.int64)), axis=1)
    head, bias = b.weight("heads.head.weight", CLASSES, HIDDEN), b.weight("heads.head.bias", CLASSES)
    writer.result(b.node("Gemm", x, head, bias, alpha=1.0, beta=1.0, transB=1), "logits")
    inputs = {"input": (TensorProto.FLOAT, ("batch", 3, IMAGE_SIZE, IMAGE_SIZE))}
    return writer.model(inputs, {"logits": ("batch", CLASSES)})


def gpt2(weights: TensorSource) -> onnx.ModelProto:
    """``input_ids`` int64 [batch, sequence] → ``last_hidden_state`` float32 [batch, sequence, 768]; at most 1,024
    tokens. One forward pass over the whole sequence, without a cache of keys and values."""
    writer = GraphWriter("gpt2")
    b = _Blocks(writer, weights, 1e-5)
    length = b.node("Slice", b.node("Shape", "input_ids"), b.ints(1), b.ints(2), b.ints(0))
    every = writer.weight("positions", np.arange(POSITIONS, dtype=np.int64)[None])
    positions = b.node("Slice", every, b.ints(0), length, b.ints(1), b.ints(1))
    words = b.node("Gather", b.weight("wte.weight", VOCABULARY, HIDDEN), "input_ids")
    x = b.node("Add", words, b.node("Gather", b.weight("wpe.weight", POSITIONS, HIDDEN), positions))
    triangle = writer.weight("causal", np.tril(np.ones((1, 1, POSITIONS, POSITIONS), np.bool_)))
    ends = b.node("Concat", length, length, axis=0)
    visible = b.node("Slice", triangle, b.ints(0, 0), ends, b.ints(2, 3), b.ints(1, 1))
    lowest = b.floats(float(np.finfo(np.float32).min))
    for index in range(LAYERS):
        name = f"h.{index}"
        joined = b.linear(b.layer_norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn.", HIDDEN, 3 * HIDDEN, True)
        split = writer.nodes("Split", [joined, b.ints(HIDDEN, HIDDEN, HIDDEN)], "", 3, axis=2)
        q, k, v = (
            b.node("Transpose", b.node("Reshape", part, b.ints(0, 0, HEADS, HEAD_DIM)), perm=[0, 2, 1, 3])
            for part in split
        )
        attended = b.linear(b.attend(q, k, v, (visible, lowest)), f"{name}.attn.c_proj.", HIDDEN, HIDDEN, True)
        x = b.node("Add", attended, x)
        hidden = b.linear(b.layer_norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc.", HIDDEN, INTERMEDIATE, True)
        hidden = b.linear(_gelu_new(b, hidden), f"{name}.mlp.c_proj.", INTERMEDIATE, HIDDEN, True)
        x = b.node("Add", x, hidden)
    writer.result(b.layer_norm(x, "ln_f"), "last_hidden_state")
    dims = ("batch", "sequence")
    return writer.model({"input_ids": (TensorProto.INT64, dims)}, {"last_hidden_state": (*dims, HIDDEN)})


def _gelu_new(b: _Blocks, x: str) -> str:
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³))), as transformers writes it."""
    cubic = b.node("Mul", b.node("Pow", x, b.floats(3.0)), b.floats(0.044715))
    inner = b.node("Mul", b.node("Add", x, cubic), b.floats(sqrt(2 / np.pi)))
    outer = b.node("Add", b.node("Tanh", inner), b.floats(1.0))
    return b.node("Mul", b.node("Mul", x, b.floats(0.5)), outer)
