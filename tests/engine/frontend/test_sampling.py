"""GridSample and RoiAlign as lookups: random images, places far outside too, against onnx.reference and ONNX Runtime;
on the CPU, end to end."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

import engine
from engine import frontend
from engine.errors import UnsupportedOp
from engine.ir.ops import Opaque
from tests.engine.targets.cuda.planning import cuda_plan, launches

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


def regions_model(opset: int, **attributes: object) -> bytes:
    node = onnx.helper.make_node("RoiAlign", ["x", "regions", "images"], ["y"], **attributes)
    info = onnx.helper.make_tensor_value_info
    inputs = [info("x", 1, ["n", 5, 9, 12]), info("regions", 1, ["k", 4])]
    inputs.append(info("images", onnx.TensorProto.INT64, ["k"]))
    graph = onnx.helper.make_graph([node], "regions", inputs, [info("y", 1, None)])
    opsets = [onnx.helper.make_opsetid("", opset)]
    content: bytes = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return content


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("opset", [10, 16, "output_half_pixel"])
@pytest.mark.parametrize(("ratio", "height", "width"), [(1, 4, 3), (2, 7, 7), (3, 1, 2)])
def test_regions_match_onnx_runtime(mode: str, opset: int | str, ratio: int, height: int, width: int) -> None:
    shift = {"coordinate_transformation_mode": opset} if isinstance(opset, str) else {}
    version = 16 if isinstance(opset, str) else opset
    sizes = {"output_height": height, "output_width": width, "sampling_ratio": ratio}
    content = regions_model(version, mode=mode, spatial_scale=0.5, **sizes, **shift)
    rng = np.random.default_rng(ratio)
    corners = rng.uniform(-6, 26, (40, 2, 2))
    regions = np.concatenate([corners.min(1), corners.max(1)], 1)
    regions[0] = (4, 4, 4, 4)  # nothing
    regions[1] = (9, 7, 3, 2)  # the wrong way round
    feeds = {
        "x": rng.standard_normal((3, 5, 9, 12)).astype(np.float32), "regions": regions.astype(np.float32),
        "images": rng.integers(0, 3, 40),
    }  # fmt: skip
    (want,) = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, feeds)
    with engine.load(content, device="cpu", strict=True) as loaded:
        np.testing.assert_allclose(loaded.run(feeds)["y"], want, atol=TOLERANCE, rtol=0)
    assert launches(cuda_plan(frontend.read(content), {"n": 3, "k": 40}))


def test_samples_that_depend_on_the_region_are_the_hosts() -> None:
    with pytest.raises(UnsupportedOp, match="RoiAlign"):
        engine.load(regions_model(16, output_height=2, output_width=2), device="cpu", strict=True)
