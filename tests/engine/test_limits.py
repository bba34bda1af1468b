"""Sizes, indices and memory out of bounds: errors in the caller's terms, at once, and memory back after close."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import engine


@pytest.fixture(scope="module")
def minilm(all_minilm_l6_v2: Path) -> Iterator[engine.Model]:
    with engine.load(all_minilm_l6_v2 / "1" / "model.onnx", device="cpu") as model:
        yield model


def test_an_index_outside_its_table_is_named(minilm: engine.Model) -> None:
    feeds = minilm.sample_feeds({"batch": 2, "sequence": 3})
    feeds["input_ids"][1, 2] = 99999
    with pytest.raises(engine.ShapeError, match=r"'input_ids' holds 99999 at \[1, 2\].* 30522 rows"):
        minilm.run(feeds)


def test_a_sequence_beyond_the_position_table_is_named_with_the_limit(minilm: engine.Model) -> None:
    with pytest.raises(engine.ShapeError, match="'sequence' is 513, the model takes at most 512"):
        minilm.run(minilm.sample_feeds({"batch": 1, "sequence": 513}))


def test_the_most_that_a_size_may_be_is_told(minilm: engine.Model) -> None:
    assert minilm.size_limits == {"sequence": 512}


@pytest.mark.parametrize("batch", [10**9, 10**12, 2.5, "3", True, 0])
def test_sizes_that_make_no_sense_are_refused_at_once(minilm: engine.Model, batch: object) -> None:
    with pytest.raises(engine.EngineError, match="batch|elements|memory"):
        minilm.bind({"batch": batch, "sequence": 64})  # type: ignore[dict-item]


def model(nodes: list[onnx.NodeProto], shape: list[int]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [helper.make_tensor("huge", TensorProto.INT64, [3], [1 << 20, 1 << 20, 4])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def test_a_model_that_repeats_one_number_for_terabytes_is_refused() -> None:
    nodes = [
        helper.make_node("Expand", ["x", "huge"], ["wide"], name="spread"),
        helper.make_node("ReduceSum", ["wide"], ["sum"], keepdims=0),
        helper.make_node("Add", ["sum", "x"], ["y"]),
    ]
    with pytest.raises(engine.EngineError, match="elements"), engine.load(model(nodes, [1]), device="cpu") as loaded:
        loaded.run({"x": np.ones(1, np.float32)})


def test_an_output_that_the_machine_cannot_hold_is_named() -> None:
    graph = helper.make_graph(
        [helper.make_node("Expand", ["x", "size"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1 << 30])],
        [helper.make_tensor("size", TensorProto.INT64, [2], [1, 1 << 30])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with engine.load(made.SerializeToString(), device="cpu") as loaded:
        words = r"output 'y' of shape \[1000, 1073741824\] has 4294967296000 bytes"
        with pytest.raises(engine.OutOfMemory, match=words):
            loaded.run({"x": np.ones((1000, 1), np.float32)})


@pytest.mark.parametrize("arguments", [{"threads": 1.5}, {"plan_cache_bytes": -1}, {"device": None}])
def test_arguments_of_load_that_mean_nothing(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        engine.load(b"", **arguments)  # type: ignore[arg-type]


def test_the_backend_is_part_of_the_package() -> None:
    assert engine.onnx_backend.supports_device("CPU")


@pytest.mark.slow
def test_closing_gives_memory_back(all_minilm_l6_v2: Path) -> None:
    def cycle() -> int:
        with engine.load(all_minilm_l6_v2 / "1" / "model.onnx", device="cpu") as loaded:
            loaded.run(loaded.sample_feeds({"batch": 1, "sequence": 8}))
        del loaded
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    first = max(cycle() for _ in range(3))
    assert cycle_many(cycle, 10) < first + (64 << 20)


def cycle_many(cycle: object, times: int) -> int:
    return [cycle() for _ in range(times)][-1]  # type: ignore[operator]
