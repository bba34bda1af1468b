"""Encoders on packed tokens: the rewritten graph gives what the padded one does, and where that cannot be proved there
is none. In float64 through the interpreter; `test_packing.py` runs models on a target."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.graph import Graph
from engine.packing import Packer
from engine.passes.traits import PackedAttention, Traits
from engine.passes.unpad import Unpadded, unpad
from tests.engine import ir_interpreter
from tests.engine.passes.encoders import (
    ATTEND,
    BIAS,
    EMBEDDING,
    PROJECT,
    ROWS,
    WEIGHTS,
    encoder,
    lengths_mask,
)
from tests.engine.passes.toolkit import TOLERANCE, TRAITS, close, model, rewritten

KERNEL = PackedAttention(frozenset({DType.F64}))
PACKED = replace(TRAITS, packed=KERNEL)
SINGLE = replace(TRAITS, packed=replace(KERNEL, types=frozenset({DType.F32})))
BOOLEAN = "m2 = Unsqueeze(mask, axes_12) mb = Cast<to=9>(m2) "
RANGES = """shape = Shape(ids) length = Gather(shape, one_i) range = Range(zero_i, length, one_i)
    key = Unsqueeze(range, axes_0) query = Unsqueeze(range, axes_1) """

MASKS = {
    "(1 - m) · lowest": BIAS,
    "(1 - m) · -10000": BIAS.replace("lowest", "minus_10000"),
    "(m - 1) · 10000": BIAS.replace("Sub(one, mf)", "Sub(mf, one)").replace("lowest", "ten_thousand"),
    "added to the left": BIAS.replace("Add(u, bias)", "Add(bias, u)"),
    "expanded before": BIAS.replace("mf = Cast<to=11>(m2)", "sh4 = Shape(u) me = Expand(m2, sh4) mf = Cast<to=11>(me)"),
    "Where, minus infinity": BOOLEAN + "t = Where(mb, u, minus_inf) ",
    "Where, lowest": BOOLEAN + "t = Where(mb, u, lowest) ",
    "Where, the other way round": BOOLEAN + "mn = Not(mb) t = Where(mn, minus_inf, u) ",
    "Where of a bias": BOOLEAN + "bias = Where(mb, zero, minus_inf) t = Add(u, bias) ",
    "equal to 0": "e0 = Equal(mask, zero_i) m2 = Unsqueeze(e0, axes_12) t = Where(m2, lowest, u) ",
    "equal to 0, expanded": "e0 = Equal(mask, zero_i) m2 = Unsqueeze(e0, axes_12) sh4 = Shape(u)"
    " me = Expand(m2, sh4) t = Where(me, lowest, u) ",
    "1 where padded, then filled": "m2 = Unsqueeze(mask, axes_12) mf = Cast<to=11>(m2) mi = Sub(one, mf)"
    " mb = Cast<to=9>(mi) bias = Where(mb, lowest, mi) t = Add(u, bias) ",
    "of query and key": "k0 = Unsqueeze(mask, axes_12) q0 = Unsqueeze(mask, axes_13) both = Mul(k0, q0)"
    " mb = Cast<to=9>(both) t = Where(mb, u, minus_10000) ",
    "scores selected twice": BOOLEAN + "w = Where(mb, u, minus_inf) bias = Where(mb, zero, lowest) t = Add(w, bias) ",
    "beside all that is true": BOOLEAN + RANGES + "every = LessOrEqual(query, query) ea = And(mb, every)"
    " t = Where(ea, u, minus_inf) ",
    "looked up by sequence and key": RANGES
    + """rows = Gather(shape, zero_i) rb = Range(zero_i, rows, one_i) rb4 = Reshape(rb, along_0)
        rk4 = Reshape(range, along_3)
        n0 = Shape<start=0,end=1>(ids) n3 = Shape<start=1,end=2>(ids) full = Concat<axis=0>(n0, one_1, one_1, n3)
        eb = Expand(rb4, full) ek = Expand(rk4, full) ub = Unsqueeze(eb, axes_last) uk = Unsqueeze(ek, axes_last)
        places = Concat<axis=-1>(ub, uk) m9 = Cast<to=9>(mask) mb = GatherND(m9, places) t = Where(mb, u, lowest) """,
    "before the sum of the mask": RANGES + "n0 = ReduceSum(mask, axes_1) n2 = Unsqueeze(n0, axes_12)"
    " mb = Less(range, n2) t = Where(mb, u, lowest) ",
    "from the sum of the mask on": RANGES + "mf = Cast<to=11>(mask) n0 = ReduceSum<keepdims=0>(mf, axes_1)"
    " ni = Cast<to=7>(n0) n2 = Reshape(ni, along_0) mb = LessOrEqual(n2, range) t = Where(mb, minus_inf, u) ",
    "real queries and keys before the sum of the mask": RANGES + "n0 = ReduceSum(mask, axes_1)"
    " n2 = Unsqueeze(n0, axes_12) kb = Less(range, n2) qb = Less(query, n2) qu = Or(qb, kb) mb = And(qu, kb)"
    " t = Where(mb, u, lowest) ",
    "looked up at the range of keys": RANGES + "mk = Gather<axis=1>(mask, range) m2 = Unsqueeze(mk, axes_12)"
    " mb = Cast<to=9>(m2) t = Where(mb, u, minus_inf) ",
}
CAUSAL = {
    "and a range": BOOLEAN + RANGES + "ca = LessOrEqual(key, query) cm = And(ca, mb) t = Where(cm, u, minus_inf) ",
    "and a range, one after the other": BOOLEAN + RANGES + "ca = LessOrEqual(key, query) w = Where(ca, u, minus_inf)"
    " t = Where(mb, w, minus_inf) ",
    "or a later key": RANGES + "e0 = Equal(mask, zero_i) m2 = Unsqueeze(e0, axes_12) ca = Less(query, key)"
    " cm = Or(ca, m2) t = Where(cm, lowest, u) ",
    "and a triangle": BOOLEAN
    + """shape = Shape(ids) n1 = Slice(shape, one_1, two_1, zero_1)
        c0 = Slice(triangle, zero_1, n1, axes_2) axis_3 = Constant<value_ints=[3]>() ct = Slice(c0, zero_1, n1, axis_3)
        w = Where(ct, u, lowest) bias = Where(mb, zero, lowest) t = Add(w, bias) """,
}
TAILS = {
    "tokens": ("y = Identity(h)", "double[b,s,n] y"),
    "logits": ("y = MatMul(h, wq)", "double[b,s,n] y"),
    "tokens, flat": ("y = Reshape(h, flat)", "double[t,n] y"),
    "tokens in columns": ("y = Transpose<perm=[0,2,1]>(h)", "double[b,n,s] y"),
    "tokens, sequence first": ("y = Transpose<perm=[1,0,2]>(h)", "double[s,b,n] y"),
    "a score a token": ("y = ReduceMax<keepdims=0>(h, axes_last)", "double[b,s] y"),
    "softmax of each": ("z = MatMul(h, wq) y = Softmax<axis=-1>(z)", "double[b,s,n] y"),
    "first token": ("y = Gather<axis=1>(h, zero_i)", "double[b,n] y"),
    "first token and a layer": ("f = Gather<axis=1>(h, zero_i) z = MatMul(f, wq) y = Tanh(z)", "double[b,n] y"),
    "first token, sliced": ("y = Slice(h, zero_1, one_1, one_1)", "double[b,1,n] y"),
    "tokens and the first": (
        "y = Identity(h) f = Gather<axis=1>(h, zero_i) z = Tanh(f)", "double[b,s,n] y, double[b,n] z",
    ),
    "masked mean": (
        "mu = Unsqueeze(mask, axes_last) mc = Cast<to=11>(mu) hm = Mul(h, mc) a = ReduceSum<keepdims=0>(hm, axes_1)"
        " c0 = ReduceSum<keepdims=0>(mc, axes_1) c = Max(c0, tiny) y = Div(a, c)", "double[b,n] y",
    ),
    "masked mean, expanded mask": (
        "mu = Unsqueeze(mask, axes_last) sh3 = Shape(h) me = Expand(mu, sh3) mc = Cast<to=11>(me) hm = Mul(h, mc)"
        " a = ReduceSum<keepdims=0>(hm, axes_1) c0 = ReduceSum<keepdims=0>(mc, axes_1) c = Max(c0, tiny)"
        " y = Div(a, c)", "double[b,n] y",
    ),
    "masked mean by a product": (
        "mu = Unsqueeze(mask, axes_1) mc = Cast<to=11>(mu) a = MatMul(mc, h) y = Squeeze(a, axes_1)", "double[b,n] y",
    ),
    "masked mean, normalised": (
        "mu = Unsqueeze(mask, axes_last) mc = Cast<to=11>(mu) hm = Mul(h, mc) a = ReduceSum<keepdims=0>(hm, axes_1)"
        " n2 = ReduceL2<keepdims=1>(a, axes_last) y = Div(a, n2)", "double[b,n] y",
    ),
    "masked maximum": (
        "mu = Unsqueeze(mask, axes_last) mb2 = Cast<to=9>(mu) hm = Where(mb2, h, lowest)"
        " y = ReduceMax<keepdims=0>(hm, axes_1)", "double[b,n] y",
    ),
    "masked tokens as an output": (
        "mu = Unsqueeze(mask, axes_last) mb2 = Cast<to=9>(mu) y = Where(mb2, h, minus_10000)", "double[b,s,n] y",
    ),
    "masked tokens, twice read": (
        "mu = Unsqueeze(mask, axes_last) mc = Cast<to=11>(mu) y = Mul(h, mc) z = ReduceSum<keepdims=0>(y, axes_1)",
        "double[b,s,n] y, double[b,n] z",
    ),
    "batch norm of features": (
        "ht = Transpose<perm=[0,2,1]>(h) y = BatchNormalization(ht, g, bv, bv, variance)", "double[b,n,s] y",
    ),
    "convolution of single positions": (
        "ht = Transpose<perm=[0,2,1]>(h) y = Conv(ht, point, bv)", "double[b,n,s] y",
    ),
    "grouped convolution of single positions": (
        "ht = Transpose<perm=[0,2,1]>(h) y = Conv<group=3>(ht, grouped_point)", "double[b,n,s] y",
    ),
    "an axis of one that comes and goes": (
        "hu = Unsqueeze(h, axes_1) ht = Transpose<perm=[0,3,1,2]>(hu) y = Squeeze(ht, axes_2)", "double[b,n,s] y",
    ),
    "words beside": ("y = Concat<axis=-1>(h, we)", "double[b,s,m] y"),
    "positions beside": ("w = Mul(h, pe) y = Add(w, x)", "double[b,s,n] y"),
}  # fmt: skip


def unpadded(proto: onnx.ModelProto, traits: Traits = PACKED) -> tuple[Graph, Unpadded | str]:
    graph = rewritten(proto, traits=traits)
    before = [(node.op, node.inputs, node.outputs) for node in graph.nodes]
    result = unpad(graph, traits)
    assert before == [(node.op, node.inputs, node.outputs) for node in graph.nodes], "the padded graph was changed"
    if isinstance(result, Unpadded):
        result.graph.validate()
    return graph, result


def compare(
    proto: onnx.ModelProto,
    lengths: list[int],
    sequence: int,
    seed: int = 0,
    surplus: int = 0,
    traits: Traits = PACKED,
) -> Unpadded:
    """The packed graph's outputs beside those of onnx.reference: the same at real positions and where there are none, 0
    or the number the model puts there at padded ones; the same again with other tokens in the padding."""
    _, result = unpadded(proto, traits)
    assert isinstance(result, Unpadded), result
    rng = np.random.default_rng(seed)
    mask = lengths_mask(lengths, sequence)
    kind = onnx.helper.tensor_dtype_to_np_dtype(proto.graph.input[1].type.tensor_type.elem_type)
    feeds = {"ids": rng.integers(0, ROWS, mask.shape), "mask": mask.astype(kind)}
    got = run_packed(result, feeds, surplus)
    with np.errstate(over="ignore"):  # the lowest number is added to the lowest number
        want = dict(zip(result.graph.output_names, ReferenceEvaluator(proto).run(None, feeds), strict=True))
    for name, array in want.items():
        if name in result.shown:
            axes, fill = result.shown[name]
            array = filled(array, axes, mask, fill)
        close(got[name], array, TOLERANCE, name)
    other = feeds | {"ids": np.where(mask == 1, feeds["ids"], rng.integers(0, ROWS, mask.shape))}
    again = run_packed(result, other, surplus)
    for name in want:
        assert np.array_equal(again[name], got[name]), f"{name} depends on padding"
    return result


def run_packed(result: Unpadded, feeds: dict[str, np.ndarray], surplus: int = 0) -> dict[str, np.ndarray]:
    """The outputs of the packed graph, with `surplus` tokens of no sequence more than there would be."""
    batch, sequence = feeds["mask"].shape
    made = Packer(result, KERNEL).batch(feeds, {"b": batch, "s": sequence}, -np.inf)
    assert made.packed
    arrays = dict(made.arrays)
    for kind in ("rows", "positions"):
        if kind in result.hidden:
            arrays[result.hidden[kind]] = np.pad(arrays[result.hidden[kind]], (0, surplus))
    return ir_interpreter.run(result.graph, {v.name: arrays[v.name] for v in result.graph.inputs})


def filled(array: np.ndarray, axes: tuple[int, ...], mask: np.ndarray, fill: float) -> np.ndarray:
    """`array` with padded positions filled; `axes` are those of batch and sequence, or the one that has both."""
    array = array.copy()
    if len(axes) == 1:
        np.moveaxis(array, axes[0], 0)[mask.reshape(-1) == 0] = fill
    else:
        np.moveaxis(array, axes, (0, 1))[mask == 0] = fill
    return array


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_spelling(name: str) -> None:
    result = compare(encoder(MASKS[name]), [3, 7, 1, 5], 7)
    (attention,) = [node.op for node in result.graph.nodes if isinstance(node.op, ops.Attention)]
    assert attention.packed
    assert not attention.causal
    assert not attention.has_bias


@pytest.mark.parametrize("name", CAUSAL)
def test_masks_that_are_causal_too(name: str) -> None:
    result = compare(encoder(CAUSAL[name]), [3, 7, 1, 5], 7)
    (attention,) = [node.op for node in result.graph.nodes if isinstance(node.op, ops.Attention)]
    assert attention.packed
    assert attention.causal


@pytest.mark.parametrize("kind", ["int32", "int8", "uint8", "double", "bool"])
def test_masks_of_every_type(kind: str) -> None:
    compare(encoder(mask=kind), [3, 7, 1, 5], 7)


@pytest.mark.parametrize("name", TAILS)
def test_tails_that_are_done_token_by_token_or_look_at_real_ones(name: str) -> None:
    tail, outputs = TAILS[name]
    proto = encoder(tail=tail, outputs=outputs)
    if "variance" in tail:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.abs(WEIGHTS["g"]) + 0.5, "variance"))
    compare(proto, [3, 7, 1, 5], 7, surplus=3)


NORMS = {
    "tokens": ("y = LayerNormalization(h, g, bv)", "double[b,s,n] y"),
    "tokens, flat": ("n = LayerNormalization(h, g, bv) y = Reshape(n, flat)", "double[t,n] y"),
    "a residual of each": ("hx = Add(h, x) y = LayerNormalization(hx, g, bv)", "double[b,s,n] y"),
    "a factor of each": (
        "a = ReduceMax<keepdims=1>(h, axes_last) ea = Sigmoid(a) n = LayerNormalization(h, g, bv) y = Mul(n, ea)",
        "double[b,s,n] y",
    ),
    "a masked mean": (
        "n = LayerNormalization(h, g, bv) mu = Unsqueeze(mask, axes_1) mc = Cast<to=11>(mu) a = MatMul(mc, n)"
        " y = Squeeze(a, axes_1)", "double[b,n] y",
    ),
}  # fmt: skip
OTHER_NORMS = {
    "read packed, too": (
        "n = LayerNormalization(h, g, bv) y = Identity(n) z = ReduceMax<keepdims=0>(n, axes_last)",
        "double[b,s,n] y, double[b,s] z",
    ),
    "not the last": ("n = LayerNormalization(h, g, bv) y = MatMul(n, wq)", "double[b,s,n] y"),
}


@pytest.mark.parametrize("name", [*NORMS, *OTHER_NORMS])
def test_last_norms_write_where_their_rows_are_unpacked_to(name: str) -> None:
    tail, outputs = (NORMS | OTHER_NORMS)[name]
    for gathered in (True, False):
        traits = replace(PACKED, gathered_norms=gathered)
        result = compare(encoder(tail=tail, outputs=outputs), [3, 7, 1, 5], 7, surplus=3, traits=traits)
        found = [node for node in result.graph.nodes if isinstance(node.op, ops.Norm)]
        padded = [node for node in found if node.output.shape[0] != 1]
        assert len(padded) == (gathered and name in NORMS), found


@pytest.mark.parametrize("name", TAILS)
def test_tails_where_norms_are_looked_up(name: str) -> None:
    tail, outputs = TAILS[name]
    if "variance" not in tail:
        compare(encoder(tail=tail, outputs=outputs), [3, 7, 1, 5], 7, traits=replace(PACKED, gathered_norms=True))


@pytest.mark.parametrize("seed", range(12))
def test_random_lengths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, sequence = int(rng.integers(1, 9)), int(rng.integers(1, 15))
    lengths = [int(n) for n in rng.integers(1, sequence + 1, batch)]
    tail, outputs = TAILS["tokens and the first"] if seed % 2 else TAILS["masked mean"]
    bias = CAUSAL["and a range"] if seed % 3 == 0 else BIAS
    compare(encoder(bias, tail, outputs), lengths, sequence, seed, surplus=int(rng.integers(0, 5)))


FAILING_MASKS = {
    "no mask": ("t = Identity(u) y0 = Cast<to=11>(mask) ", "masked by an input"),
    "a weak bias": (BIAS.replace("lowest", "minus_100"), "hides nothing for good"),
    "the wrong way round": (BIAS.replace("mi = Sub(one, mf)", "mi = Identity(mf)"), "shows padded keys"),
    "everything hidden": (BIAS.replace("mi = Sub(one, mf)", "mi = Add(one, mf)"), "hides real keys"),
    "a relative bias": (
        BIAS.replace("t = Add(u, bias)", """shape = Shape(ids) n1 = Slice(shape, one_1, two_1, zero_1)
        r0 = Slice(relative, zero_1, n1, axes_2) axis_3 = Constant<value_ints=[3]>() r1 = Slice(r0, zero_1, n1, axis_3)
        ub = Add(u, r1) t = Add(ub, bias)"""), "more than a mask",
    ),
    "a window": (
        BOOLEAN + RANGES + "far = Sub(query, key) w0 = Less(far, three_i) wm = And(w0, mb) t = Where(wm, u, lowest) ",
        "more than a mask",
    ),
    "earlier keys hidden": (
        BOOLEAN + RANGES + "ca = LessOrEqual(query, key) cm = And(ca, mb) t = Where(cm, u, minus_inf) ",
        "hides real keys",
    ),
    "a mask by query": (
        "m2 = Unsqueeze(mask, axes_13) mb = Cast<to=9>(m2) t = Where(mb, u, minus_10000) ", "shows padded keys",
    ),
    "the mask of the first row": (
        "m0 = Slice(mask, zero_1, one_1, zero_1) m2 = Unsqueeze(m0, axes_12) mb = Cast<to=9>(m2)"
        " t = Where(mb, u, minus_10000) ", "more than a mask",
    ),
    "a mask shifted by one": (
        "sh2 = Shape(mask) n1 = Slice(sh2, one_1, two_1, zero_1) n0 = Sub(n1, one_1)"
        " ma = Slice(mask, zero_1, n0, one_1) mz = Slice(mask, zero_1, one_1, one_1) ms = Concat<axis=1>(mz, ma)"
        " m2 = Unsqueeze(ms, axes_12) mb = Cast<to=9>(m2) t = Where(mb, u, minus_10000) ", "more than a mask",
    ),
    "up to the sum of the mask": (
        RANGES + "n0 = ReduceSum(mask, axes_1) n2 = Unsqueeze(n0, axes_12) mb = LessOrEqual(range, n2)"
        " t = Where(mb, u, lowest) ", "more than a mask",
    ),
    "before the sum of all but the last": (
        RANGES + "n1 = Sub(length, one_i) n9 = Reshape(n1, one_1) ma = Slice(mask, zero_1, n9, one_1)"
        " n0 = ReduceSum(ma, axes_1) n2 = Unsqueeze(n0, axes_12) mb = Less(range, n2) t = Where(mb, u, lowest) ",
        "more than a mask",
    ),
    "before the sum over all sequences": (
        RANGES + "n0 = ReduceSum(mask, axes_0) n2 = Unsqueeze(n0, axes_12) mb = Less(range, n2)"
        " t = Where(mb, u, lowest) ", "more than a mask",
    ),
    "before the sum of what is seen": (  # no more than queries before it
        BOOLEAN + RANGES + "ca = LessOrEqual(key, query) cm = And(ca, mb) ci = Cast<to=7>(cm)"
        " n0 = ReduceSum(ci, minus_one_1) b2 = Less(range, n0) t = Where(b2, u, lowest) ", "more than a mask",
    ),
    "before the sum of the padded ones": (
        RANGES + "mi = Sub(one_i, mask) n0 = ReduceSum(mi, axes_1) n2 = Unsqueeze(n0, axes_12) mb = Less(range, n2)"
        " t = Where(mb, u, lowest) ", "more than a mask",
    ),
    "the ids as a mask": (
        "e0 = Equal(ids, zero_i) m2 = Unsqueeze(e0, axes_12) t = Where(m2, lowest, u) y0 = Cast<to=11>(mask) ",
        "masked by an input",
    ),
}  # fmt: skip
FAILING_TAILS = {
    "mean of all": ("y = ReduceMean<keepdims=0>(h, axes_1)", "double[b,n] y", "goes over positions"),
    "maximum of all": ("y = ReduceMax<keepdims=0>(h, axes_1)", "double[b,n] y", "goes over positions"),
    "mean over the batch": ("y = ReduceMean<keepdims=0>(h, axes_0)", "double[s,n] y", "goes over positions"),
    "a number added before the sum": (
        "mu = Unsqueeze(mask, axes_last) mc = Cast<to=11>(mu) hm = Add(h, mc) y = ReduceSum<keepdims=0>(hm, axes_1)",
        "double[b,n] y", "goes over positions",
    ),
    "the padded ones": (
        "mu = Unsqueeze(mask, axes_last) mc = Cast<to=11>(mu) mo = Sub(one, mc) hm = Mul(h, mo)"
        " y = ReduceSum<keepdims=0>(hm, axes_1)", "double[b,n] y", "goes over positions",
    ),
    "second token": ("y = Gather<axis=1>(h, one_i)", "double[b,n] y", "takes some positions"),
    "last token": ("last = Constant<value_int=-1>() y = Gather<axis=1>(h, last)", "double[b,n] y", ""),
    "convolution": (
        "ht = Transpose<perm=[0,2,1]>(h) y = Conv<kernel_shape=[3], pads=[1,1]>(ht, filter)", "double[b,n,s] y",
        "mixes positions",
    ),
    "convolution of every second position": (
        "ht = Transpose<perm=[0,2,1]>(h) y = Conv<strides=[2]>(ht, point)", "double[b,n,m] y", "mixes positions",
    ),
    "softmax over positions": ("y = Softmax<axis=1>(h)", "double[b,s,n] y", "goes over positions"),
    "instance norm": (
        "ht = Transpose<perm=[0,2,1]>(h) y = InstanceNormalization(ht, g, bv)", "double[b,n,s] y",
        "goes over positions",
    ),
    "tokens times tokens": (
        "ht = Transpose<perm=[0,2,1]>(h) y = MatMul(h, ht)", "double[b,s,s] y", "",
    ),
    "running sum": ("y = CumSum(h, one_i)", "double[b,s,n] y", "mixes positions"),
    "positions moved": (
        "f = Slice(h, zero_1, one_1, one_1) y = Concat<axis=1>(f, h)", "double[b,m,n] y", "",
    ),
    "the first row": ("y = Gather<axis=0>(h, zero_i)", "double[s,n] y", "takes some positions"),
    "a number a sequence": (
        "f = Gather<axis=1>(h, zero_i) fu = Unsqueeze(f, axes_1) y = Mul(h, fu)", "double[b,s,n] y", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILING_MASKS)
def test_masks_that_are_not_proved(name: str) -> None:
    bias, reason = FAILING_MASKS[name]
    extra = {"minus_100": np.array(-100.0), "three_i": np.array(3)}
    proto = encoder(bias)
    for key, array in extra.items():
        if key in bias:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, key))
    _, result = unpadded(proto)
    assert isinstance(result, str)
    assert reason in result


@pytest.mark.parametrize("name", FAILING_TAILS)
def test_tails_that_look_at_padding(name: str) -> None:
    tail, outputs, reason = FAILING_TAILS[name]
    _, result = unpadded(encoder(tail=tail, outputs=outputs))
    assert isinstance(result, str)
    assert reason in result


def second_layer(bias: str) -> str:
    """Another attention on the tokens of the first, whose scores `bias` makes."""
    text = (PROJECT + bias + ATTEND).replace("(x, w", "(h, w").replace(", x)", ", h)")
    names = "pq pk pw pv cq ck cv q v kt s0 u m2 mf mi bias t p o ot om oo r mb mn".split()
    tokens = text.replace("(", " ( ").replace(")", " ) ").replace(",", " , ").split()
    parts = [f"{token}_2" if token in names else token for token in tokens]
    return " ".join(parts).replace("h = LayerNormalization", "y = LayerNormalization")


def test_two_layers_with_one_mask_and_two_spellings() -> None:
    result = compare(encoder(tail=second_layer(BOOLEAN + "t = Where(mb, u, minus_inf) ")), [3, 7, 1], 7)
    assert result.attentions == 2


@pytest.mark.parametrize("bias", ["t = Identity(u) ", BIAS.replace("mi = Sub(one, mf)", "mi = Identity(mf)")])
def test_a_second_layer_that_sees_padding_is_refused(bias: str) -> None:
    _, result = unpadded(encoder(tail=second_layer(bias)))
    assert isinstance(result, str)
    assert "attention" in result


def test_a_mask_that_is_embedded_too() -> None:
    """Token types that are the mask: a lookup like any other."""
    types = "te = Gather(type_table, mask) e0 = Add(we, pe) e = Add(e0, te)"
    compare(encoder(before=EMBEDDING.replace("e = Add(we, pe)", types)), [3, 7, 1], 7)


def test_positions_counted_from_the_mask() -> None:
    """RoBERTa's: a running sum over the mask, computed on the padded mask and looked up."""
    before = "one_axis = Identity(one_i) pos0 = CumSum(mask, one_axis) pos = Mul(pos0, mask) we = Gather(table, ids)"
    before += " pe = Gather(position_table, pos) e = Add(we, pe) x = LayerNormalization<axis=-1>(e, g) "
    compare(encoder(before=before), [3, 7, 1], 7)


