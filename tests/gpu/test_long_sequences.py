"""Attention over one very long sequence: right, and nowhere a matrix of scores."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

import engine
from tests.gpu.conftest import relative_error

pytestmark = pytest.mark.gpu

HEADS, TOKENS, WIDTH = 16, 32 * 1024, 128
TENSOR = HEADS * TOKENS * WIDTH * 2
"""Bytes of each of q, k, v and the result in fp16. A matrix of scores of one head alone is four times all of them."""
OTHERS = 64 << 20
SAMPLED = 32  # queries that are compared, of every head


def attention() -> bytes:
    shape = f"1,{HEADS},n,{WIDTH}"
    graph = onnx.parser.parse_graph(
        f"g (float16[{shape}] q, float16[{shape}] k, float16[{shape}] v) => (float16[{shape}] y) "
        "{ t = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul(q, t) "
        "w = Mul(s, scale) p = Softmax <axis = -1> (w) y = MatMul(p, v) }"
    )
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(WIDTH**-0.5, np.float16), "scale"))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    return bytes(model.SerializeToString())


def test_a_sequence_of_32k_tokens_takes_the_memory_of_its_tensors() -> None:
    import cupy

    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((1, HEADS, TOKENS, WIDTH), np.float32).astype(np.float16) for name in "qkv"}
    before = cupy.cuda.runtime.memGetInfo()[0]
    with engine.load(attention(), device="cuda", precision="fp16", strict=True) as model:
        output = model.run(feeds)["y"]
        taken = sum(model.memory().values())
        of_device = before - cupy.cuda.runtime.memGetInfo()[0]
    print(f"{TOKENS} tokens, {HEADS} heads of {WIDTH}: {taken / 1e6:.0f} MB, of the device {of_device / 1e6:.0f} MB")
    assert taken <= 2 * 4 * TENSOR + OTHERS, "two runs' inputs and results at most"
    assert of_device <= 2 * 4 * TENSOR + 8 * OTHERS, "with the driver's own and the kernels"
    rows = rng.choice(TOKENS, SAMPLED, replace=False)
    q, k, v = (feeds[name][0].astype(np.float64) for name in "qkv")
    for head in range(HEADS):
        scores = q[head, rows] @ k[head].T * float(np.float16(WIDTH**-0.5))
        weights = np.exp(scores - scores.max(1, keepdims=True))
        expected = weights / weights.sum(1, keepdims=True) @ v[head]
        assert relative_error(output[0, head, rows], expected) <= 2e-3
