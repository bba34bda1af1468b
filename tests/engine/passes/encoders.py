"""Small encoders of token ids and mask as ONNX text, for the tests of `unpad`: one attention between what makes the
mask (`BIAS`, and spellings in the tests) and what is done with its result (a tail)."""

from __future__ import annotations

import numpy as np
import onnx

from tests.engine.passes.toolkit import model, random

HEADS, D = 3, 4
H = HEADS * D
ROWS = 20
POSITIONS = 16
LOWEST = float(np.finfo(np.float64).min)

WEIGHTS = {
    "table": random(ROWS, H, seed=1),
    "type_table": random(2, H, seed=11),
    "position_table": random(POSITIONS, H, seed=2),
    "wq": random(H, H, seed=3, scale=0.5),
    "wk": random(H, H, seed=4, scale=0.5),
    "wv": random(H, H, seed=5, scale=0.5),
    "wo": random(H, H, seed=6, scale=0.5),
    "bv": random(H, seed=7),
    "g": random(H, seed=8),
    "cut": np.array([0, 0, HEADS, D]),
    "merge": np.array([0, 0, H]),
    "scale": np.array(D**-0.5),
    "lowest": np.array(LOWEST),
    "minus_inf": np.array(-np.inf),
    "minus_10000": np.array(-10000.0),
    "ten_thousand": np.array(10000.0),
    "zero": np.array(0.0),
    "one": np.array(1.0),
    "zero_i": np.array(0),
    "one_i": np.array(1),
    "zero_1": np.array([0]),
    "one_1": np.array([1]),
    "two_1": np.array([2]),
    "minus_one_1": np.array([-1]),
    "axes_0": np.array([0]),
    "axes_1": np.array([1]),
    "axes_2": np.array([2]),
    "axes_last": np.array([-1]),
    "axes_01": np.array([0, 1]),
    "axes_12": np.array([1, 2]),
    "axes_13": np.array([1, 3]),
    "tiny": np.array(1e-9),
    "along_0": np.array([-1, 1, 1, 1]),
    "along_3": np.array([1, 1, 1, -1]),
    "flat": np.array([-1, H]),
    "cosines": np.cos(random(POSITIONS, D, seed=12)),
    "sines": np.sin(random(POSITIONS, D, seed=12)),
    "triangle": np.tril(np.ones((1, 1, POSITIONS, POSITIONS), np.bool_)),
    "relative": random(1, HEADS, POSITIONS, POSITIONS, seed=9),
    "filter": random(H, H, 3, seed=10, scale=0.3),
    "point": random(H, H, 1, seed=13, scale=0.3),
    "grouped_point": random(H, D, 1, seed=14, scale=0.3),
}
POSITION_EMBEDDING = """sh = Shape(ids) s1 = Slice(sh, one_1, two_1, zero_1) ps = Slice(position_table, zero_1, s1,
zero_1) pe = Unsqueeze(ps, axes_0) """
EMBEDDING = POSITION_EMBEDDING + "we = Gather(table, ids) e = Add(we, pe) x = LayerNormalization<axis=-1>(e, g) "
PROJECT = """pq = MatMul(x, wq) pk = MatMul(x, wk) pw = MatMul(x, wv) pv = Add(pw, bv) cq = Reshape(pq, cut)
    ck = Reshape(pk, cut) cv = Reshape(pv, cut) q = Transpose<perm=[0,2,1,3]>(cq) v = Transpose<perm=[0,2,1,3]>(cv)
    kt = Transpose<perm=[0,2,3,1]>(ck) s0 = MatMul(q, kt) u = Mul(s0, scale) """
BIAS = "m2 = Unsqueeze(mask, axes_12) mf = Cast<to=11>(m2) mi = Sub(one, mf) bias = Mul(mi, lowest) t = Add(u, bias) "
ATTEND = """p = Softmax<axis=-1>(t) o = MatMul(p, v) ot = Transpose<perm=[0,2,1,3]>(o) om = Reshape(ot, merge)
    oo = MatMul(om, wo) r = Add(oo, x) h = LayerNormalization<axis=-1>(r, g) """


def encoder(
    bias: str = BIAS,
    tail: str = "y = Identity(h)",
    outputs: str = "double[b,s,n] y",
    mask: str = "int64",
    extra: str = "",
    before: str = EMBEDDING,
) -> onnx.ModelProto:
    """ids and mask → outputs; `bias` makes the scores `t` of `u`, `tail` the outputs of the tokens `h`."""
    text = f"(int64[b,s] ids, {mask}[b,s] mask{extra}) => ({outputs}) {{ {before}{PROJECT}{bias}{ATTEND}{tail} }}"
    used = {name: array for name, array in WEIGHTS.items() if name in text}
    return model(text, used)


def lengths_mask(lengths: list[int], sequence: int) -> np.ndarray:
    """Ones and then zeros in every row."""
    return (np.arange(sequence) < np.array(lengths)[:, None]).astype(np.int64)


def in_float32(proto: onnx.ModelProto) -> bytes:
    """The model of float64 in float32, for a target."""
    wide, narrow = onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT
    for i, tensor in enumerate(proto.graph.initializer):
        if tensor.data_type == wide:
            array = np.clip(onnx.numpy_helper.to_array(tensor), -3.4e38, 3.4e38).astype(np.float32)
            proto.graph.initializer[i].CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in proto.graph.output:
        value.type.tensor_type.elem_type = narrow
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == wide:
                attribute.i = narrow
    return proto.SerializeToString()
