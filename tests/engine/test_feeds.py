"""What `run` accepts."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

import engine


def test_a_scalar_input_stays_a_scalar() -> None:
    low = helper.make_tensor_value_info("low", TensorProto.FLOAT, [])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Clip", ["x", "low"], ["y"])], "clip", [x, low], [y])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    feeds = {"x": np.array([-1.0, 2.0], np.float32), "low": np.array(0.5, np.float32)}
    with engine.load(proto.SerializeToString(), device="cpu") as model:
        np.testing.assert_array_equal(model.run(feeds)["y"], [0.5, 2.0])
