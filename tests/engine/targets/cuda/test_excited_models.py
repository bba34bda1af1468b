"""Squeeze-and-excite blocks as whole plans: the kernels, one after the other, give what the model says, whichever of
the fused forms the graph has (conftest.py says on what they run)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest

from engine import frontend, passes
from engine.ir.dtype import DType
from engine.ir.graph import Graph
from engine.plan.build import Constants, build
from engine.targets.cuda import depthwise_rows
from tests.engine.ir_interpreter import run
from tests.engine.passes.toolkit import model, random
from tests.engine.targets.cuda.harness import Runner
from tests.engine.targets.cuda.planning import CudaCapabilities, copies, cuda_traits
from tests.engine.targets.cuda.test_packed_models import execute

TOLERANCE = 5e-3  # relative L2 in fp16, as of engine/precision.py
FORMS = {
    "apart": {},
    "means": {"conv_means": True},
    "layers": {"excitations": True},
    "all": {"conv_means": True, "excitations": True, "scaled_weights": True},
}
WEIGHTS = {
    "stem": random(16, 8, 1, 1, seed=1), "k3": random(16, 1, 3, 3, seed=2), "a1": random(8, 16, 1, 1, seed=3),
    "a2": random(16, 8, 1, 1, seed=4), "p1": random(16, 16, 1, 1, seed=5), "wide": random(96, 16, 1, 1, seed=6),
    "k5": random(96, 1, 5, 5, seed=7), "b1": random(6, 96, 1, 1, seed=8), "b2": random(96, 6, 1, 1, seed=9),
    "p2": random(24, 96, 1, 1, seed=10), "c16": random(16, seed=11), "c96": random(96, seed=12),
}  # fmt: skip
# Two blocks: at stride 1 with a residual, on 20 × 20 pixels, and at stride 2.
TEXT = """(float[n,8,20,20] x) => (float[n,24,10,10] y) {
    e = Conv(x, stem, c16) i = Mul(e, e)
    d = Conv<pads=[1,1,1,1], group=16>(i, k3, c16) ds = Sigmoid(d) s = Mul(d, ds)
    m = GlobalAveragePool(s) f = Conv(m, a1) r = Relu(f) g = Conv(r, a2, c16) h = Sigmoid(g) z = Mul(s, h)
    q = Conv(z, p1, c16) o = Add(q, i)
    w = Conv(o, wide) u = Relu(w)
    d5 = Conv<pads=[2,2,2,2], strides=[2,2], group=96>(u, k5, c96) t = Relu(d5)
    m5 = GlobalAveragePool(t) f5 = Conv(m5, b1) r5 = Relu(f5) g5 = Conv(r5, b2, c96) h5 = Sigmoid(g5) z5 = Mul(h5, t)
    y = Conv(z5, p2) }"""


def blocks() -> onnx.ModelProto:
    """Filters keep the size of what they multiply."""
    scaled = {name: array / np.sqrt(max(1, array[0].size)) for name, array in WEIGHTS.items()}
    return model(TEXT, {name: array.astype(np.float32) for name, array in scaled.items()})


def graph_in(form: str, storage: DType = DType.F16) -> Graph:
    traits = replace(cuda_traits(storage), **FORMS[form])
    return passes.run(frontend.read(blocks().SerializeToString()), traits)


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_match_the_model(runner: Runner, form: str, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not taken:
        monkeypatch.setattr(depthwise_rows, "pick", lambda *_, **__: None)
    feeds = {"x": random(3, 8, 20, 20, seed=13).astype(np.float32)}
    plan = build(graph_in(form), {"n": 3}, CudaCapabilities(), Constants())
    assert copies(plan) == ["y.output"], "the caller gets it with its channels outside"
    (got,) = execute(runner, plan, feeds).values()
    (want,) = run(frontend.read(blocks().SerializeToString()), feeds).values()
    assert np.linalg.norm(got - want) <= TOLERANCE * np.linalg.norm(want)


def test_the_forms_are_what_they_are_called() -> None:
    found = {form: Counter(node.op.name for node in graph_in(form).nodes) for form in FORMS}
    assert (found["apart"]["Reduce"], found["apart"]["Conv"]) == (2, 10)
    assert (found["means"]["ConvMean"], found["means"]["Reduce"]) == (2, 0)
    assert (found["layers"]["Excitation"], found["layers"]["Reduce"]) == (2, 2)
    assert (found["all"]["ConvExcitation"], found["all"]["Gemm"]) == (2, 1)
