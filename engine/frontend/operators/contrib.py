"""Operators of the com.microsoft domain that ONNX Runtime's optimizer and common exporters write."""

from __future__ import annotations

import math
from collections.abc import Callable

from engine.frontend import formula as f
from engine.frontend.onnx_node import OnnxNode, source, store
from engine.frontend.operators.activation import gelu_exact, gelu_tanh
from engine.frontend.operators.attention import Scores, attend, join_heads, mask_bias, split_heads
from engine.frontend.operators.indexing import Gather
from engine.frontend.operators.linalg import Gemm, MatMul
from engine.frontend.operators.normalization import layer_statistics, normalize
from engine.frontend.operators.shape import positions
from engine.frontend.operators.slicing import split_at
from engine.frontend.registry import MICROSOFT, operator
from engine.ir import ops
from engine.ir.dim import Dim, floordiv
from engine.ir.dtype import DType
from engine.ir.graph import Value


@operator("BiasGelu", domain=MICROSOFT)
def BiasGelu(node: OnnxNode, x: Value, bias: Value) -> Value:
    return node.float_pointwise(lambda t, b: gelu_exact(t + b), x, bias)


@operator("FastGelu", domain=MICROSOFT)
def FastGelu(node: OnnxNode, x: Value, bias: Value | None = None) -> Value:
    if bias is None:
        return node.float_pointwise(gelu_tanh, x)
    return node.float_pointwise(lambda t, b: gelu_tanh(t + b), x, bias)


@operator("QuickGelu", domain=MICROSOFT)
def QuickGelu(node: OnnxNode, x: Value) -> Value:
    alpha = node.number("alpha", 1.702)
    return node.float_pointwise(lambda t: t * f.sigmoid(t * alpha), x)


@operator("SkipLayerNormalization", domain=MICROSOFT)
def SkipLayerNormalization(
    node: OnnxNode, x: Value, skip: Value, scale: Value, beta: Value | None = None, bias: Value | None = None
) -> list[Value | None]:
    return _skip_norm(node, ops.NormKind.LAYER, x, skip, scale, beta, bias)


@operator("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def SkipSimplifiedLayerNormalization(
    node: OnnxNode, x: Value, skip: Value, scale: Value, bias: Value | None = None
) -> list[Value | None]:
    return _skip_norm(node, ops.NormKind.RMS, x, skip, scale, None, bias)


def _skip_norm(
    node: OnnxNode, kind: ops.NormKind, x: Value, skip: Value, scale: Value, beta: Value | None, bias: Value | None
) -> list[Value | None]:
    total = node.pointwise(lambda a, b: a + b, x, skip)
    if bias is not None:
        total = node.pointwise(lambda a, b: a + b, total, bias)
    epsilon, axes = node.number("epsilon", 1e-12), (x.rank - 1,)
    mean: Value | None = None
    deviation: Value | None = None
    if any(node.outputs[1:3]):
        mean, deviation = layer_statistics(node, total, axes, epsilon)
    return [normalize(node, kind, axes, epsilon, total, scale, beta), mean, deviation, total]


@operator("EmbedLayerNormalization", domain=MICROSOFT)
def EmbedLayerNormalization(
    node: OnnxNode,
    words: Value,
    segments: Value | None,
    word_table: Value,
    position_table: Value,
    segment_table: Value | None,
    scale: Value,
    beta: Value,
    mask: Value | None = None,
    position_ids: Value | None = None,
) -> list[Value | None]:
    if position_ids is not None:
        placed = Gather(node, position_table, position_ids)
    else:
        (placed, *_) = split_at(node, position_table, 0, [words.shape[1], position_table.shape[0] - words.shape[1]])
    total = node.pointwise(lambda a, b: a + b, Gather(node, word_table, words), placed)
    if segments is not None and segment_table is not None:
        total = node.pointwise(lambda a, b: a + b, total, Gather(node, segment_table, segments))
    result = normalize(node, ops.NormKind.LAYER, (2,), node.number("epsilon", 1e-12), total, scale, beta)
    if len(node.outputs) > 1 and node.outputs[1]:
        if mask is None:
            lengths = node.expand(node.constant([0], DType.I32), (words.shape[0],))
        else:
            count = ops.Reduce(ops.ReduceKind.SUM, (1,), False, source(mask.dtype), store(mask.dtype))
            lengths = node.cast(node.add(count, mask), DType.I32)
        return [result, lengths, total]
    return [result, None, total]


