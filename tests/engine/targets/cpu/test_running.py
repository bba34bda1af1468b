"""Running sums and products against the interpreter: axes, layouts, types, tails of vectors."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.graph import Value, make_node
from engine.ir.ops import Running, RunningKind
from engine.targets.cpu import running
from tests.engine import ir_interpreter
from tests.engine.targets.cpu.steps import ISAS, Layout, place, run_step

DTYPES = [DType.F32, DType.F64, DType.I64, DType.I32, DType.U8, DType.F16]


def expected(op: Running, x: np.ndarray) -> np.ndarray:
    node = make_node(op, [Value("x", DType.of(x.dtype), x.shape)], "test")
    return ir_interpreter.run_node(node, [x], {})[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.value)
@pytest.mark.parametrize(("shape", "axis"), [((37,), 0), ((5, 40), 0), ((5, 40), 1), ((3, 7, 21), 1), ((1, 1), 0)])
@pytest.mark.parametrize("kind", RunningKind)
def test_running_matches_numpy(kind: RunningKind, shape: tuple[int, ...], axis: int, dtype: DType, isa: str) -> None:
    # Small whole numbers (for products mostly ones), so that every type holds the result exactly.
    x = np.random.default_rng(0).integers(0, 3, shape)
    if kind is RunningKind.PROD:
        x = 1 + (x == 2) * (np.arange(x.size).reshape(shape) % 11 == 0)
    array = x.astype(dtype.numpy)
    for exclusive, reverse in ((False, False), (True, False), (False, True), (True, True)):
        op = Running(kind, axis, exclusive, reverse)
        for order in (None, tuple(reversed(range(len(shape))))):
            got = run_step(op, [place(array, Layout(order))], isa, [Layout(order, gap=1)]).outputs[0]
            np.testing.assert_array_equal(got, expected(op, array))


def test_types_without_a_sum_are_named() -> None:
    with pytest.raises(UnsupportedOp, match="sum of bool"):
        running.requirements(Running(RunningKind.SUM, 0), (place(np.zeros(3, bool)),))
