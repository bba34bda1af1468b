"""Plans of what exporters write, as the CUDA target makes them: no copy between layouts, one step a fused operator.
Needs no GPU; what the plans compute is for the passes' own tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import pytest

from benchmarks.cases.memory import MemoryCase
from benchmarks.gpu.memory import attention
from engine import frontend
from engine.ir.dtype import DType
from engine.ir.ops import Gemm, Opaque
from engine.plan.plan import Plan
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.families import family_of
from engine.targets.cuda.kernel import Context, WeightStore, workspace_bytes
from engine.targets.cuda.product import product_of
from tests.engine.frontend import test_onnx_cases as onnx_cases
from tests.engine.targets.cuda.planning import copies, cuda_plan, launches

STORAGE = (DType.F16, DType.BF16, DType.F32)
BOTH = pytest.mark.parametrize("storage", STORAGE, ids=[dtype.value for dtype in STORAGE])


def random(*shape: int) -> np.ndarray:
    return (np.random.default_rng(shape).standard_normal(shape) * 0.3).astype(np.float32)


def plan_of(text: str, weights: Mapping[str, np.ndarray], storage: DType, opset: int = 17, **sizes: int) -> Plan:
    """The plan, every step of which has kernels."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> test {text}')
    for name, array in weights.items():
        if name in text:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    plan = cuda_plan(frontend.read(proto.SerializeToString()), sizes, storage)
    assert launches(plan)
    return plan


def kinds(plan: Plan) -> Counter[str]:
    return Counter(step.op.name for step in plan.steps)


IMAGE = {
    "k_first": random(16, 3, 3, 3), "k_depth": random(16, 1, 3, 3), "k_wide": random(32, 16, 1, 1),
    "k_other": random(32, 16, 1, 1)[::-1], "k_third": random(32, 32, 3, 3), "k_same": random(32, 32, 1, 1),
    "w_class": random(32, 10), "b_class": random(10), "scale16": random(16) + 1, "shift16": random(16),
    "shift32": random(32), "zero": np.float32(0), "six": np.float32(6), "factor": np.float32(1 / 127.5),
    "mean": np.float32(127.5), "pads": np.array([0, 0, 0, 0, 0, 1, 1, 0]), "twice": np.array([1, 1, 2, 2], np.float32),
    "squeeze": random(8, 32, 1, 1), "excite": random(32, 8, 1, 1), "row": np.array([-1, 1, 1, 32]),
    "k_joined": random(16, 48, 3, 3), "k_up": random(32, 16, 2, 2),
}  # fmt: skip

# As tf2onnx writes a MobileNet: every image NHWC, every convolution between two transpositions, padding by a node.
MOBILE = """(float[n,32,32,3] x) => (float[n,10] y) {
    p = Pad(x, pads) t1 = Transpose<perm=[0,3,1,2]>(p) c1 = Conv<strides=[2,2]>(t1, k_first)
    u1 = Transpose<perm=[0,2,3,1]>(c1) m1 = Mul(u1, scale16) a1 = Add(m1, shift16) r1 = Clip(a1, zero, six)
    t2 = Transpose<perm=[0,3,1,2]>(r1) c2 = Conv<group=16, pads=[1,1,1,1]>(t2, k_depth)
    u2 = Transpose<perm=[0,2,3,1]>(c2) m2 = Mul(u2, scale16) a2 = Add(m2, shift16) r2 = Clip(a2, zero, six)
    t3 = Transpose<perm=[0,3,1,2]>(r2) c3 = Conv(t3, k_wide) u3 = Transpose<perm=[0,2,3,1]>(c3) a3 = Add(u3, shift32)
    t4 = Transpose<perm=[0,3,1,2]>(a3) c4 = Conv<pads=[1,1,1,1]>(t4, k_third) u4 = Transpose<perm=[0,2,3,1]>(c4)
    r4 = Relu(u4) s = Add(r4, a3) g = ReduceMean<axes=[1,2], keepdims=0>(s) l = MatMul(g, w_class)
    y = Add(l, b_class) }"""
# The same in half precision by casts around every operator.
CASTS = """(float[n,32,32,3] x) => (float[n,10] y) {
    t1 = Transpose<perm=[0,3,1,2]>(x) c1 = Conv<strides=[2,2], pads=[1,1,1,1]>(t1, k_first) h1 = Cast<to=10>(c1)
    f1 = Cast<to=1>(h1) u1 = Transpose<perm=[0,2,3,1]>(f1) a1 = Add(u1, shift16) r1 = Relu(a1) h2 = Cast<to=10>(r1)
    f2 = Cast<to=1>(h2) t2 = Transpose<perm=[0,3,1,2]>(f2) c2 = Conv(t2, k_wide) u2 = Transpose<perm=[0,2,3,1]>(c2)
    h3 = Cast<to=10>(u2) f3 = Cast<to=1>(h3) g = ReduceMean<axes=[1,2], keepdims=0>(f3) l = MatMul(g, w_class)
    y = Add(l, b_class) }"""
