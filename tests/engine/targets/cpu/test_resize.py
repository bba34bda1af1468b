"""Resize against the formulas of the ONNX operator, evaluated by ONNX's reference where it is to be trusted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Resize, ResizeMode
from tests.engine.targets.cpu.steps import ISAS, Layout, place, run_step

NHWC = (0, 2, 3, 1)
COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"]
ROUNDINGS = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
SEVEN_TENTHS = float(np.float32(0.7))  # scales are float32 in a model
SHAPES = [
    ((1, 3, 6, 7), (1, 3, 12, 14), (1.0, 1.0, 2.0, 2.0)),
    ((2, 5, 6, 7), (2, 5, 9, 4), None),
    ((1, 40, 8, 8), (1, 40, 5, 5), (1.0, 1.0, SEVEN_TENTHS, SEVEN_TENTHS)),
    ((3, 4), (6, 4), (2.0, 1.0)),
]


def _onnx(x: np.ndarray, shape: tuple[int, ...], scales: tuple[float, ...] | None, **attributes: object) -> np.ndarray:
    helper = pytest.importorskip("onnx.helper")
    reference = pytest.importorskip("onnx.reference")
    sizes = np.array(shape, np.int64) if scales is None else np.array(scales, np.float32)
    names = ["x", "", "", "z"] if scales is None else ["x", "", "z"]
    graph = helper.make_graph(
        [helper.make_node("Resize", names, ["y"], **attributes)], "g",
        [helper.make_tensor_value_info("x", 1, x.shape),
         helper.make_tensor_value_info("z", 7 if scales is None else 1, sizes.shape)],
        [helper.make_tensor_value_info("y", 1, None)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    return reference.ReferenceEvaluator(model).run(None, {"x": x, "z": sizes})[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", [ResizeMode.LINEAR, ResizeMode.CUBIC])
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("antialias", [False, True])
def test_filters_of_smaller_images(isa: str, mode: ResizeMode, exclude: bool, antialias: bool) -> None:
    """Along both axes at once (of which one grows), and an innermost axis that shrinks nine times."""
    for shape, target, order in (((1, 3, 11, 7), (1, 3, 4, 10), NHWC), ((2, 5, 63), (2, 5, 7), None)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        attributes = {"mode": mode.value, "antialias": int(antialias), "exclude_outside": int(exclude)}
        expected = _onnx(x, target, None, **attributes)
        op = Resize(target, (None,) * len(shape), mode, antialias=antialias, exclude_outside=exclude)
        result = run_step(op, [place(x, Layout(order))], isa, [Layout(order)]).outputs[0]
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_a_filter_that_is_too_long_is_refused() -> None:
    op = Resize((2,), (None,), ResizeMode.CUBIC, antialias=True)
    with pytest.raises(UnsupportedOp, match="antialias with a scale of 0.02"):
        run_step(op, [place(np.zeros(100, np.float32), Layout(None))], ISAS[0], [Layout(None)])


def _compare(
    mode: ResizeMode, coordinates: str, rounding: str, case: tuple[tuple[int, ...], tuple[int, ...], object], isa: str
) -> None:
    shape, target, scales = case
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = _onnx(
        x, target, scales, mode=mode.value, coordinate_transformation_mode=coordinates, nearest_mode=rounding  # type: ignore[arg-type]
    )  # fmt: skip
    op = Resize(target, scales or (None,) * len(shape), mode, coordinates, rounding)  # type: ignore[arg-type]
    for order in (None, NHWC) if len(shape) == 4 else (None,):
        result = run_step(op, [place(x, Layout(order))], isa, [Layout(order)]).outputs[0]
        np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("mode", [ResizeMode.LINEAR, ResizeMode.CUBIC])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_interpolation_matches_onnx(coordinates: str, mode: ResizeMode, case: tuple, isa: str) -> None:  # type: ignore[type-arg]
    _compare(mode, coordinates, "round_prefer_floor", case, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize(("coordinates", "rounding"), list(itertools.product(COORDINATES, ROUNDINGS)))
def test_nearest_matches_onnx(coordinates: str, rounding: str, case: tuple, isa: str) -> None:  # type: ignore[type-arg]
    _compare(ResizeMode.NEAREST, coordinates, rounding, case, isa)


@pytest.mark.parametrize("dtype", [DType.U8, DType.I64, DType.F16, DType.BOOL], ids=lambda d: d.value)
def test_nearest_copies_any_dtype(dtype: DType) -> None:
    x = np.random.default_rng(0).integers(0, 2, (1, 3, 5, 20)).astype(dtype.numpy)
    op = Resize((1, 3, 10, 40), (None,) * 4, ResizeMode.NEAREST, "asymmetric", "floor", stores=(ex.Acc(dtype),))
    np.testing.assert_array_equal(run_step(op, [x]).outputs[0], x.repeat(2, 2).repeat(2, 3))


def test_same_size_is_a_copy() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    result = run_step(Resize((2, 3, 4), (None,) * 3, ResizeMode.LINEAR), [x])
    np.testing.assert_array_equal(result.outputs[0], x)


def test_unknown_modes_are_refused() -> None:
    x = np.ones((2, 2), np.float32)
    with pytest.raises(UnsupportedOp, match="tf_crop_and_resize"):
        run_step(Resize((4, 4), (None, None), ResizeMode.LINEAR, "tf_crop_and_resize"), [x])
    with pytest.raises(UnsupportedOp, match="sideways"):
        run_step(Resize((4, 4), (None, None), ResizeMode.NEAREST, "asymmetric", "sideways"), [x])
