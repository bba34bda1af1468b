"""Constant parts of a concatenation, the class tokens above all, are selected where the whole is read."""

from __future__ import annotations

import numpy as np
import pytest

import engine
from engine.ir import ops
from tests.engine.passes.toolkit import check, close, kinds, model, only, random

X = {"x": random(3, 5, 4)}
WEIGHTS = {
    "token": random(1, 1, 4, seed=1), "other": random(1, 1, 4, seed=2), "w": random(4, 4, seed=3),
    "positions": random(1, 6, 4, seed=4), "positions7": random(1, 7, 4, seed=5), "two": random(1, 2, 4, seed=6),
    "scale": random(4), "shift": random(4),
}  # fmt: skip
EXPANDED = """b = Shape<start=0, end=1>(x) one = Constant<value_ints=[1]>() four = Constant<value_ints=[4]>()
    s = Concat<axis=0>(b, one, four) t = Expand(token, s) u = Expand(other, s) m = MatMul(x, w) """


def test_a_class_token_takes_no_step() -> None:
    text = f"""(double[n,5,4] x) => (double[n,6,4] y) {{ {EXPANDED} c = Concat<axis=1>(t, m) a = Add(c, positions)
        l = LayerNormalization(a, scale, shift) y = Add(l, a) }}"""
    graph = check(model(text, WEIGHTS), X)
    assert kinds(graph) == {"Gemm": 1, "Undefined": 1, "Concat": 1, "Norm": 1}
    with engine.load(model(text, WEIGHTS).SerializeToString(), device="cpu") as runner:
        steps = runner.plan({"n": 3}).steps
        assert [step.op.name for step in steps] == ["Gemm", "Norm"]
        for _ in range(2):  # the second time in memory that has been used
            close(runner.run(X)["y"], expected(X["x"]), 1e-12, "on the CPU")


def expected(x: np.ndarray) -> np.ndarray:
    token = np.broadcast_to(WEIGHTS["token"], (len(x), 1, 4))
    a = np.concatenate([token, x @ WEIGHTS["w"]], axis=1) + WEIGHTS["positions"]
    centred = a - a.mean(-1, keepdims=True)
    result: np.ndarray = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return result * WEIGHTS["scale"] + WEIGHTS["shift"] + a


def test_two_tokens_around_the_others() -> None:
    text = f"""(double[n,5,4] x) => (double[n,7,4] y) {{ {EXPANDED} c = Concat<axis=1>(t, m, u) a = Add(c, positions7)
        y = Softmax(a) }}"""
    graph = check(model(text, WEIGHTS), X)
    assert kinds(graph)["Undefined"] == 2
    assert kinds(graph)["Softmax"] == 1
    with engine.load(model(text, WEIGHTS).SerializeToString(), device="cpu") as runner:
        assert [step.op.name for step in runner.plan({"n": 3}).steps] == ["Gemm", "Softmax"]


KEPT = {
    "another reader": f"""(double[n,5,4] x) => (double[n,6,4] y, double[n,6,4] z) {{ {EXPANDED} c = Concat<axis=1>(t, m)
        y = Softmax(c) z = Add(c, positions) }}""",
    "two rows": """(double[1,5,4] x) => (double[1,7,4] y) { m = MatMul(x, w) c = Concat<axis=1>(two, m)
        a = Add(c, positions7) y = Softmax(a) }""",
    "a size that is not known": """(double[1,n,4] x) => (double[1,k,4] y) { m = MatMul(x, w)
        c = Concat<axis=1>(token, m) a = Mul(c, token) y = Softmax(a) }""",
}


@pytest.mark.parametrize("case", KEPT)
def test_what_stays(case: str) -> None:
    feeds = X if "another" in case else {"x": X["x"][:1]}
    assert kinds(check(model(KEPT[case], WEIGHTS), feeds))["Undefined"] == 0


def test_the_gap_is_an_operand_of_the_concatenation() -> None:
    text = f"(double[n,5,4] x) => (double[n,6,4] y) {{ {EXPANDED} c = Concat<axis=1>(t, m) y = Add(c, positions) }}"
    graph = check(model(text, WEIGHTS), X)
    assert only(graph, ops.Concat).inputs[0] is only(graph, ops.Undefined).output
