"""Bound models on the GPU: arrays that stay in device memory, streams, and no allocation from run to run."""

from __future__ import annotations

import numpy as np
import pytest

import engine
from tests.gpu.conftest import Both, image_feeds, token_feeds

pytestmark = pytest.mark.gpu


def fill(bound: engine.BoundModel, feeds: dict[str, np.ndarray]) -> None:
    for name, array in feeds.items():
        bound.inputs[name].set(array)


def test_a_bound_model_holds_device_arrays_and_computes_what_run_does(efficientnet: Both, minilm: Both) -> None:
    import cupy

    cases = (
        (efficientnet.gpu, {"batch": 7}, image_feeds(7)),
        (minilm.gpu, {"batch": 7, "sequence": 33}, token_feeds(7, 33)),
    )
    for model, sizes, feeds in cases:
        bound = model.bind(sizes)
        assert all(isinstance(array, cupy.ndarray) for array in (*bound.inputs.values(), *bound.outputs.values()))
        fill(bound, feeds)
        bound.launch()
        for name, array in model.run(feeds).items():
            assert np.array_equal(bound.outputs[name].get(), array)
        bound.close()
        with pytest.raises(engine.EngineError, match="closed"):
            bound.launch()


def test_other_runs_do_not_touch_the_arrays_of_a_bound_model(minilm: Both) -> None:
    bound = minilm.gpu.bind({"batch": 2, "sequence": 20})
    feeds = token_feeds(2, 20)
    fill(bound, feeds)
    bound.launch()
    expected = bound.outputs["last_hidden_state"].get()
    minilm.gpu.run(token_feeds(32, 256))  # another plan; the region that plans share grows and moves
    assert np.array_equal(bound.outputs["last_hidden_state"].get(), expected)
    for name, array in feeds.items():
        assert np.array_equal(bound.inputs[name].get(), array)
    bound.launch()
    assert np.array_equal(bound.outputs["last_hidden_state"].get(), expected)
    bound.close()


def test_a_launch_takes_its_place_in_the_callers_stream(efficientnet: Both) -> None:
    import cupy

    bound = efficientnet.gpu.bind({"batch": 4})
    stream = cupy.cuda.Stream(non_blocking=True)
    for seed in range(20):
        feeds = image_feeds(4, seed)
        with stream:
            bound.inputs["input"].set(feeds["input"], stream=stream)
            bound.launch(stream)
            copy = bound.outputs["logits"].copy()
        stream.synchronize()
        assert np.array_equal(copy.get(), efficientnet.gpu.run(feeds)["logits"])
    bound.close()


def test_launches_allocate_nothing_and_are_counted(minilm: Both) -> None:
    import cupy

    bound = minilm.gpu.bind({"batch": 8, "sequence": 64})
    fill(bound, token_feeds(8, 64))
    stream = cupy.cuda.Stream(non_blocking=True)
    bound.launch(stream)
    stream.synchronize()
    launches = sum(stat.launches for stat in minilm.gpu.kernel_stats())
    seconds = sum(stat.seconds for stat in minilm.gpu.kernel_stats())
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes(), pool.total_bytes()
    for _ in range(1000):
        bound.launch(stream)
    stream.synchronize()
    assert (pool.used_bytes(), pool.total_bytes()) == before
    steps = len(minilm.gpu.plan({"batch": 8, "sequence": 64}).steps)
    assert sum(stat.launches for stat in minilm.gpu.kernel_stats()) - launches == 1000 * steps
    assert sum(stat.seconds for stat in minilm.gpu.kernel_stats()) > seconds
    bound.close()