# Bytes of a photo in, a pool between NHWC convolutions.
PHOTO = """(uint8[n,32,32,3] x) => (float[n,10] y) {
    f = Cast<to=1>(x) d = Sub(f, mean) e = Mul(d, factor) t1 = Transpose<perm=[0,3,1,2]>(e)
    c1 = Conv<strides=[2,2], pads=[1,1,1,1]>(t1, k_first) u1 = Transpose<perm=[0,2,3,1]>(c1) a1 = Add(u1, shift16)
    r1 = Relu(a1) t2 = Transpose<perm=[0,3,1,2]>(r1) q = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[0,0,1,1]>(t2)
    c2 = Conv(q, k_wide) g = GlobalAveragePool(c2) v = Flatten(g) l = MatMul(v, w_class) y = Add(l, b_class) }"""
# Squeeze and excitation in NHWC: the factors go through a reshape and two transpositions.
SQUEEZE = """(float[n,16,16,3] x) => (float[n,10] y) {
    t1 = Transpose<perm=[0,3,1,2]>(x) c0 = Conv<pads=[1,1,1,1]>(t1, k_first) c1 = Conv(c0, k_wide)
    u1 = Transpose<perm=[0,2,3,1]>(c1) s1 = Sigmoid(u1) w1 = Mul(u1, s1) p = ReduceMean<axes=[1,2], keepdims=0>(w1)
    p1 = Reshape(p, row) p2 = Transpose<perm=[0,3,1,2]>(p1) q = Conv(p2, squeeze) q1 = Relu(q) q2 = Conv(q1, excite)
    q3 = Transpose<perm=[0,2,3,1]>(q2) q4 = Sigmoid(q3) z = Mul(w1, q4) t2 = Transpose<perm=[0,3,1,2]>(z)
    c2 = Conv(t2, k_same) g = GlobalAveragePool(c2) v = Flatten(g) l = MatMul(v, w_class) y = Add(l, b_class) }"""


@BOTH
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MOBILE, {"Conv": 4, "Reduce": 1, "Gemm": 1}),
        (CASTS, {"Conv": 2, "Reduce": 1, "Gemm": 1}),
        (PHOTO, {"Pointwise": 1, "Conv": 2, "Pool": 1, "Reduce": 1, "Gemm": 1}),
        (SQUEEZE, {"Conv": 5, "Reduce": 2, "Pointwise": 1, "Gemm": 1}),
    ],
    ids=["padded mobile", "casts", "photo", "squeeze"],
)
def test_channels_last_exports_come_out_clean(text: str, expected: dict[str, int], storage: DType) -> None:
    rounded = Counter({"Pointwise": int(storage is not DType.F32 and text is not PHOTO)})  # the fp32 NHWC input
    for batch in (1, 4):
        plan = plan_of(text, IMAGE, storage, n=batch)
        assert kinds(plan) == Counter(expected) + rounded
        assert copies(plan) == []


@BOTH
def test_branches_of_an_inception_block_are_written_side_by_side(storage: DType) -> None:
    text = """(float[n,3,16,16] i) => (float[n,10] y) {
        x = Conv<pads=[1,1,1,1]>(i, k_first) a1 = Conv(x, k_wide) a = Relu(a1) b1 = Conv(x, k_other) b2 = Relu(b1)
        b3 = Conv<pads=[1,1,1,1]>(b2, k_third) b = Relu(b3) c1 = Conv(x, k_extra) c2 = Relu(c1)
        c3 = Conv<pads=[1,1,1,1]>(c2, k_third) c = Relu(c3) p = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)
        d1 = Conv(p, k_wide) d = Relu(d1) j = Concat<axis=1>(a, b, c, d) g = GlobalAveragePool(j) v = Flatten(g)
        y = MatMul(v, w_all) }"""
    plan = plan_of(text, IMAGE | {"k_extra": random(32, 16, 1, 1) + 1, "w_all": random(128, 10)}, storage, n=3)
    # Of the three 1×1 convolutions of one input two are one; the third writes into the concatenation.
    assert kinds(plan) == {"Conv": 6, "Pool": 1, "Reduce": 1, "Gemm": 1}
    assert copies(plan) == []


