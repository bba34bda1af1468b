"""Loading beside serving, on the real engine: a heavy model that is being loaded keeps no other one waiting."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engine.targets.cpu.runtime import Pool, Program
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

SIDE, CHANNELS, LAYERS = 256, 48, 6  # 16 GFLOP in many tasks
ANSWERS = 50
WAIT_S = 120


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


@dataclass
class Latch:
    """Holds a program of the background at the first place in the middle of it where it gives way."""

    gave_way: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        turn = Pool._turn

        def held(pool: Pool, program: Program, mode: int) -> bool:
            done = turn(pool, program, mode)
            if not done and not self.gave_way.is_set():
                self.gave_way.set()
                assert self.go_on.wait(WAIT_S), "the test never let the program go on"
            return done

        monkeypatch.setattr(Pool, "_turn", held)


def test_a_heavy_model_that_is_being_loaded_keeps_no_request_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of the heavy model gives way in its middle, and there requests for the other one are answered while the
    load stands still."""
    light(tmp_path / "light.onnx")
    heavy(tmp_path / "heavy.onnx")
    latch = Latch()
    latch.install(monkeypatch)
    reports: queue.Queue[Report] = queue.Queue()
    worker = EngineWorker(real_engine, lambda bundle: [reports.put(report) for report in bundle])
    worker.start()

    def load(name: str) -> None:
        path = str(tmp_path / f"{name}.onnx")
        worker.handle(LoadModel(ModelKey(name, 1), path, "cpu", "fp32", 2, BatchingOptions(), None))

    def next_report() -> Report:
        while True:
            report = reports.get(timeout=WAIT_S)
            if isinstance(report, ModelReady | InferResult):
                return report

    def ask() -> Report:
        now = time.monotonic()
        row = LocalTensor(np.ones((1, 4), np.float32))
        worker.handle(Infer(1, ModelKey("light", 1), (("x", row),), ("y",), (), now, now + WAIT_S, 50))
        return next_report()

    load("light")
    assert isinstance(next_report(), ModelReady)
    load("heavy")
    while not latch.gave_way.is_set():
        assert isinstance(ask(), InferResult), "the heavy model was loaded without giving way once"
    for _ in range(ANSWERS):
        report = ask()
        assert isinstance(report, InferResult)
        assert dict(report.outputs)["y"].view().tolist() == [[2.0] * 4]
    latch.go_on.set()
    ready = next_report()
    assert isinstance(ready, ModelReady) and ready.key.name == "heavy"
    worker.handle(Stop())
    while not isinstance(reports.get(timeout=WAIT_S), Stopped):
        pass
