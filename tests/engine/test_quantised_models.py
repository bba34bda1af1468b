"""Models quantised to 8-bit floats, from the file to their outputs on the CPU, against `onnx.reference`."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

import engine
from engine.ir.dtype import DType

F8 = DType.F8E4M3


def network(rng: np.random.Generator, outputs: str = "float[n,16] y") -> onnx.ModelProto:
    """Two dense layers with a ReLU in between, quantised before each: weights per channel, activations as a whole."""
    text = f"""<ir_version: 10, opset_import: ["" : 21]> mlp (float[n,48] x) => ({outputs}) {{
        qx = QuantizeLinear(x, sx, z) dx = DequantizeLinear(qx, sx, z) dw = DequantizeLinear<axis=1>(w, sw)
        a = MatMul(dx, dw) b = Add(a, bias) h = Relu(b)
        qh = QuantizeLinear(h, sh, z) dh = DequantizeLinear(qh, sh, z) dv = DequantizeLinear<axis=0>(v, sv)
        y = Gemm<transB=1>(dh, dv)
    }}"""
    proto = onnx.parser.parse_model(text)
    weights = {
        "sx": np.array(0.01, np.float32), "sh": np.array(0.05, np.float32), "z": np.zeros((), F8.numpy),
        "w": F8.convert(rng.standard_normal((48, 32)).astype(np.float32) * 8), "bias": np.ones(32, np.float32),
        "sw": rng.uniform(0.01, 0.02, 32).astype(np.float32), "sv": rng.uniform(0.01, 0.02, 16).astype(np.float32),
        "v": F8.convert(rng.standard_normal((16, 32)).astype(np.float32) * 8),
    }  # fmt: skip
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def test_a_quantised_network_matches_the_reference() -> None:
    rng = np.random.default_rng(0)
    proto = network(rng)
    x = rng.standard_normal((9, 48)).astype(np.float32)
    (expected,) = ReferenceEvaluator(proto).run(None, {"x": x})
    with engine.load(proto.SerializeToString(), device="cpu") as model:
        got = model.run({"x": x})["y"]
    # A hidden value beside the middle of two numbers may be rounded the other way: by 1/8 of itself, one of 32 terms.
    assert np.linalg.norm(got - expected) <= 5e-3 * np.linalg.norm(expected)
    # Left out, rounding to 8 bits would show.
    with np.errstate(over="ignore"):
        exact = x @ (value(proto, "w") * value(proto, "sw")) + value(proto, "bias")
        unrounded = np.maximum(exact, 0) @ (value(proto, "v") * value(proto, "sv")[:, None]).T
    assert np.linalg.norm(unrounded - expected) > 1e-2 * np.linalg.norm(expected)


def value(proto: onnx.ModelProto, name: str) -> np.ndarray:
    array = next(numpy_helper.to_array(one) for one in proto.graph.initializer if one.name == name)
    return array.astype(np.float32)


def test_quantised_tensors_are_outputs_and_inputs() -> None:
    """As NumPy arrays of ml_dtypes' type."""
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[n,8] x, float8e4m3fn[n,8] q) =>
        (float8e4m3fn[n,8] y, float[n,8] d) { y = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) }"""
    try:
        proto = onnx.parser.parse_model(text)
    except onnx.parser.ParseError:  # of a version without the type's name in its texts
        proto = onnx.parser.parse_model(text.replace("float8e4m3fn", "uint8"))
        for info in (proto.graph.input[1], proto.graph.output[0]):
            info.type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN
    scale = np.array(0.5, np.float32)
    proto.graph.initializer.extend(
        [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(np.zeros((), F8.numpy), "z")]
    )
    x = np.array([[0, 1, -1, 500, -1e9, 0.001, 3.3, np.nan]], np.float32)
    q = np.arange(8, dtype=np.uint8).reshape(1, 8).view(F8.numpy)
    with engine.load(proto.SerializeToString(), device="cpu") as model:
        results = model.run({"x": x, "q": q})
    assert results["y"].dtype == F8.numpy
    np.testing.assert_array_equal(
        results["y"].astype(np.float32), np.clip(x / scale, -448, 448).astype(F8.numpy).astype(np.float32)
    )
    np.testing.assert_array_equal(results["d"], q.astype(np.float32) * scale)


@pytest.mark.parametrize("saturate", [0, 1])
def test_what_is_beyond_the_range(saturate: int) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 21]> g (float[n] x) => (float[n] y) {{
        q = QuantizeLinear<saturate={saturate}>(x, s, z) y = DequantizeLinear(q, s, z) }}"""
    proto = onnx.parser.parse_model(text)
    one = np.ones((), np.float32)
    proto.graph.initializer.extend(
        [numpy_helper.from_array(one, "s"), numpy_helper.from_array(np.zeros((), F8.numpy), "z")]
    )
    with engine.load(proto.SerializeToString(), device="cpu") as model:
        got = model.run({"x": np.array([448, 464, 465, -1000, np.inf], np.float32)})["y"]
    nan = np.nan
    np.testing.assert_array_equal(got, [448, 448, 448, -448, 448] if saturate else [448, 448, nan, nan, nan])
