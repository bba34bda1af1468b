"""Fourier transforms on the CPU target beside NumPy's, sequences that are turned around, and their plans for a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest

import engine
from engine import frontend
from engine.ir import ops
from tests.engine.targets.cuda.planning import cuda_plan, launches

Arrays = Mapping[str, np.ndarray]


def run(text: str, feeds: Arrays, weights: Arrays, opset: int = 20) -> np.ndarray:
    """The output, on kernels only; the plan for a GPU has kernels only, too."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> test {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    content = proto.SerializeToString()
    with engine.load(content, device="cpu", strict=True) as model:
        (result,) = model.run(feeds).values()
    plan = cuda_plan(frontend.read(content), {})
    assert not any(isinstance(step.op, ops.Opaque) for step in plan.steps)
    assert launches(plan)
    return result


def pairs(x: np.ndarray) -> np.ndarray:
    return np.stack([x.real, x.imag], -1).astype(np.float32)


@pytest.mark.parametrize("length", [None, 9, 16])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("onesided", [0, 1])
def test_transforms(length: int | None, parts: int, onesided: int) -> None:
    """Of signals that are as long as the transform, longer (cut) and shorter (padded)."""
    x = np.random.default_rng(0).standard_normal((3, 12, 2, parts)).astype(np.float32)
    signal = x[..., 0] + (1j * x[..., 1] if parts == 2 else 0)
    expected = pairs(np.fft.fft(signal, length, axis=1))
    if onesided:
        expected = expected[:, : expected.shape[1] // 2 + 1]
    given, weights = ("l", {"l": np.array(length)}) if length else ("", {})
    text = f"(float[3,12,2,{parts}] x) => (float[a,b,c,d] y) {{ y = DFT<onesided={onesided}>(x, {given}, axis) }}"
    got = run(text, {"x": x}, {**weights, "axis": np.array(1)})
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("length", [None, 11, 16])
def test_inverse_transforms(length: int | None) -> None:
    x = np.random.default_rng(0).standard_normal((2, 7, 2)).astype(np.float32)
    given, weights = ("l", {"l": np.array(length)}) if length else ("", {})
    signal = x[..., 0] + 1j * x[..., 1]
    for onesided, expected in ((0, pairs(np.fft.ifft(signal, length))), (1, np.fft.irfft(signal, length)[..., None])):
        text = f"(float[2,7,2] x) => (float[a,b,c] y) {{ y = DFT<inverse=1, onesided={onesided}>(x, {given}) }}"
        np.testing.assert_allclose(run(text, {"x": x}, weights), expected, atol=1e-6)


@pytest.mark.parametrize("onesided", [0, 1])
def test_frames_of_a_signal(onesided: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 100)).astype(np.float32)
    window = np.hanning(24).astype(np.float32)
    frames = np.stack([x[:, at : at + 24] * window for at in range(0, 100 - 23, 10)], 1)
    expected = pairs(np.fft.rfft(frames) if onesided else np.fft.fft(frames))
    text = f"(float[2,100,1] x) => (float[a,b,c,d] y) {{ y = STFT<onesided={onesided}>(x, step, window) }}"
    got = run(text, {"x": x[..., None]}, {"step": np.array(10), "window": window}, 17)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("time", [0, 1])
def test_sequences_are_turned_around(time: int) -> None:
    x = np.random.default_rng(0).standard_normal((5, 4, 3) if time == 0 else (4, 5, 3)).astype(np.float32)
    lengths = np.array([5, 1, 3, 4])
    expected = x.copy()
    for i, length in enumerate(lengths):
        if time == 0:
            expected[:length, i] = x[:length, i][::-1]
        else:
            expected[i, :length] = x[i, :length][::-1]
    attributes = f"batch_axis={1 - time}, time_axis={time}"
    shape = ",".join(map(str, x.shape))
    text = f"(float[{shape}] x, int64[4] l) => (float[a,b,c] y) {{ y = ReverseSequence<{attributes}>(x, l) }}"
    np.testing.assert_array_equal(run(text, {"x": x, "l": lengths}, {}), expected)


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_rows_are_written_into_a_cache(mode: str) -> None:
    rng = np.random.default_rng(0)
    cache, update = (rng.standard_normal((3, 2, size, 8)).astype(np.float32) for size in (6, 2))
    starts = np.array([0, 4, 3] if mode == "linear" else [5, 4, 11])
    expected = cache.copy()
    for i, start in enumerate(starts):
        expected[i][:, (start + np.arange(2)) % 6] = update[i]
    text = (
        "(float[3,2,6,8] c, float[3,2,2,8] u, int64[3] s) => (float[3,2,6,8] y) "
        f'{{ y = TensorScatter<mode="{mode}">(c, u, s) }}'
    )
    np.testing.assert_array_equal(run(text, {"c": cache, "u": update, "s": starts}, {}, 24), expected)
