"""The tuner on the GPU: what it times, keeps, and what models then take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import engine

pytestmark = pytest.mark.gpu

ROWS, K, N = 700, 511, 300


def model_bytes() -> bytes:
    """A product whose rows are not aligned, and one whose are."""
    body = "h = MatMul(x, w) r = Relu(h) y = MatMul(r, v)"
    graph = onnx.parser.parse_graph(f"g (float[n,{K}] x) => (float[n,{N}] y) {{ {body} }}")
    rng = np.random.default_rng(0)
    for name, shape in (("w", (K, 512)), ("v", (512, N))):
        array = (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]).SerializeToString()


def test_what_was_timed_is_kept_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWAVE_CACHE_DIR", str(tmp_path))
    feeds = {"x": np.random.default_rng(1).standard_normal((ROWS, K)).astype(np.float32)}
    with engine.load(model_bytes(), device="cuda", precision="fp16") as model:
        before = model.run(feeds)["y"]
        explained = list(model.tune({"n": ROWS}, timed=False))
        assert explained and all(trial.measured_us is None for trial in explained)
        timed = list(model.tune({"n": ROWS}))
        assert [(t.product, t.tile) for t in timed] == [(t.product, t.tile) for t in explained]
        assert all(trial.measured_us is not None and trial.measured_us > 0 for trial in timed)
        products = dict.fromkeys(trial.product for trial in timed)
        assert len(products) == 2
        for product in products:
            trials = [trial for trial in timed if trial.product == product]
            (chosen,) = (trial for trial in trials if trial.chosen)
            assert chosen.measured_us is not None
            assert chosen.measured_us <= 1.03 * min(trial.measured_us or 0 for trial in trials)
        assert all(trial.measured_us is None for trial in model.tune({"n": ROWS})), "timed twice"
    with engine.load(model_bytes(), device="cuda", precision="fp16") as model:
        assert [t.chosen for t in model.tune({"n": ROWS}, timed=False)] == [t.chosen for t in timed]
        assert np.allclose(model.run(feeds)["y"], before, atol=2e-2)
