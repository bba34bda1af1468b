"""Attention masks that hide keys by their distance from the query, and nothing else, become `causal` or a window."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.ir import ops
from tests.engine.passes.test_attention import KEYS, MERGE, PROJECT, SCORES, SOFTMAX, VALUES, WEIGHTS, B, H, S
from tests.engine.passes.toolkit import TRAITS, check, model, only, random, rewritten

WINDOWS = replace(TRAITS, windows=True)
WINDOW = "m = Sub(query, four) a = LessOrEqual(key, query) b = Greater(key, m)"

SEES = {
    "later keys hidden": ("c = LessOrEqual(key, query)", (True, None)),
    "a causal window": (f"{WINDOW} c = And(a, b)", (True, 4)),
    "a window, hidden keys first": (
        "m = Add(key, four) a = Greater(key, query) b = LessOrEqual(m, query) h = Or(a, b) c = Not(h)", (True, 4),
    ),
    "both sides": ("d = Sub(key, query) e = Abs(d) c = Less(e, four)", (False, 4)),
    "both sides, hidden keys first": ("d = Sub(query, key) e = Abs(d) h = Less(four, e) c = Not(h)", (False, 5)),
    "a side only": ("m = Sub(query, four) c = Greater(key, m)", None),
    "not itself": ("c = Less(key, query)", None),
    "sides that differ": ("d = Sub(key, query) a = Less(d, two) e = Neg(d) b = Less(e, four) c = And(a, b)", None),
    "in floats": ("d = Sub(query, key) f = Cast<to=1>(d) g = Cast<to=1>(four) e = Abs(f) c = Less(e, g)", (False, 4)),
    "either": (f"{WINDOW} c = Or(a, b)", None),
    "every other key": ("d = Add(key, key) c = LessOrEqual(d, query)", None),
}  # fmt: skip
"""How a mask says which keys are seen, from ranges of positions; what it becomes: (causal, window), or a bias."""


@pytest.mark.parametrize("windows", [True, False])
@pytest.mark.parametrize("case", SEES)
def test_masks_by_distance(case: str, windows: bool) -> None:
    body, expected = SEES[case]
    text = f"""(double[b,s,{H}] x) => (double[b,s,{H}] y) {{ {PROJECT} {KEYS} {SCORES}
        begin = Constant<value_int=0>() step = Constant<value_int=1>() two = Constant<value_int=2>()
        four = Constant<value_int=4>() shape = Shape(x) length = Gather(shape, step)
        key = Range(begin, length, step) ends = Constant<value_ints=[1]>() query = Unsqueeze(key, ends) {body}
        low = Constant<value_float=-inf>() low64 = Cast<to=11>(low) u = Mul(s, scale) t = Where(c, u, low64)
        {SOFTMAX} {VALUES} {MERGE} }}"""
    seen_alone = case == "not itself"  # the first query sees nothing
    feed = {"x": random(B, 9, H, seed=9)}
    traits = replace(TRAITS, windows=windows)
    graph = (
        rewritten(model(text, WEIGHTS), traits=traits)
        if seen_alone
        else check(model(text, WEIGHTS), feed, traits=traits)
    )
    op = only(graph, ops.Attention).op
    assert isinstance(op, ops.Attention)
    if expected is None or (expected[1] is not None and not windows):
        assert op.has_bias and not op.causal and op.window is None
    else:
        assert not op.has_bias and (op.causal, op.window) == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"), [(3, 0, (True, 4)), (3, 3, (False, 4)), (15, 0, (True, None)), (3, 1, None)]
)
def test_bands_of_constants(before: int, after: int, expected: tuple[bool, int | None] | None) -> None:
    text = f"""(double[b,s,{H}] x) => (double[b,s,{H}] y) {{ {PROJECT} {KEYS} {SCORES}
        shape = Shape<start=1, end=2>(x) zeros = Constant<value_ints=[0]>() z2 = Concat<axis=0>(zeros, zeros)
        ends = Concat<axis=0>(shape, shape) axes = Constant<value_ints=[2, 3]>()
        m = Slice(band, z2, ends, axes) mb = Cast<to=9>(m) u = Mul(s, scale) t = Where(mb, u, lowest)
        {SOFTMAX} {VALUES} {MERGE} }}"""
    band = np.tri(16, k=after, dtype=np.uint8) - np.tri(16, k=-before - 1, dtype=np.uint8)
    weights = WEIGHTS | {"band": band[None, None]}
    graph = check(model(text, weights), {"x": random(B, S, H, seed=9)}, traits=WINDOWS)
    op = only(graph, ops.Attention).op
    assert isinstance(op, ops.Attention)
    assert op.has_bias == (expected is None) and (op.causal, op.window) == (expected or (False, None))


@pytest.mark.parametrize(
    ("left", "right", "causal", "expected"),
    [(5, 0, 0, (True, 6)), (5, 5, 0, (False, 6)), (5, -1, 1, (True, 6)), (5, 2, 0, None)],
)
def test_windows_of_the_operator(left: int, right: int, causal: int, expected: tuple[bool, int] | None) -> None:
    """ONNX's own Attention with window sizes, over a length that only the run knows."""
    text = f"""(float[b,4,s,8] q, float[b,2,s,8] k, float[b,2,s,8] v) => (float[b,4,s,8] y) {{
        y = Attention<left_window_size={left}, right_window_size={right}, is_causal={causal}>(q, k, v) }}"""
    op = only(rewritten(model(text, opset=24), traits=WINDOWS), ops.Attention).op
    assert isinstance(op, ops.Attention)
    assert op.has_bias == (expected is None) and (op.causal, op.window) == (expected or (False, None))
