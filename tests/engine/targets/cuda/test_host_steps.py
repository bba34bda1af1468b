"""Plans with operators that the host computes, on a fake GPU: graphs with steps between them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest

pytest.importorskip("cupy")
pytest.importorskip("cuda.bindings.nvrtc")

import engine
from engine import frontend, passes
from engine.errors import EngineError, UnsupportedOp
from engine.ir.ops import Opaque
from engine.model import Model
from engine.targets.cuda.target import CudaTarget
from tests.engine.targets.cuda.fake_cupy import FakeArray, FakeGpu, fake_gpu

HEAD = "g (float[n,3,3] x) => (float[n] y)"
MIDDLE = "a = Relu(x) d = Det(a) b = Add(d, c) y = Exp(b)"
FIRST = "d = Det(x) y = Exp(d)"
LAST = "a = Relu(x) y = Det(a)"
ALONE = "y = Det(x)"
TWICE = (
    "a = Relu(x) d = Det(a) e = Det(x) s = Add(d, e) u = Unsqueeze(s, z) v = Unsqueeze(u, z) w = Mul(x, v) y = Det(w)"
)


def model_bytes(body: str, head: str = HEAD) -> bytes:
    graph = onnx.parser.parse_graph(f"{head} {{ {body} }}")
    for name, array in {"c": np.array([0.5], np.float32), "z": np.array([1, 2])}.items():
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]).SerializeToString()


def feed(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng((n, seed)).standard_normal((n, 3, 3)).astype(np.float32)}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu(monkeypatch) as made:
        yield made


def load(body: str, head: str = HEAD) -> Model:
    graph = passes.run(frontend.read(model_bytes(body, head)), CudaTarget.traits)
    assert any(isinstance(node.op, Opaque) for node in graph.nodes)
    return Model(graph, CudaTarget())


def expected(body: str, given: dict[str, np.ndarray]) -> np.ndarray:
    with engine.load(model_bytes(body), device="cpu") as cpu:
        return cpu.run(given)["y"]


@pytest.mark.parametrize(
    ("body", "segments"), [(MIDDLE, 2), (FIRST, 1), (LAST, 1), (ALONE, 0), (TWICE, None)],
    ids=["middle", "first", "last", "alone", "twice"],
)  # fmt: skip
def test_a_step_on_the_host_stands_between_graphs(gpu: FakeGpu, body: str, segments: int | None) -> None:
    model = load(body)
    for n in (1, 4, 2):
        np.testing.assert_allclose(model.run(feed(n))["y"], expected(body, feed(n)), rtol=1e-2, atol=1e-2)
    if segments is not None:
        gpu.log.clear()
        model.run(feed(4))
        assert [what for what, _ in gpu.log].count("begin") == segments
    model.close()


def test_runs_from_many_threads_do_not_meet_in_the_arena(gpu: FakeGpu) -> None:
    model = load(TWICE)
    work = [feed(n, seed) for seed in range(4) for n in (1, 3, 8)]
    alone = [model.run(given)["y"] for given in work]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda given: model.run(given)["y"], work))
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    model.close()


def test_the_host_is_counted_and_timed(gpu: FakeGpu) -> None:
    model = load(MIDDLE)
    for seed in range(20):  # some of which write stamps
        model.run(feed(2, seed))
    stats = {(stat.kernel, stat.op): stat for stat in model.kernel_stats()}
    assert stats["host", "Opaque[Det]"].launches == 20
    assert all(stat.seconds > 0 for stat in stats.values())
    model.close()


def test_warm_runs_allocate_and_capture_nothing(gpu: FakeGpu) -> None:
    model = load(MIDDLE)
    for _ in range(3):
        model.run(feed(4))
    before = gpu.allocations, gpu.captures
    for seed in range(20):
        model.run(feed(4, seed))
    assert (gpu.allocations, gpu.captures) == before
    model.close()


def test_a_bound_model_waits_for_the_host(gpu: FakeGpu) -> None:
    model = load(MIDDLE)
    bound = model.bind({"n": 3})
    for seed in range(3):
        given = feed(3, seed)
        array = bound.inputs["x"]
        assert isinstance(array, FakeArray)
        array.set(given["x"])
        bound.launch()
        np.testing.assert_allclose(bound.outputs["y"].get(), expected(MIDDLE, given), rtol=1e-2)
    bound.close()
    model.close()


def test_an_operator_that_fails_fails_its_own_run_only(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(MIDDLE)
    right = model.run(feed(2))["y"]
    with monkeypatch.context() as patched:
        patched.setattr(np.linalg, "det", lambda _: 1 / 0)
        with pytest.raises(EngineError, match="Det failed"):
            model.run(feed(2))
    assert np.array_equal(model.run(feed(2))["y"], right)
    model.close()


def test_strings_are_refused_by_name(gpu: FakeGpu) -> None:
    graph = frontend.read(model_bytes("y = StringConcat(x, x)", "g (string[n] x) => (string[n] y)"))
    model = Model(passes.run(graph, CudaTarget.traits), CudaTarget())
    with pytest.raises(UnsupportedOp, match="strings"):
        model.run({"x": np.array(["a", "b"], object)})
    model.close()
