"""The books of a model: calls from many threads, plans that are dropped, closing. On the CPU; the fake GPU's tests
(targets/cuda/test_runtime.py) hold runs in their midst."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest

import engine


def load(plan_cache_bytes: int = 64 << 20, threads: int | None = None) -> engine.Model:
    graph = onnx.parser.parse_graph("g (float[n,64] x) => (float[n,64] y) { h = MatMul(x, w) y = Relu(h) }")
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    data = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]).SerializeToString()
    return engine.load(data, device="cpu", plan_cache_bytes=plan_cache_bytes, threads=threads)


def feeds(n: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(n).standard_normal((n, 64)).astype(np.float32)}


def test_runs_on_a_cpu_take_turns_or_divide_the_threads() -> None:
    for threads, runs in ((1, 1), (2, 2), (5, 2)):
        with load(threads=threads) as model:
            assert (model.concurrent_runs, model.divides_threads) == (runs, runs > 1)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_runs_side_by_side_give_exactly_what_runs_alone_give(threads: int) -> None:
    with load(threads=threads) as model:
        expected = {n: model.run(feeds(n))["y"] for n in range(1, 200, 40)}
        before = sum(stat.launches for stat in model.kernel_stats())

        def run(i: int) -> bool:
            n = 1 + 40 * (i % 5)
            return np.array_equal(model.run(feeds(n), side_by_side=i % 4 > 0)["y"], expected[n])

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(run, range(300)))
        steps = len(model.plan({"n": 1}).steps)
        assert sum(stat.launches for stat in model.kernel_stats()) == before + 300 * steps


def test_a_plan_has_the_memory_that_it_takes_once_it_has_run_everywhere() -> None:
    with load(threads=1) as alone, load(threads=2) as divided:
        for model in (alone, divided):
            model.run(feeds(100))
        before = divided.memory()
        assert alone.memory()["plans"] < before["plans"]
        for _ in range(3):
            divided.run(feeds(100), side_by_side=True)
        assert divided.memory() == before


@pytest.mark.parametrize("plan_cache_bytes", [0, 64 << 20])
def test_many_threads_get_their_own_results_and_every_run_counts(plan_cache_bytes: int) -> None:
    with load(plan_cache_bytes) as model:
        expected = {n: model.run(feeds(n))["y"] for n in range(1, 7)}
        before = sum(stat.launches for stat in model.kernel_stats())
        counts: list[int] = []

        def run(i: int) -> bool:
            n = 1 + i % 6
            counts.append(sum(stat.launches for stat in model.kernel_stats()))
            return np.array_equal(model.run(feeds(n))["y"], expected[n])

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(run, range(240)))
        steps = len(model.plan({"n": 1}).steps)
        assert sum(stat.launches for stat in model.kernel_stats()) == before + 240 * steps
        assert max(counts) <= before + 240 * steps


def test_a_run_says_when_it_starts_unless_it_never_does() -> None:
    calls: list[int] = []  # of the first step when the run starts
    with load() as model:
        for _ in range(2):
            model.run(feeds(3), lambda: calls.append(model.plan_profiles()[-1].rows[0].calls))
        assert calls == [0, 1]
        with pytest.raises(engine.ShapeError):
            model.run({"x": np.zeros((3, 5), np.float32)}, lambda: calls.append(-1))
        assert calls == [0, 1]


def test_closing_amid_runs_waits_for_them_and_refuses_the_next() -> None:
    model = load()
    expected = model.run(feeds(9))["y"]
    started = threading.Barrier(5)

    def until_closed() -> bool:
        started.wait()
        for _ in itertools.count():
            try:
                got = model.run(feeds(9))["y"]
            except engine.EngineError as error:
                return "closed" in str(error)
            if not np.array_equal(got, expected):
                return False
        raise AssertionError("unreachable")

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(until_closed) for _ in range(4)]
        started.wait()
        threading.Event().wait(0.05)
        model.close()
        assert all(future.result() for future in running)
    model.close()


def test_a_bound_model_ends_with_its_model() -> None:
    model = load()
    bound = model.bind({"n": 2})
    bound.launch()
    bound.close()
    bound.close()
    with pytest.raises(engine.EngineError, match="closed"):
        bound.launch()
    other = model.bind({"n": 2})
    model.close()
    with pytest.raises(engine.EngineError, match="closed"):
        other.launch()
    other.close()
    with pytest.raises(engine.EngineError, match="closed"):
        model.bind({"n": 2})


def test_profiles_of_plans_are_of_what_ran() -> None:
    with load() as model:
        for n, times in ((2, 3), (5, 4)):
            for _ in range(times):
                model.run(feeds(n))
        first, last = model.plan_profiles()
        assert (first.sizes, last.sizes) == ({"n": 2}, {"n": 5})
        assert {row.calls for row in first.rows} == {3} and {row.calls for row in last.rows} == {4}
        assert [row.step for row in last.rows] == [step.name for step in model.plan({"n": 5}).steps]
        assert sum(row.flops for row in last.rows) == 2 * 5 * 64 * 64 + 5 * 64
        assert last.results[-1] == "f32 [5, 64]"
        total = sum(row.seconds * row.calls for plan in (first, last) for row in plan.rows)
        assert total == pytest.approx(sum(stat.seconds for stat in model.kernel_stats()))
        model.run(feeds(2))
        assert model.plan_profiles()[-1].sizes == {"n": 2}
    assert model.plan_profiles() == ()