@operator("FusedGemm", domain=MICROSOFT)
def FusedGemm(node: OnnxNode, a: Value, b: Value, c: Value | None = None) -> Value:
    result = Gemm(node, a, b, c)
    name = node.text("activation", "")
    formulas: dict[str, Callable[[f.Term], f.Term] | None] = {
        "": None,
        "Relu": lambda t: f.maximum(t, 0),
        "Tanh": f.tanh,
        "Sigmoid": f.sigmoid,
    }
    if name not in formulas:
        raise node.unsupported(f"activation {name!r}")
    formula = formulas[name]
    return result if formula is None else node.float_pointwise(formula, result)


@operator("Attention", domain=MICROSOFT)
def Attention(node: OnnxNode, x: Value, weight: Value, bias: Value | None = None, mask: Value | None = None) -> Value:
    """The input times a packed [q, k, v] weight, then attention; the form of ONNX Runtime's BERT optimizer."""
    heads = node.integer("num_heads")
    product = MatMul(node, x, weight)
    if bias is not None:
        product = node.pointwise(lambda a, b: a + b, product, bias)
    width = weight.shape[1]
    parts: list[Dim] = list(node.integers("qkv_hidden_sizes", ()))
    parts = parts or [floordiv(width, 3)] * 3
    q, k, v = (split_heads(node, part, heads) for part in split_at(node, product, 2, parts))
    scores = _scores(node, q, k, mask, bool(node.integer("unidirectional", 0)))
    return join_heads(node, attend(node, q, k, v, scores))


@operator("MultiHeadAttention", domain=MICROSOFT)
def MultiHeadAttention(
    node: OnnxNode,
    q: Value,
    k: Value,
    v: Value,
    bias: Value | None = None,
    mask: Value | None = None,
    scores_bias: Value | None = None,
) -> Value:
    heads = node.integer("num_heads")
    if not q.rank == k.rank == v.rank == 3:
        raise node.unsupported("packed or cached keys and values")
    if bias is not None:
        parts = split_at(node, bias, 0, [q.shape[2], k.shape[2], v.shape[2]])
        q, k, v = (node.pointwise(lambda a, b: a + b, x, p) for x, p in zip((q, k, v), parts, strict=True))
    q, k, v = (split_heads(node, x, heads) for x in (q, k, v))
    scores = _scores(node, q, k, mask, bool(node.integer("unidirectional", 0)))
    if scores_bias is not None:
        both = scores_bias
        if scores.bias is not None:
            both = node.pointwise(lambda a, b: a + b, scores_bias, scores.bias)
        scores = Scores(scores.scale, 0.0, both, scores.causal, False)
    return join_heads(node, attend(node, q, k, v, scores))


def _scores(node: OnnxNode, q: Value, k: Value, mask: Value | None, causal: bool) -> Scores:
    """Scale and bias from a mask in one of ONNX Runtime's forms, which hides keys by a finite number."""
    width = q.shape[3]
    if not isinstance(width, int):
        raise node.unsupported(f"a head of unknown width ({width})")
    scale = node.number("scale", 0.0) or 1 / math.sqrt(width)
    if mask is None:
        return Scores(scale, 0.0, None, causal, False)
    hidden = node.number("mask_filter_value", -10000.0)
    seen = _seen(node, q, k.shape[2], mask)
    zero = node.constant(0.0, q.dtype)
    bias = node.pointwise(lambda s, z: f.where(s, z, z.like(hidden)), seen, zero)
    return Scores(scale, 0.0, mask_bias(node, bias, q.dtype), causal, False)


def _seen(node: OnnxNode, q: Value, keys: Dim, mask: Value) -> Value:
    """Which keys a mask shows, as bool [batch, 1, queries or 1, keys]. It is 1 for those in [batch, keys] or [batch,
    queries, keys], or has the end of each sequence, [batch], or first all ends and then all starts, [2 · batch]."""
    batch = q.shape[0]
    if mask.rank in (2, 3):
        queries = 1 if mask.rank == 2 else mask.shape[1]
        shape = (mask.shape[0], 1, queries, mask.shape[-1])
        return node.pointwise(lambda m: f.logical_not(f.less(m, 1)), node.reshape(mask, shape))
    if mask.rank != 1 or mask.shape[0] not in (batch, batch * 2):
        raise node.unsupported(f"a mask of the shape {list(mask.shape)}")
    bounds = [mask] if mask.shape[0] == batch else split_at(node, mask, 0, [batch, batch])
    ends, *starts = (node.reshape(node.cast(bound, DType.I64), (batch, 1, 1, 1)) for bound in bounds)
    places = positions(node, keys, 3, 4)
    seen = node.pointwise(lambda j, end: f.less(j, end), places, ends)
    for start in starts:
        seen = node.pointwise(lambda s, j, first: f.logical_and(s, f.less_equal(first, j)), seen, places, start)
    return seen
