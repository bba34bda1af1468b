"""What the tests of attention compare with: operands, and the operator in float64."""

from __future__ import annotations

import numpy as np

from tests.engine.targets.cpu.steps import Layout

SCALE = 0.3
ROWS = Layout((0, 2, 1, 3))  # [batch, sequence, heads, features] in memory
# Scores are sums of up to 80 products of standard normals, scaled: below 15 in size, exact to 3e-6; the exponential
# passes that on, and the weighted mean of values of size 3 averages it.
ATOL = 1e-5


def qkv(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, head_dim: int, value_dim: int
) -> list[np.ndarray]:
    """q, k and v, [batch, heads, length, features] of standard normals."""
    rng = np.random.default_rng(queries * 1000 + keys)
    shapes = ((batch, heads, queries, head_dim), (batch, kv_heads, keys, head_dim), (batch, kv_heads, keys, value_dim))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: np.ndarray | None = None,
    causal: bool = False,
    zero: bool = False,
) -> np.ndarray:
    """What attention gives, in float64; `zero`: 0 where every key is masked."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = SCALE * q @ k.swapaxes(-1, -2)
    if bias is not None:
        scores = scores + bias.astype(np.float64)
    if causal:
        scores = np.where(np.arange(k.shape[2]) > np.arange(q.shape[2])[:, None], -np.inf, scores)
    with np.errstate(all="ignore"):
        largest = scores.max(-1, keepdims=True)
        weights = np.exp(scores - largest)
        weights /= weights.sum(-1, keepdims=True)
    return (np.where(largest == -np.inf, 0, weights) if zero else weights) @ v
