"""``python -m benchmarks memory`` and tests/gpu/test_long_sequences.py: what a loaded model of one long attention takes
of the device, and how right a sample of its results is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser

import engine
from benchmarks.cases.memory import BOUND, MemoryCase
from benchmarks.measure import Measurement, reason, worst

_SAMPLED = 32  # queries that are compared, of every head

Facts = Mapping[str, int]


def measure_all(cases: Sequence[MemoryCase], deadline: float) -> Iterator[tuple[MemoryCase, Measurement, Facts]]:
    """Every case with what came out, as long as `deadline` (of `time.monotonic`) is not past."""
    for case in cases:
        if time.monotonic() >= deadline:
            return
        try:
            error, facts = measure(case)
        except Exception as problem:
            yield case, Measurement(failure=reason(problem)), {}
            continue
        failure = "" if error <= BOUND else f"relative error {error:.1e}, above {BOUND:g}"
        yield case, Measurement(rel_err=float(f"{error:.1e}"), failure=failure), facts


def measure(case: MemoryCase) -> tuple[float, Facts]:
    """(relative L2 distance of a sample of the results from float64, bytes by what takes them): ``model_bytes`` what
    the engine counts after a run, ``device_bytes`` by how much the device's free memory has fallen."""
    import cupy

    feeds = drawn(case)
    cupy.cuda.runtime.free(0)  # so that the driver's own memory is taken already
    before = cupy.cuda.runtime.memGetInfo()[0]
    with engine.load(attention(case), device="cuda", precision="fp16", strict=True) as model:
        result = model.run(feeds)["y"]
        facts = {
            "tensors_bytes": case.tensors_bytes,
            "arena_bytes": model.plan({"n": case.tokens}).arena_bytes,
            "model_bytes": sum(model.memory().values()),
            "device_bytes": before - cupy.cuda.runtime.memGetInfo()[0],
            "scores_bytes": case.scores_bytes,
        }
    return distance(case, feeds, result), facts


def drawn(case: MemoryCase) -> dict[str, np.ndarray]:
    """q, k and v, normally distributed."""
    rng = np.random.default_rng(0)
    shape = (1, case.heads, case.tokens, case.head)
    return {name: rng.standard_normal(shape, np.float32).astype(np.float16) for name in "qkv"}


def attention(case: MemoryCase) -> bytes:
    """The ONNX model: a scaled product, a softmax and another product, over `n` tokens."""
    shape = f"1,{case.heads},n,{case.head}"
    graph = onnx.parser.parse_graph(
        f"g (float16[{shape}] q, float16[{shape}] k, float16[{shape}] v) => (float16[{shape}] y) "
        "{ t = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul(q, t) "
        "w = Mul(s, scale) p = Softmax <axis = -1> (w) y = MatMul(p, v) }"
    )
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(case.head**-0.5, np.float16), "scale"))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    return bytes(model.SerializeToString())


def distance(case: MemoryCase, feeds: Mapping[str, np.ndarray], result: np.ndarray) -> float:
    """Relative L2 distance of the results from float64, over a sample of the queries; the largest of a head."""
    rows = np.random.default_rng(1).choice(case.tokens, _SAMPLED, replace=False)
    scale = float(np.float16(case.head**-0.5))
    found = []
    for head in range(case.heads):
        q, k, v = (feeds[name][0, head].astype(np.float64) for name in "qkv")
        scores = q[rows] @ k.T * scale
        weights = np.exp(scores - scores.max(1, keepdims=True))
        expected = weights / weights.sum(1, keepdims=True) @ v
        off = result[0, head, rows].astype(np.float64) - expected
        found.append(float(np.linalg.norm(off) / np.linalg.norm(expected)))
    return worst(found)
