"""Operators that the default models do not have, on the GPU: whole small models in fp32 against the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest

import engine
from tests.gpu.conftest import relative_error

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-5  # relative L2, fp32 on both sides; recurrent states go through tanh and exp of their own


@dataclass(frozen=True)
class Sample:
    """A model as ONNX text, its weights by shape (or as they are), and its feeds by shape."""

    text: str
    weights: dict[str, tuple[int, ...] | np.ndarray] = field(default_factory=dict)
    feeds: dict[str, tuple[int, ...] | np.ndarray] = field(default_factory=dict)
    opset: int = 20
    on_host: int = 0


IMAGE = {"x": (2, 16, 9, 11)}
SAMPLES = {
    "pad": Sample(
        "(float[n,16,9,11] x) => (float[a,b,c,d] y) { p = Pad<mode=\"reflect\">(x, w) y = Relu(p) }",
        {"w": np.array([0, 0, 1, 2, 0, 0, 3, 1])}, IMAGE,
    ),
    "resize": Sample(
        "(float[n,16,9,11] x) => (float[a,b,c,d] y) { r = Resize<mode=\"linear\">(x, , s) y = Relu(r) }",
        {"s": np.array([1, 1, 2, 1.5], np.float32)}, IMAGE,
    ),
    "gather": Sample(
        "(float[n,5,40] x, int64[k] i) => (float[n,5,k] y) { g = Gather<axis=2>(x, i) y = Relu(g) }",
        {}, {"x": (3, 5, 40), "i": np.array([0, -1, 7, -40])},
    ),
    "gather elements": Sample(
        "(float[4,6] x, int64[4,3] i) => (float[4,3] y) { y = GatherElements<axis=1>(x, i) }",
        {}, {"x": (4, 6), "i": np.array([[0, 1, -1]] * 4)},
    ),
    "scatter": Sample(
        "(float[9,64] x, int64[3,1] i, float[3,64] u) => (float[9,64] y) "
        "{ s = ScatterND(x, i, u) t = ScatterND<reduction=\"add\">(s, i, u) y = Relu(t) }",
        {}, {"x": (9, 64), "i": np.array([[2], [-1], [0]]), "u": (3, 64)},
    ),
    "top k": Sample(
        "(float[n,1000] x) => (float[n,k] y, int64[n,k] z) { y, z = TopK(x, k) }",
        {"k": np.array([50])}, {"x": (4, 1000)},
    ),
    "sort": Sample(
        "(float[n,3000] x) => (float[n,k] y, int64[n,k] z) { y, z = TopK<largest=0>(x, k) }",
        {"k": np.array([3000])}, {"x": (2, 3000)},
    ),
    "grid sample": Sample(
        "(float[n,16,9,11] x, float[n,5,7,2] g) => (float[a,b,c,d] y) "
        "{ y = GridSample<padding_mode=\"border\">(x, g) }",
        {}, {**IMAGE, "g": (2, 5, 7, 2)},
    ),
    "running sum": Sample(
        "(float[n,5000] x) => (float[n,5000] y) { y = CumSum<exclusive=1>(x, a) }", {"a": np.array(1)}, {"x": (3, 5000)}
    ),
    "lstm": Sample(
        "(float[s,n,24] x) => (float[s,2,n,64] y, float[2,n,64] h, float[2,n,64] c) "
        "{ y, h, c = LSTM<hidden_size=64,direction=\"bidirectional\">(x, w, r, b) }",
        {"w": (2, 256, 24), "r": (2, 256, 64), "b": (2, 512)}, {"x": (13, 5, 24)},
    ),
    "wide lstm": Sample(
        "(float[s,n,24] x) => (float[s,1,n,600] y, float[1,n,600] h) { y, h = LSTM<hidden_size=600>(x, w, r, b) }",
        {"w": (1, 2400, 24), "r": (1, 2400, 600), "b": (1, 4800)}, {"x": (20, 3, 24)},
    ),
    "gru": Sample(
        "(float[s,n,24] x) => (float[s,1,n,300] y) "
        "{ y = GRU<hidden_size=300,direction=\"reverse\",linear_before_reset=1>(x, w, r, b) }",
        {"w": (1, 900, 24), "r": (1, 900, 300), "b": (1, 1800)}, {"x": (9, 2, 24)},
    ),
    "gru of different lengths": Sample(
        "(float[s,n,24] x, int32[n] l) => (float[s,2,n,64] y, float[2,n,64] h) "
        "{ y, h = GRU<hidden_size=64,direction=\"bidirectional\",linear_before_reset=1>(x, w, r, b, l) }",
        {"w": (2, 192, 24), "r": (2, 192, 64), "b": (2, 384)},
        {"x": (9, 4, 24), "l": np.array([9, 2, 5, 1], np.int32)}, opset=14,
    ),
    "places of maxima": Sample(
        "(float[n,16,9,11] x) => (float[a,b,c,d] y, int64[a,b,c,d] i) "
        "{ y, i = MaxPool<kernel_shape=[3,2],strides=[2,2],pads=[1,0,1,1]>(x) }", {}, IMAGE,
    ),
    "pooled and put back": Sample(
        "(float[n,16,8,10] x) => (float[n,16,8,10] y) { p, i = MaxPool<kernel_shape=[2,2],strides=[2,2]>(x) "
        "q = Relu(p) y = MaxUnpool<kernel_shape=[2,2],strides=[2,2]>(q, i) }", {}, {"x": (2, 16, 8, 10)},
    ),
    "blocks": Sample(
        "(float[n,27,16] x) => (float[n,3,6,6] y) { y = Col2Im(x, s, k) }",
        {"s": np.array([6, 6]), "k": np.array([3, 3])}, {"x": (2, 27, 16)},
    ),
    "fourier": Sample(
        "(float[n,200,1] x) => (float[n,101,2] y) { y = DFT<onesided=1>(x, , a) }",
        {"a": np.array(1)}, {"x": (5, 200, 1)},
    ),
    "inverse fourier": Sample(
        "(float[n,64,2] x) => (float[n,64,2] y) { y = DFT<inverse=1>(x, , a) }", {"a": np.array(1)}, {"x": (5, 64, 2)}
    ),
    "spectrogram": Sample(
        "(float[n,1600,1] x) => (float[n,a,201,2] y) { y = STFT(x, s, w) }",
        {"s": np.array(160), "w": np.hanning(400).astype(np.float32)}, {"x": (2, 1600, 1)},
    ),
    "smaller image": Sample(
        "(float[n,16,9,11] x) => (float[a,b,4,5] y) { y = Resize<mode=\"cubic\",antialias=1>(x, , , s) }",
        {"s": np.array([2, 16, 4, 5])}, IMAGE,
    ),
    "turned sequences": Sample(
        "(float[7,n,5] x, int64[n] l) => (float[7,n,5] y) { y = ReverseSequence(x, l) }",
        {}, {"x": (7, 3, 5), "l": np.array([7, 2, 4])},
    ),
    "cache": Sample(
        "(float[n,4,16,8] c, float[n,4,3,8] u, int64[n] s) => (float[n,4,16,8] y) "
        "{ y = TensorScatter<mode=\"circular\">(c, u, s) }",
        {}, {"c": (2, 4, 16, 8), "u": (2, 4, 3, 8), "s": np.array([15, 4])}, opset=24,
    ),
    "windows": Sample(
        "(float[n,8,8,64] x) => (float[n,8,8,64] y) { a = Reshape(x, w) b = Transpose<perm=[0,1,3,2,4,5]>(a) "
        "c = Reshape(b, r) d = MatMul(c, k) e = Relu(d) f = MatMul(e, l) g = Reshape(f, p) "
        "h = Transpose<perm=[0,1,3,2,4,5]>(g) i = Reshape(h, m) y = Add(x, i) }",
        {"w": np.array([-1, 2, 4, 2, 4, 64]), "r": np.array([-1, 16, 64]), "p": np.array([-1, 2, 2, 4, 4, 64]),
         "m": np.array([-1, 8, 8, 64]), "k": (64, 128), "l": (128, 64)}, {"x": (3, 8, 8, 64)},
    ),
    "regions": Sample(
        "(float[n,16,9,11] x, float[k,4] b, int64[k] i) => (float[k,16,3,3] y) "
        "{ y = RoiAlign<output_height=3,output_width=3,sampling_ratio=2>(x, b, i) }",
        {}, {**IMAGE, "b": np.array([[0, 0, 5, 5], [2, 1, 9, 7]], np.float32), "i": np.array([1, 0])},
        opset=16,
    ),
    "determinant": Sample(
        "(float[n,4,4] x) => (float[n] y) { a = Relu(x) d = Det(a) y = Tanh(d) }", {}, {"x": (6, 4, 4)}, on_host=1
    ),
}  # fmt: skip


def built(sample: Sample) -> bytes:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {sample.opset}]> test {sample.text}')
    for name, given in sample.weights.items():
        array = given if isinstance(given, np.ndarray) else rng.standard_normal(given) / np.sqrt(given[-1])
        array = array if isinstance(given, np.ndarray) else array.astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    serialised: bytes = proto.SerializeToString()
    return serialised


@pytest.mark.parametrize("name", SAMPLES)
def test_a_model_matches_the_cpu(name: str) -> None:
    sample = SAMPLES[name]
    rng = np.random.default_rng(1)
    feeds = {
        key: given if isinstance(given, np.ndarray) else rng.standard_normal(given).astype(np.float32)
        for key, given in sample.feeds.items()
    }
    with (
        engine.load(built(sample), device="cuda", precision="fp32") as gpu,
        engine.load(built(sample), device="cpu") as cpu,
    ):
        assert gpu.fallback_ops == sample.on_host
        for _ in range(3):  # graphs are replayed
            got, expected = gpu.run(feeds), cpu.run(feeds)
            for key, array in expected.items():
                assert got[key].shape == array.shape and got[key].dtype == array.dtype
                if array.dtype.kind == "i":
                    assert np.array_equal(got[key], array)
                else:
                    assert relative_error(got[key], array) <= TOLERANCE


def test_a_place_out_of_range_is_an_error_and_the_next_run_is_right() -> None:
    sample = SAMPLES["scatter"]
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((9, 64)), "u": rng.standard_normal((3, 64))}
    good = {name: array.astype(np.float32) for name, array in feeds.items()} | {"i": np.array([[0], [1], [2]])}
    with engine.load(built(sample), device="cuda", precision="fp32") as model:
        before = model.run(good)["y"]
        with pytest.raises(engine.ShapeError, match="out of range"):
            model.run(good | {"i": np.array([[0], [9], [2]])})
        assert np.array_equal(model.run(good)["y"], before)