@BOTH
@pytest.mark.parametrize(
    "up", ["u = Resize<mode=\"linear\">(b, , twice)", "u = ConvTranspose<strides=[2,2]>(b, k_up)"],
    ids=["resize", "transposed"],
)  # fmt: skip
def test_skip_connections_take_no_copy(up: str, storage: DType) -> None:
    text = f"""(float[n,3,32,32] x) => (float[n,16] y) {{
        a1 = Conv<pads=[1,1,1,1]>(x, k_first) a = Relu(a1) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)
        b1 = Conv(p, k_wide) b = Relu(b1) {up} j = Concat<axis=1>(a, u) c = Conv<pads=[1,1,1,1]>(j, k_back)
        g = GlobalAveragePool(c) y = Flatten(g) }}"""
    joined = 48 if "Resize" in up else 32
    plan = plan_of(text, IMAGE | {"k_back": random(16, joined, 3, 3)}, storage, n=2)
    assert len(plan.steps) == 6
    assert copies(plan) == []


@pytest.mark.slow
def test_every_case_of_onnx_has_kernels_or_is_the_hosts() -> None:
    """Also in fp32, and with what decides shapes as constants; those with strings aside."""
    context = Context(SM_90A, 132, WeightStore())
    for case in onnx_cases.CASES:
        inputs, outputs = onnx_cases.data_sets(case)[0]
        plain = not any(isinstance(x, list) or x.dtype.kind in "OUS" for x in (*inputs, *outputs))
        if not plain or onnx_cases.reason(case.name) is not None:
            continue
        for storage in (DType.F16, DType.F32):
            plan = cuda_plan(onnx_cases.read_case(case, inputs)[1], {}, storage)
            for step in plan.steps:
                if not isinstance(step.op, Opaque):
                    family_of(step.op).lower(step, context)


TOKENS = {
    "gain": random(64) + 1, "shift": random(64), "w_q": random(64, 64), "w_k": random(64, 64) + 1,
    "w_v": random(64, 64) - 1, "w_o": random(64, 64) * 2, "b_q": random(64), "b_k": random(64) + 1,
    "b_v": random(64) - 1, "b_o": random(64) * 2, "w_up": random(64, 256), "b_up": random(256),
    "w_down": random(256, 64), "heads": np.array([0, 0, 4, 16]), "flat": np.array([0, 0, 64]), "root": np.float32(4),
    "w_qkv": random(64, 192), "b_qkv": random(192), "windows": np.array([-1, 2, 4, 2, 4, 64]),
    "rows": np.array([-1, 16, 64]), "parts": np.array([0, 16, 3, 4, 16]), "apart": np.array([-1, 2, 2, 4, 4, 64]),
    "image": np.array([-1, 8, 8, 64]), "near": random(1, 4, 16, 16), "i_q": np.array(0), "i_k": np.array(1),
    "i_v": np.array(2), "joined": np.array([0, 16, 64]),
}  # fmt: skip
LAYERS = """l2 = LayerNormalization(r, gain, shift) f1 = MatMul(l2, w_up) f2 = Add(f1, b_up) f3 = Relu(f2)
    f4 = MatMul(f3, w_down) f5 = Add(f4, b_o) y = Add(r, f5) }"""
PROJECTIONS = """(float[n,s,64] x) => (float[n,s,64] y) { l1 = LayerNormalization(x, gain, shift)
    q1 = MatMul(l1, w_q) q2 = Add(q1, b_q) k1 = MatMul(l1, w_k) k2 = Add(k1, b_k) v1 = MatMul(l1, w_v) v2 = Add(v1, b_v)
    q3 = Reshape(q2, heads) q = Transpose<perm=[0,2,1,3]>(q3) k3 = Reshape(k2, heads) k = Transpose<perm=[0,2,3,1]>(k3)
    v3 = Reshape(v2, heads) v = Transpose<perm=[0,2,1,3]>(v3) s1 = MatMul(q, k) s2 = Div(s1, root) s3 = Softmax(s2)
    o1 = MatMul(s3, v) o2 = Transpose<perm=[0,2,1,3]>(o1) o3 = Reshape(o2, flat) o4 = MatMul(o3, w_o) o5 = Add(o4, b_o)
    r = Add(x, o5) """
WINDOWS = """(float[n,8,8,64] x) => (float[n,8,8,64] y) { l1 = LayerNormalization(x, gain, shift)
    w1 = Reshape(l1, windows) w2 = Transpose<perm=[0,1,3,2,4,5]>(w1) w3 = Reshape(w2, rows) p1 = MatMul(w3, w_qkv)
    p2 = Add(p1, b_qkv) p3 = Reshape(p2, parts) p4 = Transpose<perm=[2,0,3,1,4]>(p3) q = Gather(p4, i_q)
    k1 = Gather(p4, i_k) v = Gather(p4, i_v) k = Transpose<perm=[0,1,3,2]>(k1) q2 = Div(q, root) s1 = MatMul(q2, k)
    s2 = Add(s1, near) s3 = Softmax(s2) o1 = MatMul(s3, v) o2 = Transpose<perm=[0,2,1,3]>(o1) o3 = Reshape(o2, joined)
    o4 = MatMul(o3, w_o) o5 = Add(o4, b_o) b1 = Reshape(o5, apart) b2 = Transpose<perm=[0,1,3,2,4,5]>(b1)
    b3 = Reshape(b2, image) r = Add(x, b3) """


