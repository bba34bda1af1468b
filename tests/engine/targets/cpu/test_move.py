"""Gather, concatenation and padding against NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import ShapeError
from engine.ir.dtype import DType
from engine.ir.ops import Concat, Gather, Pad, PadMode
from engine.plan.plan import Step
from engine.targets.cpu import concat
from engine.targets.cpu.codegen.isa import host_isa
from engine.targets.cpu.kernel import Context, WeightStore
from engine.targets.cpu.pad import Segment, segments
from tests.engine.targets.cpu.steps import ISAS, Layout, place, run_step

DTYPES = [DType.F32, DType.I64, DType.BOOL, DType.F16, DType.U8]


def _random(shape: tuple[int, ...], dtype: DType = DType.F32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2 if dtype is DType.BOOL else 99, shape).astype(dtype.numpy)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.value)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order", [None, (2, 0, 1)])
def test_gather_along_any_axis(order: tuple[int, ...] | None, axis: int, dtype: DType, isa: str) -> None:
    x = _random((6, 7, 40), dtype)
    for index in (np.random.default_rng(1).integers(-6, 6, (3, 2)), np.arange(5, dtype=np.int32), np.array(-2)):
        result = run_step(Gather(axis), [place(x, Layout(order)), index], isa)
        np.testing.assert_array_equal(result.outputs[0], np.take(x, index, axis))
        assert result.status == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("bad", [-41, 40, 2**60])
def test_gather_out_of_range_is_reported(bad: int, axis: int) -> None:
    assert run_step(Gather(axis), [_random((6, 7, 40)), np.array([0, bad])]).status == 1


def test_gather_from_nothing_is_refused() -> None:
    with pytest.raises(ShapeError, match="axis of size 0"):
        run_step(Gather(0), [np.zeros((0, 3), np.float32), np.array([0])])
    assert run_step(Gather(0), [np.zeros((0, 3), np.float32), np.zeros(0, np.int64)]).outputs[0].shape == (0, 3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.value)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_concat_copies_every_input_to_its_slice(axis: int, dtype: DType, isa: str) -> None:
    parts = [_random(tuple(n if i == axis else s for i, s in enumerate((3, 4, 5))), dtype) for n in (2, 1, 0, 17)]
    result = run_step(Concat(axis), [place(parts[0], Layout((2, 1, 0))), *parts[1:]], isa, [Layout((1, 0, 2), gap=3)])
    np.testing.assert_array_equal(result.outputs[0], np.concatenate(parts, axis))


def test_concat_of_inputs_in_place_needs_no_launch() -> None:
    whole = place(_random((4, 6)))
    left, right = replace(whole, shape=(4, 2)), replace(whole, shape=(4, 4), offset=whole.offset + 2)
    op = Concat(1)
    step = Step("concat", op, (left, right), (whole,), op.cost((left, right), (whole,)))
    assert concat.lower(step, Context(host_isa(), 1, WeightStore())) == []


PADS = [
    ((3, 7, 9), ((1, 2), (0, 3), (2, 0))),
    ((3, 7, 9), ((-1, 2), (2, -3), (-2, 0))),
    ((5,), ((4, 4),)),
    ((2, 3), ((7, 5), (8, 9))),
    ((1, 3, 20, 20), ((0, 0), (0, 0), (1, 1), (1, 1))),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.value)
@pytest.mark.parametrize("mode", [mode for mode in PadMode if mode is not PadMode.ROLL])
@pytest.mark.parametrize(("shape", "pads"), PADS)
def test_pad_matches_numpy(
    shape: tuple[int, ...], pads: tuple[tuple[int, int], ...], mode: PadMode, dtype: DType, isa: str
) -> None:
    x = _random(shape, dtype)
    kept = x[tuple(slice(max(0, -b), n - max(0, -e)) for n, (b, e) in zip(shape, pads, strict=True))]
    extra = {"constant_values": 1} if mode is PadMode.CONSTANT else {}
    expected = np.pad(kept, [(max(0, b), max(0, e)) for b, e in pads], mode=mode.value, **extra)  # type: ignore[call-overload]
    result = run_step(Pad(pads, mode, 1), [x], isa)
    np.testing.assert_array_equal(result.outputs[0], expected)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_rolled_out_comes_in_at_the_other_end(isa: str) -> None:
    x = _random((3, 7, 9), DType.F32)
    result = run_step(Pad(((0, 0), (3, -3), (-2, 2)), PadMode.ROLL), [x], isa)
    np.testing.assert_array_equal(result.outputs[0], np.roll(x, (3, -2), (1, 2)))


def test_reflection_walks_backwards_in_one_segment() -> None:
    assert segments(5, 3, 0, PadMode.REFLECT) == [Segment(0, 4, 3, -1), Segment(4, 4, 1, 1)]


def test_padding_nothing_with_its_edge_is_refused() -> None:
    with pytest.raises(ShapeError, match="nothing to edge"):
        run_step(Pad(((1, 1),), PadMode.EDGE), [np.zeros(0, np.float32)])
