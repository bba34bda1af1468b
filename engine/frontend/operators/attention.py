"""ONNX's Attention operator and rotary position embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.frontend import formula as f
from engine.frontend.formula import Term
from engine.frontend.onnx_node import OnnxNode, source, store
from engine.frontend.operators.linalg import matmul, swap_last
from engine.frontend.operators.shape import positions
from engine.frontend.operators.slicing import concat, take
from engine.frontend.registry import operator
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import Dim, floordiv
from engine.ir.dtype import DType
from engine.ir.graph import Value

_RAW, _CAPPED, _BIASED, _WEIGHTS = range(4)  # qk_matmul_output_mode


@dataclass(frozen=True)
class Scores:
    """What happens to the scores before the softmax."""

    scale: float
    softcap: float
    bias: Value | None
    causal: bool
    zero_masked_rows: bool = True


def split_heads(node: OnnxNode, x: Value, heads: int) -> Value:
    """[batch, s, heads·d] → [batch, heads, s, d]."""
    if heads < 1:
        raise node.invalid(f"{heads} heads")
    width = floordiv(x.shape[2], heads)
    if width * heads != x.shape[2]:
        raise node.invalid(f"{x.shape[2]} features for {heads} heads")
    return node.transpose(node.reshape(x, (x.shape[0], x.shape[1], heads, width)), (0, 2, 1, 3))


def join_heads(node: OnnxNode, x: Value) -> Value:
    """[batch, heads, s, d] → [batch, s, heads·d]."""
    n, heads, s, width = x.shape
    return node.reshape(node.transpose(x, (0, 2, 1, 3)), (n, s, heads * width))


def attend(node: OnnxNode, q: Value, k: Value, v: Value, scores: Scores) -> Value:
    """The fused `Attention` of [batch, heads, s, d] operands; scores with a soft cap are computed in parts."""
    if scores.softcap:
        return _in_parts(node, q, k, v, scores)[0]
    op = ops.Attention(scores.scale, scores.causal, scores.bias is not None, scores.zero_masked_rows, store(q.dtype))
    return node.add(op, q, k, v, *([scores.bias] if scores.bias is not None else []))


def _in_parts(node: OnnxNode, q: Value, k: Value, v: Value, scores: Scores) -> tuple[Value, list[Value]]:
    """The result, and the scores as they stand after the product, the cap, the bias and the softmax."""
    k, v = (_repeat_heads(node, x, q.shape[1]) for x in (k, v))
    raw = matmul(node, q, swap_last(node, k), scores.scale)
    capped = raw
    if scores.softcap:
        cap = scores.softcap
        capped = node.float_pointwise(lambda s: f.tanh(s / cap) * cap, raw)
    bias = scores.bias
    if scores.causal:
        bias = add_bias(node, bias, causal_bias(node, q, k.shape[2], None))
    biased = node.pointwise(lambda s, b: s + b, capped, bias) if bias is not None else capped
    weights = node.add(ops.Softmax(3, False, source(q.dtype), store(q.dtype)), biased)
    if bias is not None and scores.zero_masked_rows:
        highest = node.add(ops.Reduce(ops.ReduceKind.MAX, (3,), True, source(bias.dtype), store(bias.dtype)), bias)
        weights = node.pointwise(lambda w, m: f.where(f.equal(m, -math.inf), w.like(0.0), w), weights, highest)
    return matmul(node, weights, v), [raw, capped, biased, weights]


def _repeat_heads(node: OnnxNode, x: Value, heads: Dim) -> Value:
    """Every key/value head repeated for the query heads that share it."""
    n, own, s, width = x.shape
    if own == heads:
        return x
    times = floordiv(heads, own)
    apart = node.reshape(x, (n, own, 1, s, width))
    return node.reshape(node.expand(apart, (n, own, times, s, width)), (n, heads, s, width))


def mask_bias(node: OnnxNode, mask: Value, dtype: DType) -> Value:
    """A mask as something to add to the scores: 0 where a boolean mask is true, -inf elsewhere."""
    if mask.dtype is DType.BOOL:
        mask = node.pointwise(lambda m: f.where(m, Term(ex.const(0.0, dtype)), -math.inf), mask)
    return node.reshape(mask, ((1,) * (4 - mask.rank) + mask.shape)[-4:])


def add_bias(node: OnnxNode, a: Value | None, b: Value) -> Value:
    return b if a is None else node.pointwise(lambda x, y: x + y, a, b)


def causal_bias(node: OnnxNode, q: Value, keys: Dim, offset: Value | None, left: int = -1, right: int = 0) -> Value:
    """-inf for keys that query i at position i + offset must not see: outside [position - left, position + right]."""
    rows, columns = positions(node, q.shape[2], 2, 4), positions(node, keys, 3, 4)
    if offset is not None:
        rows = node.pointwise(lambda i, o: i + o, rows, offset)

    def formula(i: Term, j: Term) -> Term:
        seen = f.less_equal(j, i + right) if right >= 0 else f.less_equal(j, j)
        if left >= 0:
            seen = f.logical_and(seen, f.less_equal(i, j + left))
        return f.where(seen, Term(ex.const(0.0, q.dtype)), -math.inf)

    return node.pointwise(formula, rows, columns)


@operator("Attention", since=23)
def Attention(
    node: OnnxNode,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    past_key: Value | None = None,
    past_value: Value | None = None,
    valid_keys: Value | None = None,
) -> list[Value | None]:
    if not q.rank == k.rank == v.rank or q.rank not in (3, 4):
        raise node.invalid(f"operands of rank {q.rank}, {k.rank}, {v.rank}; all must be 3 or all 4")
    folded = q.rank == 3
    if folded:
        heads, kv_heads = node.integer("q_num_heads"), node.integer("kv_num_heads")
        q, k, v = split_heads(node, q, heads), split_heads(node, k, kv_heads), split_heads(node, v, kv_heads)
    given = node.number("scale", 0.0)
    width = q.shape[3]
    if not given and not isinstance(width, int):
        raise node.unsupported(f"a head of unknown width ({width})")
    scale = given or 1 / math.sqrt(int(width))  # type: ignore[arg-type]
    offset: Value | None = None
    if past_key is not None and past_value is not None:
        offset = node.builder.sizes([past_key.shape[2]], ())
        k, v = concat(node, [past_key, k], 2), concat(node, [past_value, v], 2)
    keys = k.shape[2]
    bias = _padded(node, mask_bias(node, mask, q.dtype), keys) if mask is not None else None
    if valid_keys is not None:
        valid = node.reshape(valid_keys, (valid_keys.shape[0], 1, 1, 1))
        seen = node.pointwise(lambda j, n: f.less(j, n.cast(DType.I64)), positions(node, keys, 3, 4), valid)
        bias = add_bias(node, bias, mask_bias(node, seen, q.dtype))
        if offset is None:
            queries = node.builder.sizes([q.shape[2]], ())
            offset = node.pointwise(lambda n, s: n.cast(DType.I64) - s, valid, queries)
    left, right = node.integer("left_window_size", -1), node.integer("right_window_size", -1)
    causal = bool(node.integer("is_causal", 0))
    if left >= 0 or right >= 0:
        bias = add_bias(node, bias, causal_bias(node, q, keys, offset, left, right))
    if causal and offset is not None:
        bias = add_bias(node, bias, causal_bias(node, q, keys, offset))
        causal = False
    scores = Scores(scale, node.number("softcap", 0.0), bias, causal)
    wanted: Value | None = None
    if len(node.outputs) > 3 and node.outputs[3]:
        result, stages = _in_parts(node, q, k, v, scores)
        wanted = stages[node.integer("qk_matmul_output_mode", 0)]
    else:
        result = attend(node, q, k, v, scores)
    return [join_heads(node, result) if folded else result, k, v, wanted]


def _padded(node: OnnxNode, bias: Value, keys: Dim) -> Value:
    """A mask over fewer keys than there are hides the rest."""
    present = bias.shape[3]
    missing = keys - present
    if isinstance(missing, int) and missing > 0 and present != 1:
        return node.add(ops.Pad(((0, 0), (0, 0), (0, 0), (0, missing)), ops.PadMode.CONSTANT, -math.inf), bias)
    return bias


@operator("RotaryEmbedding", since=23)
def RotaryEmbedding(node: OnnxNode, x: Value, cosines: Value, sines: Value, position_ids: Value | None = None) -> Value:
    """Pairs of features turned by an angle that grows with the position (Su et al. 2021)."""
    folded = x.rank == 3
    heads = split_heads(node, x, node.integer("num_heads")) if folded else x
    width = heads.shape[3]
    turned = node.integer("rotary_embedding_dim", 0) or width
    half = floordiv(turned, 2)
    if position_ids is not None:
        cosines, sines = (node.add(ops.Gather(0), table, position_ids) for table in (cosines, sines))
    cosines, sines = (node.reshape(t, (*t.shape[:-2], 1, *t.shape[-2:])) for t in (cosines, sines))
    rotating = take(node, heads, 3, 0, turned)
    if node.integer("interleaved", 0):
        first, second = (take(node, rotating, 3, i, half, 2) for i in range(2))
    else:
        first, second = take(node, rotating, 3, 0, half), take(node, rotating, 3, half, half)
    real = node.pointwise(lambda a, b, c, s: c * a - s * b, first, second, cosines, sines)
    imaginary = node.pointwise(lambda a, b, c, s: s * a + c * b, first, second, cosines, sines)
    if node.integer("interleaved", 0):
        pairs = [node.reshape(part, (*part.shape, 1)) for part in (real, imaginary)]
        result = node.reshape(concat(node, pairs, 4), rotating.shape)
    else:
        result = concat(node, [real, imaginary], 3)
    if turned != width:
        result = concat(node, [result, take(node, heads, 3, turned, width - turned)], 3)
    return join_heads(node, result) if folded else result
