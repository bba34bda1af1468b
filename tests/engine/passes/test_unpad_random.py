"""Random tails behind an attention: whatever is proved is right, and some of them are proved, some not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from engine.ir.graph import Graph
from engine.packing import Batch, Packer, prefix_lengths
from engine.passes.unpad import Unpadded
from tests.engine import ir_interpreter
from tests.engine.passes.encoders import BIAS, ROWS, H, encoder, lengths_mask
from tests.engine.passes.test_unpad import CAUSAL, KERNEL, MASKS, filled, run_packed, unpadded
from tests.engine.passes.toolkit import TOLERANCE, close

B, S = 4, 6  # both differ from every other size
PRE = """mu = Unsqueeze(mask, axes_last) mc = Cast<to=11>(mu) mb9 = Cast<to=9>(mu) mo = Sub(one, mc)
    m1 = Unsqueeze(mask, axes_1) mr = Cast<to=11>(m1) lens = ReduceSum<keepdims=1>(mc, axes_1) """


class Tail:
    """A chain of random operators. `axes` are the meanings of the axes of the value so far: b, s, n, f (batch ·
    sequence), 1."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.text = PRE
        self.value, self.axes = "h", "bsn"
        self.count = 0

    def add(self, call: str, axes: str) -> None:
        self.count += 1
        new = f"t{self.count}"
        self.text += f"{new} = {call.format(self.value)} "
        self.value, self.axes = new, axes

    def step(self) -> None:
        steps = [
            lambda: self.add("Tanh({0})", self.axes),
            lambda: self.add("Mul({0}, half)", self.axes),
            lambda: self.add("Softmax<axis=-1>({0})", self.axes),
            lambda: self.add("Mul({0}, {0})", self.axes),
        ]
        axis = int(self.rng.integers(0, len(self.axes)))
        where = {0: "axes_0", 1: "axes_1", 2: "axes_2"}[axis]
        if len(self.axes) > 1:
            kind = str(self.rng.choice(["ReduceSum", "ReduceMean", "ReduceMax"]))
            dropped = self.axes[:axis] + self.axes[axis + 1 :]
            kept = self.axes[:axis] + "1" + self.axes[axis + 1 :]
            steps += [
                lambda: self.add(f"{kind}<keepdims=0>({{0}}, {where})", dropped),
                lambda: self.add(f"{kind}<keepdims=1>({{0}}, {where})", kept),
                lambda: self.add(f"Softmax<axis={axis}>({{0}})", self.axes),
                lambda: self.add(f"Gather<axis={axis}>({{0}}, zero_i)", dropped),
                lambda: self.add(f"Slice({{0}}, zero_1, one_1, {'zero_1 one_1 two_1'.split()[axis]})", kept),
                lambda: self.add(f"CumSum({{0}}, {'zero_i one_i two_i'.split()[axis]})", self.axes),
                lambda: self.add(f"Concat<axis={axis}>({{0}}, {{0}})", self.axes[:axis] + "x" + self.axes[axis + 1 :]),
            ]
            perm = [int(i) for i in self.rng.permutation(len(self.axes))]
            turned = "".join(self.axes[i] for i in perm)
            steps.append(lambda: self.add(f"Transpose<perm={perm}>({{0}})".replace(" ", ""), turned))
        if self.axes[-1] == "n":
            steps += [lambda: self.add("MatMul({0}, wq)", self.axes), lambda: self.add("Add({0}, g)", self.axes),
                      lambda: self.add("LayerNormalization<axis=-1>({0}, g)", self.axes)]  # fmt: skip
        if self.axes in ("bsn", "bs1"):
            steps += 2 * [
                lambda: self.add("Mul({0}, mc)", self.axes),
                lambda: self.add("Add({0}, mc)", self.axes),
                lambda: self.add("Mul({0}, mo)", self.axes),
                lambda: self.add("Where(mb9, {0}, minus_10000)", self.axes),
                lambda: self.add("Where(mb9, zero, {0})", self.axes),
                lambda: self.add("MatMul(mr, {0})", "b1" + self.axes[-1]),
                lambda: self.add("Div({0}, lens)", self.axes),
            ]
        if self.axes == "bsn":
            steps += [
                lambda: self.add("Mul({0}, pe)", "bsn"),
                lambda: self.add("Sub({0}, x)", "bsn"),
                lambda: self.add("Reshape({0}, flat)", "fn"),
                lambda: self.add("Concat<axis=2>({0}, we)", "bsx"),
            ]
        if self.axes == "fn":
            steps.append(lambda: self.add("Reshape({0}, apart)", "bsn"))
        if self.axes == "nsb":
            steps.append(lambda: self.add("MatMul({0}, square)", "nsb"))
        steps[int(self.rng.integers(0, len(steps)))]()

    def model(self, bias: str) -> onnx.ModelProto:
        outputs = f"double[{', '.join(f'o{i}' for i in range(len(self.axes)))}] y"
        proto = encoder(bias, f"{self.text} y = Identity({self.value})", outputs)
        extra = {"half": np.array(0.5), "two_i": np.array(2), "apart": np.array([B, S, H]), "square": np.eye(B) + 0.1}
        for name, array in extra.items():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return proto