def test_a_convolution_before_the_first_attention_runs_padded() -> None:
    """What no packed attention has a part in is computed as before, padding and all."""
    before = "we = Gather(table, ids) wt = Transpose<perm=[0,2,1]>(we)"
    before += " wc = Conv<kernel_shape=[3], pads=[1,1]>(wt, filter)"
    before += " e = Transpose<perm=[0,2,1]>(wc) x = LayerNormalization<axis=-1>(e, g) "
    proto = encoder(before=before)
    _, result = unpadded(proto)
    assert isinstance(result, Unpadded), result
    mask = lengths_mask([3, 6, 1], 6)
    feeds = {"ids": np.random.default_rng(0).integers(0, ROWS, mask.shape), "mask": mask}
    got = run_packed(result, feeds)
    (want,) = ReferenceEvaluator(proto).run(None, feeds)
    close(got["y"], filled(want, (0, 1), mask, 0.0), TOLERANCE, "y")


def test_cross_attention_is_refused() -> None:
    """Queries of one sequence, keys of another: no token of the one is a token of the other."""
    tail = "sx = Gather(table, other) " + second_layer(BOOLEAN + "t = Where(mb, u, minus_inf) ").replace(
        "MatMul ( h , wq )", "MatMul ( sx , wq )"
    ).replace("Add ( oo_2 , h )", "Add ( oo_2 , sx )")
    _, result = unpadded(encoder(tail=tail, outputs="double[b,s2,n] y", extra=", int64[b,s2] other"))
    assert isinstance(result, str)


