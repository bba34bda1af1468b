"""Operators of the com.microsoft domain against ONNX Runtime, whose own they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from engine.frontend import read
from tests.engine.frontend.models import model, node, tensor
from tests.engine.ir_interpreter import run

onnxruntime = pytest.importorskip("onnxruntime")
MICROSOFT = "com.microsoft"
RNG = np.random.default_rng(11)
TOLERANCE = 3e-5  # ONNX Runtime's own polynomials for erf and tanh on the CPU

Array = np.ndarray[Any, Any]


def random(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def integers(high: int, *shape: int) -> Array:
    return RNG.integers(0, high, shape).astype(np.int32)


MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)

CASES: dict[str, tuple[onnx.NodeProto, dict[str, Array]]] = {
    "BiasGelu": (node("BiasGelu", "x b", "y", domain=MICROSOFT), {"x": random(2, 3, 8), "b": random(8)}),
    "FastGelu": (node("FastGelu", "x b", "y", domain=MICROSOFT), {"x": random(2, 3, 8), "b": random(8)}),
    "FastGelu_without_bias": (node("FastGelu", "x", "y", domain=MICROSOFT), {"x": random(2, 3, 8)}),
    "QuickGelu": (node("QuickGelu", "x", "y", domain=MICROSOFT, alpha=1.5), {"x": random(2, 8)}),
    "Gelu": (node("Gelu", "x", "y", domain=MICROSOFT), {"x": random(2, 8)}),
    "FusedMatMul": (
        node("FusedMatMul", "a b", "y", domain=MICROSOFT, transA=1, transB=1, alpha=0.5),
        {"a": random(2, 4, 3), "b": random(2, 5, 4)},
    ),
    "FusedGemm": (
        node("FusedGemm", "a b c", "y", domain=MICROSOFT, activation="Relu", transB=1),
        {"a": random(3, 4), "b": random(5, 4), "c": random(5)},
    ),
    "SkipLayerNormalization": (
        node("SkipLayerNormalization", "x s g b c", "y _ _ t", domain=MICROSOFT, epsilon=1e-5),
        {"x": random(2, 3, 8), "s": random(2, 3, 8), "g": random(8), "b": random(8), "c": random(8)},
    ),
    "SkipSimplifiedLayerNormalization": (
        node("SkipSimplifiedLayerNormalization", "x s g", "y _ _ t", domain=MICROSOFT, epsilon=1e-5),
        {"x": random(2, 3, 8), "s": random(2, 3, 8), "g": random(8)},
    ),
    "EmbedLayerNormalization": (
        node("EmbedLayerNormalization", "i s w p t g b m", "y mask", domain=MICROSOFT, epsilon=1e-5),
        {
            "i": integers(9, 2, 5), "s": integers(2, 2, 5), "w": random(9, 8), "p": random(7, 8), "t": random(2, 8),
            "g": random(8), "b": random(8), "m": MASK,
        },
    ),
    "EmbedLayerNormalization_without_segments": (
        node("EmbedLayerNormalization", "i _ w p _ g b m q", "y mask", domain=MICROSOFT, epsilon=1e-5),
        {
            "i": integers(9, 2, 5), "w": random(9, 8), "p": random(7, 8), "g": random(8), "b": random(8), "m": MASK,
            "q": integers(7, 2, 5),
        },
    ),
    "Attention_ends": (
        node("Attention", "x w b m", "y", domain=MICROSOFT, num_heads=2),
        {"x": random(2, 5, 8), "w": random(8, 24), "b": random(24), "m": np.array([5, 3], np.int32)},
    ),
    "Attention_ends_and_starts": (
        node("Attention", "x w b m", "y", domain=MICROSOFT, num_heads=2),
        {"x": random(2, 5, 8), "w": random(8, 24), "b": random(24), "m": np.array([5, 4, 2, 0], np.int32)},
    ),
    "Attention_mask_by_query": (
        node("Attention", "x w b m", "y", domain=MICROSOFT, num_heads=2),
        {"x": random(2, 5, 8), "w": random(8, 24), "b": random(24), "m": integers(2, 2, 5, 5)},
    ),
    "Attention": (
        node("Attention", "x w b m", "y", domain=MICROSOFT, num_heads=2),
        {"x": random(2, 5, 8), "w": random(8, 24), "b": random(24), "m": MASK},
    ),
    "Attention_causal": (
        node("Attention", "x w b", "y", domain=MICROSOFT, num_heads=2, unidirectional=1),
        {"x": random(2, 5, 8), "w": random(8, 24), "b": random(24)},
    ),
    "MultiHeadAttention": (
        node("MultiHeadAttention", "q k v b m", "y", domain=MICROSOFT, num_heads=2),
        {"q": random(2, 4, 8), "k": random(2, 5, 8), "v": random(2, 5, 8), "b": random(24), "m": MASK},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operator_matches_onnxruntime(name: str) -> None:
    operator, arrays = CASES[name]
    for names in (operator.input, operator.output):
        names[:] = ["" if name == "_" else name for name in names]
    inputs = [
        tensor(key, list(array.shape), onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
        for key, array in arrays.items()
    ]
    outputs = [output for output in operator.output if output]
    data = model([operator], inputs, outputs).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    expected = session.run(None, arrays)
    results = run(read(data), arrays)
    for output, want in zip(outputs, expected, strict=True):
        assert results[output].dtype == want.dtype
        np.testing.assert_allclose(results[output], want, atol=TOLERANCE, rtol=TOLERANCE)
