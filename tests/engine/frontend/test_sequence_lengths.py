"""Recurrent networks over sequences of different lengths on the CPU target, beside ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import engine
from engine import frontend
from engine.errors import UnsupportedOp
from engine.ir import ops
from tests.engine.targets.cuda.planning import cuda_plan, launches

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
HIDDEN, WIDTH, STEPS = 8, 6, 7
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}


def model(cell: str, direction: str, initial: bool) -> bytes:
    rng, count, gates = np.random.default_rng(0), DIRECTIONS[direction], GATES[cell]
    shapes = {
        "w": (count, gates * HIDDEN, WIDTH),
        "r": (count, gates * HIDDEN, HIDDEN),
        "b": (count, 2 * gates * HIDDEN),
    }
    weights = {name: (rng.standard_normal(shape) * 0.6).astype(np.float32) for name, shape in shapes.items()}
    states = ["h", "c"][: 1 + (cell == "LSTM")] if initial else []
    node = helper.make_node(
        cell, ["x", "w", "r", "b", "lengths", *states], ["y", "y_h", "y_c"][: 2 + (cell == "LSTM")],
        hidden_size=HIDDEN, direction=direction, **({"linear_before_reset": 1} if cell == "GRU" else {}),
    )  # fmt: skip
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [STEPS, "n", WIDTH])]
    inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, ["n"]))
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [count, "n", HIDDEN]) for name in states]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], "recurrent", inputs, outputs, tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    content: bytes = proto.SerializeToString()
    return content


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("initial", [False, True])
def test_every_sequence_ends_at_its_own_length(cell: str, direction: str, initial: bool) -> None:
    content, rng = model(cell, direction, initial), np.random.default_rng(1)
    feeds = {
        "x": rng.standard_normal((STEPS, 4, WIDTH)).astype(np.float32),
        "lengths": np.array([7, 1, 4, 3], np.int32),
    }
    if initial:
        for name in ("h", "c")[: 1 + (cell == "LSTM")]:
            feeds[name] = rng.standard_normal((DIRECTIONS[direction], 4, HIDDEN)).astype(np.float32)
        if direction != "forward" and cell != "GRU":
            with pytest.raises(UnsupportedOp, match=cell):  # the host's: a state cannot be kept until the last step
                engine.load(content, device="cpu", strict=True)
            return
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    with engine.load(content, device="cpu", strict=True) as loaded:
        got = loaded.run(feeds)
    for name, want in zip(names, session.run(names, feeds), strict=True):
        np.testing.assert_allclose(got[name], want, atol=2e-6, err_msg=name)
    plan = cuda_plan(frontend.read(content), {"n": 4})
    assert not any(isinstance(step.op, ops.Opaque) for step in plan.steps)
    assert launches(plan)


def test_a_sequence_longer_than_the_steps_is_an_error() -> None:
    feeds = {"x": np.zeros((STEPS, 2, WIDTH), np.float32), "lengths": np.array([9, 1], np.int32)}
    with engine.load(model("LSTM", "forward", False), device="cpu") as loaded, pytest.raises(engine.ShapeError):
        loaded.run(feeds)