@pytest.mark.parametrize("sizes", [(None, 7), (4, None), (4, 7), (4, 12), (3, 7)])
@pytest.mark.parametrize("tail", ["tokens and the first", "masked mean", "tokens, flat"])
def test_fixed_sizes(sizes: tuple[int | None, int | None], tail: str) -> None:
    """Of the batch, the sequence or both; also where one is another size of the model by chance (12 features, 3
    heads)."""
    proto = encoder(CAUSAL["and a range"], *TAILS[tail])
    for value in proto.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, sizes, strict=True):
            if size is not None:
                dim.dim_value = size
    lengths, sequence = [3, 7, 1, 5][: sizes[0]], sizes[1] or 9
    if sizes[1] == 12:
        # What has 12 rows of 12 features does not say which is which.
        assert isinstance(unpadded(proto)[1], str)
    else:
        compare(proto, lengths, sequence)


@pytest.mark.parametrize("sizes", [(1, None), (5, 5)])
def test_sizes_that_do_not_tell_the_axes_are_refused(sizes: tuple[int | None, int | None]) -> None:
    proto = encoder()
    for value in proto.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, sizes, strict=True):
            if size is not None:
                dim.dim_value = size
    assert "sizes that tell its axes" in str(unpadded(proto)[1])


def test_no_kernel_no_packing() -> None:
    graph = rewritten(encoder(), traits=PACKED)
    assert "no attention on packed" in str(unpad(graph, TRAITS))
    for kernel, reason in (
        (PackedAttention(frozenset({DType.F16})), "of f64"),
        (replace(KERNEL, multiple=8), "heads of 4"),
        (replace(KERNEL, widest=2), "heads of 4"),
    ):
        assert reason in str(unpad(graph, replace(TRAITS, packed=kernel)))


