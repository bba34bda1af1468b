"""Recurrent networks against float64: cells, directions, types, sizes (conftest.py says on what)."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Cell, Recurrent
from engine.plan.plan import Step
from engine.targets.cuda import covering as cv
from engine.targets.cuda import recurrent
from engine.targets.cuda.covering import F16, F32, make_step
from tests.engine.targets.cuda.cases import check, fed, order_of, ragged, rng_of
from tests.engine.targets.cuda.emulator.runner import EmulatedRunner
from tests.engine.targets.cuda.harness import Case, Runner

TYPES = [F16, F32, DType.BF16]


def a_step(
    rng: np.random.Generator, cell: Cell, size: tuple[int, int, int, int], x: DType, r: DType, constant: bool = True
) -> Step:
    """A step over (steps, directions, batch, hidden)."""
    steps, directions, batch, hidden = size
    weights: cv.Given = (r, (directions, cell.gates * hidden, hidden))
    if constant:
        scaled = rng.standard_normal(weights[1]) / np.sqrt(hidden)
        weights = scaled.astype(r.numpy)
    inputs: list[cv.Given] = [
        fed(x, (steps, directions, batch, cell.gates * hidden), int(rng.integers(0, 4)), 0), weights,
        fed(x, (directions, batch, hidden), int(rng.integers(0, 3)), 2),
    ]  # fmt: skip
    inputs += [(x, (directions, batch, hidden))] if cell is Cell.LSTM else []
    inputs += [(F32, (directions, hidden))] if cell is Cell.GRU else []
    step = make_step(Recurrent(cell, int(rng.integers(-1, directions))), inputs)
    ordered = (cv.results_in(Step("", step.op, (), (t,), step.cost), order_of(rng, len(t.shape))) for t in step.outputs)
    return Step(step.name, step.op, step.inputs, tuple(one.outputs[0] for one in ordered), step.cost)


def test_recurrent_networks_match_float64(runner: Runner, family_count: int) -> None:
    rng, cases = rng_of("recurrent"), []
    for i in range(family_count):
        cell, emulated = list(Cell)[i % 4], isinstance(runner, EmulatedRunner)
        hidden = ragged(rng, 96 if emulated else 300, 8 if i % 3 else 1)
        steps = int(rng.integers(1, 6))
        size = (steps, int(rng.integers(1, 3)), int(rng.integers(1, 10)), hidden)
        x, r = TYPES[i % 3], TYPES[i // 2 % 3]
        # Rounding of a state goes on to the next step.
        computed = F32 if x is r is F32 else None
        cases.append(Case(f"{cell} {size} {x} {r}", a_step(rng, cell, size, x, r), hidden * steps, computed=computed))
    check(runner, cases)


def test_networks_whose_units_are_spread(runner: Runner, count: int) -> None:
    """A launch for each step: weights in registers, or too many for that; more sequences than a block takes at once."""
    rng, cases = rng_of("spread"), []
    sizes = [(3, 2, 3, 161), (2, 1, 9, 304), (3, 1, 1, 512)]
    sizes += [] if isinstance(runner, EmulatedRunner) else [(9, 2, 33, 1024), (5, 1, 40, 1500), (7, 1, 2, 2048)]
    for i, size in enumerate(sizes):
        for j, cell in enumerate(Cell):
            x, r = TYPES[(i + j) % 3], TYPES[(i + 2 * j) % 3]
            step = a_step(rng, cell, size, x, r)
            if cell is Cell.LSTM:
                assert len(recurrent.lower(step, runner.context)) == size[0] + 1
            cases.append(Case(f"{cell} {size} {x} {r}", step, size[3] * size[0]))
    check(runner, cases)


def test_weights_may_be_computed(runner: Runner) -> None:
    rng = rng_of("computed")
    cases = []
    for hidden in (24, 320):
        step = a_step(rng, Cell.RNN_TANH, (2, 1, 2, hidden), F32, F32, constant=False)
        feeds = {1: (rng.standard_normal(step.inputs[1].shape) / np.sqrt(hidden)).astype(np.float32)}
        cases.append(Case(f"{hidden}", step, 2 * hidden, feeds))
    check(runner, cases)


def test_without_steps_the_states_are_the_first(runner: Runner) -> None:
    rng = rng_of("none")
    check(runner, [Case(cell.value, a_step(rng, cell, (0, 2, 3, 20), F16, F16), 1) for cell in Cell])


def test_types_without_a_kernel_are_named() -> None:
    with pytest.raises(UnsupportedOp, match="Recurrent on f64"):
        a_step(rng_of("f64"), Cell.GRU, (1, 1, 1, 8), DType.F64, DType.F64)
