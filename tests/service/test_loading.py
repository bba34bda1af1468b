"""Loading beside serving, on the real engine: a heavy model that is being loaded keeps no other one waiting."""

from __future__ import annotations

import queue
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.workers.engine_api import real_engine
from service.workers.engine_worker import EngineWorker
from service.workers.messages import (
    BatchingOptions,
    Infer,
    InferResult,
    LoadModel,
    LocalTensor,
    ModelKey,
    ModelReady,
    Report,
    Stop,
    Stopped,
)

SIDE, CHANNELS, LAYERS = 512, 48, 6  # 64 GFLOP: a second or more of a few cores


def light(path: Path) -> None:
    """y = 2 x."""
    nodes = [helper.make_node("Add", ["x", "x"], ["y"])]
    save(path, nodes, [], ["batch", 4], ["batch", 4])


def heavy(path: Path) -> None:
    """Convolutions of a large picture."""
    generator = np.random.default_rng(0)
    nodes, weights, name, channels = [], [], "x", 3
    for layer in range(LAYERS):
        weight = (generator.standard_normal((CHANNELS, channels, 3, 3)) * 0.05).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{layer}"))
        nodes.append(helper.make_node("Conv", [name, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]))
        name, channels = f"c{layer}", CHANNELS
    nodes.append(helper.make_node("GlobalMaxPool", [name], ["y"]))
    save(path, nodes, weights, ["batch", 3, SIDE, SIDE], ["batch", CHANNELS, 1, 1])


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    taken: list[int | str],
    made: list[int | str],
) -> None:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, taken)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, made)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def test_a_heavy_model_that_is_being_loaded_keeps_no_request_waiting(tmp_path: Path) -> None:
    """Requests for the other model are answered one after the other all the while, not after each run of the probe."""
    light(tmp_path / "light.onnx")
    heavy(tmp_path / "heavy.onnx")
    reports: queue.Queue[tuple[float, Report]] = queue.Queue()
    worker = EngineWorker(real_engine, lambda bundle: [reports.put((time.monotonic(), r)) for r in bundle])
    worker.start()

    def load(name: str) -> None:
        path = str(tmp_path / f"{name}.onnx")
        worker.handle(LoadModel(ModelKey(name, 1), path, "cpu", "fp32", 2, BatchingOptions(), None))

    def next_report() -> tuple[float, Report]:
        while True:
            at, report = reports.get(timeout=120)
            if isinstance(report, ModelReady | InferResult):
                return at, report

    load("light")
    assert isinstance(next_report()[1], ModelReady)
    load("heavy")
    waits, heavy_seconds = [], 0.0
    row = np.ones((1, 4), np.float32)
    while not heavy_seconds:
        sent = time.monotonic()
        worker.handle(Infer(1, ModelKey("light", 1), (("x", LocalTensor(row)),), ("y",), (), sent, sent + 60, 50))
        at, report = next_report()
        if isinstance(report, ModelReady):
            heavy_seconds = report.load_seconds
            at, report = next_report()
        assert isinstance(report, InferResult)
        assert dict(report.outputs)["y"].view().tolist() == [[2.0] * 4]
        waits.append(at - sent)
    worker.handle(Stop())
    while not isinstance(reports.get(timeout=60)[1], Stopped):
        pass
    assert heavy_seconds > 1, "not heavy enough to prove anything"
    assert len(waits) > 20
    assert max(waits) < heavy_seconds / 3, "a request waited for a run of the other model"