def test_weights_are_the_same_arrays() -> None:
    graph, result = unpadded(encoder())
    assert isinstance(result, Unpadded)
    constants = {v for node in graph.nodes for v in node.inputs if v.is_constant}
    assert {v for node in result.graph.nodes for v in node.inputs if v.is_constant and v.rank > 1} <= constants


@pytest.mark.parametrize("causal", [False, True])
def test_the_operator_of_opset_23(causal: bool) -> None:
    """Its mask is boolean, or a bias; it may be causal beside (which onnx.reference takes from the mask's shape)."""
    text = f"""{EMBEDDING}qh = MatMul(x, wq) kh = MatMul(x, wk) vh = MatMul(x, wv) m2 = Unsqueeze(mask, axes_12)
        mb = Cast<to=9>(m2) y = Attention<q_num_heads=3, kv_num_heads=3, is_causal={int(causal)}>(qh, kh, vh, mb)"""
    weights = {name: array for name, array in WEIGHTS.items() if name in text}
    proto = model(f"(int64[b,s] ids, int64[b,s] mask) => (double[b,s,n] y) {{ {text} }}", weights, opset=23)
    padded, result = unpadded(proto)
    assert isinstance(result, Unpadded), result
    (attention,) = [node.op for node in result.graph.nodes if isinstance(node.op, ops.Attention)]
    assert attention.causal == causal
    mask = lengths_mask([3, 7, 1, 5], 7)
    feeds = {"ids": np.random.default_rng(0).integers(0, ROWS, mask.shape), "mask": mask}
    want = ir_interpreter.run(padded, feeds)["y"]
    close(run_packed(result, feeds)["y"], filled(want, (0, 1), mask, 0.0), TOLERANCE, "y")


