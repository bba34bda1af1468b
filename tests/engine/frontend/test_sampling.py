"""GridSample as lookups: random images and grids, far outside too, against onnx.reference; on the CPU, end to end."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import engine
from engine.ir.ops import Opaque

TOLERANCE = 2e-5  # absolute, elements about 1: the reference rounds coordinates to float32


def model(axes: int, dims: tuple[int, ...], **attributes: object) -> onnx.ModelProto:
    image = ["n", "c", *(f"d{i}" for i in range(axes))]
    grid = ["n", *(f"o{i}" for i in range(axes)), axes]
    inputs = [("x", image if not dims else ["n", 3, *dims]), ("grid", grid)]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("GridSample", ["x", "grid"], ["y"], **attributes)],
        "test",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize(("align", "symbolic"), [(0, False), (1, True)])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_grid_sample_matches_the_reference(axes: int, mode: str, padding: str, align: int, symbolic: bool) -> None:
    if mode == "cubic" and axes == 3:
        pytest.skip("64 lookups: read, but slow to compile")
    rng = np.random.default_rng(axes)
    dims, out = (5, 7, 4)[:axes], (3, 6, 2)[:axes]
    proto = model(axes, () if symbolic else dims, mode=mode, padding_mode=padding, align_corners=align)
    x = rng.standard_normal((2, 3, *dims)).astype(np.float32)
    grid = rng.uniform(-3, 3, (2, *out, axes)).astype(np.float32)
    (want,) = ReferenceEvaluator(proto).run(None, {"x": x, "grid": grid})
    with engine.load(proto.SerializeToString(), device="cpu") as loaded:
        assert not any(isinstance(node.op, Opaque) for node in loaded.graph.nodes)
        np.testing.assert_allclose(loaded.run({"x": x, "grid": grid})["y"], want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_a_grid_that_is_no_number_reads_nothing_foreign(padding: str) -> None:
    grid = np.full((1, 2, 2, 2), np.nan, np.float32)
    grid[0, 0] = np.inf
    grid[0, 1, 1] = 0
    x = np.ones((1, 3, 4, 4), np.float32)
    with engine.load(model(2, (4, 4), padding_mode=padding).SerializeToString(), device="cpu") as loaded:
        y = loaded.run({"x": x, "grid": grid})["y"]
    assert (y[0, :, 1, 1] == 1).all()
