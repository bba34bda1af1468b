"""The models of this repository (where they have been built) and graphs of thousands of nodes: steps and seconds."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from engine.frontend import read
from engine.ir.graph import Graph
from engine.passes import Traits, run
from tests.engine.passes.toolkit import kinds, load, model, random

MODELS = Path(__file__).parents[3] / "models"
SECONDS = 0.3
GENEROUS = 4  # test machines are shared; the margin is for them, not for the passes


def timed(graph: Graph) -> float:
    start = time.perf_counter()
    run(graph, Traits())
    return time.perf_counter() - start


@pytest.mark.parametrize(("name", "most"), [("efficientnet-lite0", 51), ("all-minilm-l6-v2", 45)])
def test_steps_of_the_models(name: str, most: int) -> None:
    path = MODELS / name / "1" / "model.onnx"
    if not path.exists():
        pytest.skip(f"{name} has not been built")
    graph = read(path)
    seconds = timed(graph)
    graph.validate()
    counts = kinds(graph)
    assert counts.total() <= most
    assert counts["Opaque"] == counts["Softmax"] == 0
    assert seconds < SECONDS * GENEROUS


def mobile_network(blocks: int) -> onnx.ModelProto:
    """Inverted residual blocks, with batch norms apart, as PyTorch exports them."""
    lines, weights, at = [], {}, "x"
    for b in range(blocks):
        at_block = at
        for step, (group, kernel) in enumerate(((1, 1), (16, 3), (1, 1))):
            i = f"{b}_{step}"
            weights[f"k{i}"] = random(16, 16 // group, kernel, kernel, seed=b * 3 + step, scale=0.3)
            for part in ("s", "m", "b"):
                weights[f"{part}{i}"] = random(16, seed=b + step)
            weights[f"v{i}"] = random(16, seed=b + step) ** 2 + 1
            pads = [kernel // 2] * 4
            lines.append(f"c{i} = Conv<group={group}, pads={pads}>({at}, k{i})")
            lines.append(f"n{i} = BatchNormalization(c{i}, s{i}, b{i}, m{i}, v{i})")
            at = f"n{i}"
            if step < 2:
                lines.append(f"r{i} = Clip(n{i}, zero, six)")
                at = f"r{i}"
        lines.append(f"a{b} = Add({at}, {at_block})")
        at = f"a{b}"
    weights |= {"zero": np.array(0.0), "six": np.array(6.0)}
    return model("(double[n,16,8,8] x) => (double[n,16,8,8] y) { " + " ".join(lines) + f" y = Relu({at}) }}", weights)


def test_inverted_residual_blocks_are_three_steps_each() -> None:
    graph = load(mobile_network(16))
    run(graph, Traits())
    assert kinds(graph) == {"Conv": 48}


GROWING = {
    "convolutions": lambda n: mobile_network(n // 9),
    "a point-wise chain": lambda n: model(
        "(double[n] x) => (double[n] y) { a0 = Exp(x) "
        + " ".join(f"a{i + 1} = {('Sin', 'Cos', 'Neg')[i % 3]}(a{i})" for i in range(n)) + f" y = Abs(a{n}) }}"
    ),
    "residual sums": lambda n: model(
        "(double[n,4] x) => (double[n,4] y) { a0 = Exp(x) "
        + " ".join(f"m{i} = MatMul(a{i}, w) r{i} = Relu(m{i}) a{i + 1} = Add(a{i}, r{i})" for i in range(n // 3))
        + f" y = Abs(a{n // 3}) }}",
        {"w": random(4, 4)},
    ),
    "dense connections": lambda n: model(
        "(double[n,4] x) => (double[n,4] y) { a0 = Exp(x) "
        + " ".join(f"m{i} = MatMul(a{i}, w) b{i} = Sigmoid(m{i}) a{i + 1} = Mul(m{i}, b{i})" for i in range(n // 3))
        + f" y = Abs(a{n // 3}) }}",
        {"w": random(4, 4)},
    ),
    "views": lambda n: model(
        "(double[3,4] x) => (double[3,4] y) { a0 = Exp(x) "
        + " ".join(f"t{i} = Transpose(a{i}) e{i} = Exp(t{i}) a{i + 1} = Transpose(e{i})" for i in range(n // 3))
        + f" y = Abs(a{n // 3}) }}"
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", GROWING)
def test_time_grows_with_the_nodes_and_not_with_their_square(name: str) -> None:
    small, large = (load(GROWING[name](n)) for n in (500, 5000))
    seconds, many_seconds = min(timed(load(GROWING[name](500))), timed(small)), timed(large)
    large.validate()
    assert many_seconds < max(0.5, 10 * seconds) * GENEROUS, f"{seconds:.2f} s, then {many_seconds:.2f} s"