def test_operators_of_onnx_runtime() -> None:
    """What its optimizer makes of BERT: contributed operators, a mask [batch, sequence] handed to each attention."""
    wide = {name: array for name, array in WEIGHTS.items() if array.ndim and array.dtype == np.float64}
    names = {name: array.astype(np.float32) for name, array in wide.items()}
    w = np.concatenate([names["wq"], names["wk"], names["wv"]], axis=1)
    weights = {"words": names["table"], "types": names["type_table"], "places": names["position_table"],
               "g": names["g"], "bv": names["bv"], "w": w,
               "wb": np.tile(names["bv"], 3), "wo": names["wo"]}  # fmt: skip
    make = onnx.helper.make_node
    nodes = [
        make(
            "EmbedLayerNormalization",
            ["ids", "mask", "words", "places", "types", "g", "bv"],
            ["x"],
            domain="com.microsoft",
        ),
        make("Attention", ["x", "w", "wb", "mask"], ["a"], domain="com.microsoft", num_heads=3),
        make("MatMul", ["a", "wo"], ["o"]),
        make("SkipLayerNormalization", ["o", "x", "g", "bv", "bv"], ["y"], domain="com.microsoft"),
    ]
    tensor = onnx.helper.make_tensor_value_info
    ids, mask = (tensor(name, onnx.TensorProto.INT32, ["b", "s"]) for name in ("ids", "mask"))
    output = tensor("y", onnx.TensorProto.FLOAT, ["b", "s", 12])
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = onnx.helper.make_graph(nodes, "bert", [ids, mask], [output], constants)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    padded = rewritten(onnx.helper.make_model(graph, opset_imports=opsets), traits=SINGLE)
    result = unpad(padded, SINGLE)
    assert isinstance(result, Unpadded), result
    given = lengths_mask([3, 7, 1, 5], 7)
    feeds = {"ids": np.random.default_rng(0).integers(0, ROWS, given.shape).astype(np.int32),
             "mask": given.astype(np.int32)}  # fmt: skip
    got = run_packed(result, feeds)
    want = ir_interpreter.run(padded, feeds)
    close(got["y"], filled(want["y"], (0, 1), given, 0.0), 1e-6, "y")