@BOTH
def test_shifted_windows_take_a_step_there_and_one_back(storage: DType) -> None:
    """`torch.roll` along both axes is four slices and two concatenations."""

    def rolled(x: str, y: str, by: str) -> str:
        along = []
        for axis, source, result in (("one", x, f"{y}0"), ("two", f"{y}0", y)):
            a, b = f"{result}a", f"{result}b"
            along.append(f"{a} = Slice({source}, {by}, far, {axis}) {b} = Slice({source}, zero, {by}, {axis})")
            along.append(f"{result} = Concat<axis={1 + (axis == 'two')}>({a}, {b})")
        return " ".join(along)

    text = WINDOWS.replace("w1 = Reshape(l1", f"{rolled('l1', 'there', 'two')} w1 = Reshape(there")
    text = text.replace("r = Add(x, b3)", f"{rolled('b3', 'back', 'minus')} r = Add(x, back)")
    numbers = {"one": [1], "two": [2], "minus": [-2], "zero": [0], "far": [2**31]}
    weights = TOKENS | {name: np.array(value) for name, value in numbers.items()}
    plan = plan_of(text + LAYERS, weights, storage, n=2)
    assert kinds(plan) == {"Norm": 2, "Gemm": 4, "Attention": 1, "Pad": 2}
    assert copies(plan) == []


@BOTH
@pytest.mark.parametrize(
    ("text", "sizes"), [(PROJECTIONS, {"n": 2, "s": 17}), (WINDOWS, {"n": 2}), (WINDOWS, {"n": 1})],
    ids=["projections", "windows", "windows of one image"],
)  # fmt: skip
def test_a_transformer_block_is_seven_steps(text: str, sizes: dict[str, int], storage: DType) -> None:
    """Q, K and V in one product; windows of an image are read and written by the products themselves, each one product
    of all rows."""
    plan = plan_of(text + LAYERS, TOKENS, storage, **sizes)
    assert kinds(plan) == {"Norm": 2, "Gemm": 4, "Attention": 1}
    assert copies(plan) == []
    context = Context(SM_90A, 132, WeightStore())
    products = [product_of(step, context) for step in plan.steps if isinstance(step.op, Gemm)]
    assert all(product.batch.count == 1 for product in products)


def attention_sources(plan: Plan) -> list[str]:
    return [launch.kernel.source.text for launch in launches(plan) if launch.kernel.family == "attention"]


def test_a_sliding_window_is_attention_on_warpgroups_without_a_mask() -> None:
    text = """(float[b,8,s,64] q, float[b,2,s,64] k, float[b,2,s,64] v) => (float[b,8,s,64] y) {
        y = Attention<left_window_size=127, is_causal=1>(q, k, v) }"""
    plan = plan_of(text, {}, DType.F16, 24, b=2, s=500)
    (source,) = attention_sources(plan)
    assert '"attention_wgmma.cuh"' in source and "constexpr bool window = 1;" in source
    assert "constexpr int bias = 0;" in source


def test_a_step_of_a_decoder_reads_its_keys_once() -> None:
    """ONNX's operator with a cache: of one query every key up to its own is seen, whatever the mask says."""
    text = """(float[b,32,1,128] q, float[b,8,1,128] k, float[b,8,1,128] v, float[b,8,p,128] pk, float[b,8,p,128] pv)
        => (float[b,32,1,128] y, float[b,8,t,128] nk, float[b,8,t,128] nv) {
        y, nk, nv = Attention<is_causal=1>(q, k, v, , pk, pv) }"""
    sources = attention_sources(plan_of(text, {}, DType.F16, 24, b=1, p=8191))
    assert ['"attention_decode.cuh"' in source for source in sources] == [True, False]
    assert '"attention_join.cuh"' in sources[1]


def test_a_sequence_of_32k_tokens_has_no_matrix_of_scores() -> None:
    """One step, which has nothing in memory but its operands and its result: 537 MB, where scores take 34 GB."""
    tokens = 32 * 1024
    plan = cuda_plan(frontend.read(attention(MemoryCase(16, tokens, 128))), {"n": tokens}, DType.F16)
    assert kinds(plan) == {"Attention": 1}
    assert plan.arena_bytes == 0
    assert workspace_bytes(launches(plan)) <= 1 << 20
    (step,) = plan.steps
    tensors = {tensor.buffer for tensor in (*step.inputs, *step.outputs)}
    assert sum(buffer.nbytes for buffer in tensors) == 4 * 16 * tokens * 128 * 2
