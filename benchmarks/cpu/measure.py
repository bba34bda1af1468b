"""``python -m benchmarks cpu``: whole models and single layers on the CPU beside ONNX Runtime, which is the reference,
too. A layer is a model of one node with its activation, images in NCHW: a line includes what each side does about that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import engine
from benchmarks.cases.cpu import LayerCase
from benchmarks.cases.models import ModelCase
from benchmarks.cpu.timing import CpuContender
from benchmarks.measure import Entry, Measurement, measure
from benchmarks.results import Ceilings

TOLERANCE = 1e-5
_MODEL_ROUND, _LAYER_ROUND = (0.4, 0.08), (0.05, 0.02)  # seconds of a round, and of the pause before it


def measure_case(
    case: ModelCase | LayerCase, models: Path, threads: int, rounds: int, ceilings: Ceilings
) -> tuple[Measurement, float]:
    """(what came out, floor in µs) of one case."""
    if isinstance(case, ModelCase):
        source: bytes | Path = models / case.model / "1" / "model.onnx"
        feeds, seconds = case.feeds(), _MODEL_ROUND
    else:
        rng = np.random.default_rng(0)
        source, seconds = layer(case, rng), _LAYER_ROUND
        feeds = {"x": rng.standard_normal(case.input, dtype=np.float32)}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def peer() -> Mapping[str, np.ndarray]:
        return dict(zip(names, session.run(names, feeds), strict=True))

    expected = peer()
    with engine.load(source, device="cpu", threads=threads) as model:
        # Padded positions are 0, where ONNX Runtime has what the encoder makes of padding; the floor is that of the
        # plan which runs.
        shown = {name: array.copy() for name, array in expected.items()}
        model.clear_padding(shown, feeds)
        model.run(feeds)
        floor = ceilings.plan_floor_us(model.plan(model.plan_profiles()[-1].sizes))
        return measure(
            lambda: CpuContender(lambda: model.run(feeds), shown, *seconds),
            [Entry("ONNX Runtime", lambda: CpuContender(peer, expected, *seconds))],
            TOLERANCE,
            rounds,
        ), floor


def layer(case: LayerCase, rng: np.random.Generator) -> bytes:
    """The one-layer model of a case: ``x`` → ``z``."""
    if case.kernel:
        w = rng.standard_normal((case.n, case.k // case.groups, case.kernel, case.kernel))
        pad = [case.kernel // 2] * 4
        nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=pad, group=case.groups)]
    else:
        w = rng.standard_normal((case.k, case.n))
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"])]
    constants = {"w": w, "b": rng.standard_normal(case.n)}
    if case.gelu:
        nodes.append(helper.make_node("Gelu", ["y"], ["z"]))
    else:
        nodes.append(helper.make_node("Clip", ["y", "low", "high"], ["z"]))
        constants |= {"low": np.array(0.0), "high": np.array(6.0)}
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, case.input)],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, case.output)],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    made.ir_version = 9
    return bytes(made.SerializeToString())