def test_a_mask_looked_up_along_its_diagonal_is_refused() -> None:
    """mask[i, i] for row i: a place that nobody has shown to be real, or the key's."""
    bias = f"""{RANGES}rows = Gather(shape, zero_i) rb = Range(zero_i, rows, one_i) r1 = Unsqueeze(rb, axes_last)
        md = GatherElements<axis=1>(mask, r1) m2 = Unsqueeze(md, axes_12) mb = Cast<to=9>(m2)
        t = Where(mb, u, lowest) """
    _, result = unpadded(encoder(bias))
    assert isinstance(result, str)


ROTARY = """n1 = Slice(sh, one_1, two_1, zero_1) cs = Slice(cosines, zero_1, n1, zero_1)
    ss = Slice(sines, zero_1, n1, zero_1)
    cos = Unsqueeze(cs, axes_01) sin = Unsqueeze(ss, axes_01) half_1 = Constant<value_ints=[2]>()
    whole_1 = Constant<value_ints=[4]>() """


def turned(name: str, result: str) -> str:
    """Rotary embedding of [batch, heads, sequence, 4]."""
    return f"""{name}a = Slice({name}, zero_1, half_1, axes_last) {name}b = Slice({name}, half_1, whole_1, axes_last)
        {name}n = Neg({name}b) {name}r = Concat<axis=-1>({name}n, {name}a) {name}c = Mul({name}, cos)
        {name}s = Mul({name}r, sin) {result} = Add({name}c, {name}s) """