def outcome(seed: int) -> bool | None:
    """Whether a random model is proved, and then right; None where it is no model."""
    rng = np.random.default_rng(seed)
    tail = Tail(rng)
    for _ in range(int(rng.integers(1, 6))):
        if tail.axes:
            tail.step()
    biases = [BIAS, *MASKS.values(), *CAUSAL.values()]
    proto = tail.model(biases[int(rng.integers(0, len(biases)))])
    mask = lengths_mask([int(n) for n in rng.permutation([1, 3, S, 4])], S)
    feeds = {"ids": rng.integers(0, ROWS, mask.shape), "mask": mask}
    graph, result = unpadded(proto)
    if not isinstance(result, Unpadded):
        return False
    for given in (feeds, feeds | {"ids": np.where(mask == 1, feeds["ids"], rng.integers(0, ROWS, mask.shape))}):
        want = expected(proto, graph, given)
        if "y" in result.shown:
            axes, fill = result.shown["y"]
            cleared, want = want.copy(), filled(want, axes, mask, fill)
            batch = Batch(given, {"b": B, "s": S}, False, prefix_lengths(mask))
            Packer(result, KERNEL).clear({"y": cleared}, batch)
            assert np.array_equal(cleared, want, equal_nan=True)
        got = run_packed(result, given, int(rng.integers(0, 3)))["y"]
        close(got, want, 100 * TOLERANCE, f"seed {seed}: {tail.text}")
    return True


def expected(proto: onnx.ModelProto, graph: Graph, feeds: dict[str, np.ndarray]) -> np.ndarray:
    with np.errstate(all="ignore"):
        (reference,) = ReferenceEvaluator(proto).run(None, feeds)
        padded = ir_interpreter.run(graph, feeds)["y"]
    close(padded, reference, 100 * TOLERANCE, "the padded graph")
    return padded


@pytest.mark.parametrize("part", range(4))
def test_what_is_proved_is_right(part: int) -> None:
    results = [outcome(seed) for seed in range(30 * part, 30 * part + 30)]
    assert results.count(True) >= 4
    assert results.count(False) >= 4


PARTS = """m2 = Unsqueeze(mask, axes_12) mb = Cast<to=9>(m2) ql = Unsqueeze(mask, axes_13) mqb = Cast<to=9>(ql)
    shape = Shape(ids) length = Gather(shape, one_i) range = Range(zero_i, length, one_i) key = Unsqueeze(range, axes_0)
    query = Unsqueeze(range, axes_1) n1 = Slice(shape, one_1, two_1, zero_1) axis_3 = Constant<value_ints=[3]>()
    tr0 = Slice(triangle, zero_1, n1, axes_2) tri = Slice(tr0, zero_1, n1, axis_3) mfk = Cast<to=11>(m2)
    imk = Sub(one, mfk) """


class Mask:
    """Scores `u` selected and added to, at random, by what masks are made of."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.text, self.count = rng, PARTS, 0
        scores = "u"
        for _ in range(int(rng.integers(1, 4))):
            scores = self.masked(scores)
        self.text += f"t = Identity({scores}) "

    def new(self, call: str) -> str:
        self.count += 1
        self.text += f"z{self.count} = {call} "
        return f"z{self.count}"

    def pick(self, *choices: str) -> str:
        return choices[int(self.rng.integers(0, len(choices)))]

    def condition(self, depth: int) -> str:
        kind = self.pick("And", "Or", "Not", "leaf", "leaf", "leaf") if depth else "leaf"
        if kind == "leaf":
            compared = [self.new(f"{op}(key, query)") for op in ("LessOrEqual", "Less", "Equal")]
            return self.pick("mb", "mb", "mqb", "tri", *compared)
        parts = [self.condition(depth - 1) for _ in range(1 if kind == "Not" else 2)]
        return self.new(f"{kind}({', '.join(parts)})")

    def masked(self, scores: str) -> str:
        fill = self.pick("lowest", "minus_inf", "minus_10000", "minus_100")
        match self.pick("select", "select the other", "add a selection", "add a product"):
            case "select":
                return self.new(f"Where({self.condition(2)}, {scores}, {fill})")
            case "select the other":
                return self.new(f"Where({self.condition(1)}, {fill}, {scores})")
            case "add a selection":
                bias = self.new(f"Where({self.condition(2)}, zero, {fill})")
            case _:
                bias = self.new(f"Mul(imk, {self.pick('lowest', 'minus_10000', 'minus_100')})")
        return self.new(f"Add({scores}, {bias})")


def mask_outcome(seed: int) -> bool:
    """Whether a random mask is proved to be one, and then is."""
    rng = np.random.default_rng(seed)
    mask = Mask(rng)
    proto = encoder(mask.text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(-100.0), "minus_100"))
    _, result = unpadded(proto)
    if not isinstance(result, Unpadded):
        return False
    given = lengths_mask([3, 7, 1, 5], 7)
    feeds = {"ids": rng.integers(0, ROWS, given.shape), "mask": given}
    with np.errstate(all="ignore"):
        (want,) = ReferenceEvaluator(proto).run(None, feeds)
    # A mask by −10000 leaves e^−10000 of a key in float64 as in float32: nothing.
    close(
        run_packed(result, feeds)["y"], filled(want, (0, 1), given, 0.0), 100 * TOLERANCE, f"seed {seed}: {mask.text}"
    )
    return True


@pytest.mark.parametrize("part", range(3))
def test_masks_that_are_proved_are_masks(part: int) -> None:
    results = [mask_outcome(seed) for seed in range(50 * part, 50 * part + 50)]
    assert results.count(True) >= 4
    assert results.count(False) >= 4