def test_rotary_embedding_is_looked_up_once() -> None:
    """Angles of a position, for queries and keys: each table is looked up by position once."""
    project = PROJECT.replace("q = Transpose", f"{ROTARY}q0 = Transpose").replace(
        "kt = Transpose<perm=[0,2,3,1]>(ck)",
        f"k0 = Transpose<perm=[0,2,1,3]>(ck) {turned('k0', 'kr')}{turned('q0', 'q')}kt = Transpose<perm=[0,1,3,2]>(kr)",
    )
    text = f"""(int64[b,s] ids, int64[b,s] mask) => (double[b,s,n] y) {{ {EMBEDDING}{project}{CAUSAL["and a range"]}
        {ATTEND}y = Identity(h) }}"""
    proto = model(text, {name: array for name, array in WEIGHTS.items() if name in text})
    result = compare(proto, [3, 7, 1, 5], 7, surplus=2)
    tables = [node for node in result.graph.nodes if isinstance(node.op, ops.Gather) and node.op.axis == 2]
    assert len(tables) == 2


def test_sequence_first_layers() -> None:
    """As in PyTorch's TransformerEncoder: [sequence, batch, features], batch and heads one axis on the way, and rows of
    the output projection position after position."""
    before = EMBEDDING.replace("x = LayerNorm", "xb = LayerNorm") + "x = Transpose<perm=[1,0,2]>(xb) "
    project = """pq = MatMul(x, wq) pk = MatMul(x, wk) pw = MatMul(x, wv) pv = Add(pw, bv) xs = Shape(x)
        n = Slice(xs, zero_1, one_1, zero_1) m = Slice(xs, one_1, two_1, zero_1) hb = Mul(m, heads_1)
        rank3 = Concat<axis=0>(n, hb, four_1) rank4 = Concat<axis=0>(m, heads_1, n, four_1) rq = Reshape(pq, rank3)
        rk = Reshape(pk, rank3) rv = Reshape(pv, rank3) tq = Transpose<perm=[1,0,2]>(rq)
        tk = Transpose<perm=[1,0,2]>(rk) tv = Transpose<perm=[1,0,2]>(rv)
        q = Reshape(tq, rank4) k = Reshape(tk, rank4) v = Reshape(tv, rank4)
        kt = Transpose<perm=[0,1,3,2]>(k) s0 = MatMul(q, kt) u = Mul(s0, scale) """
    attend = """p = Softmax<axis=-1>(t) o = MatMul(p, v) ot = Transpose<perm=[2,0,1,3]>(o) om = Reshape(ot, flat)
        op = MatMul(om, wo) oo = Reshape(op, xs) r = Add(oo, x) h = LayerNormalization<axis=-1>(r, g)
        y = Transpose<perm=[1,0,2]>(h) """
    text = f"(int64[b,s] ids, int64[b,s] mask) => (double[b,s,n] y) {{ {before}{project}{BIAS}{attend} }}"
    constants = WEIGHTS | {"heads_1": np.array([3]), "four_1": np.array([4])}
    proto = model(text, {name: array for name, array in constants.items() if name in text})
    compare(proto, [3, 7, 1, 5], 7, surplus=2)
