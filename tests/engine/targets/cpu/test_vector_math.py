"""The elementary functions against float64, over the whole range of float32 and densely around zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Pointwise
from engine.targets.cpu.codegen.isa import host_isas
from engine.targets.cpu.codegen.vector_math import VectorMath, softmax_exp
from engine.targets.cpu.kernel import KernelBuilder, KernelSpec, launch, pointer_to
from tests.engine.targets.cpu.steps import place, run_launches, run_step

# Largest error in units in the last place, as measured and rounded up; x86-64 without FMA rounds a little more often.
ULPS = {"exp": 1.1, "log": 0.9, "tanh": 1.4, "sigmoid": 2.7, "erf": 1.5, "sin": 1.6, "cos": 1.6}
SPECIAL = np.float32([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38, -3.4e38, 1, -1, 88.8, -103.9, -104.1])


def _arguments() -> np.ndarray:
    every = np.arange(0, 2**32, 9973, dtype=np.uint64).astype(np.uint32).view(np.float32)
    dense = np.random.default_rng(0).uniform(-10, 10, 100_000).astype(np.float32)
    return np.concatenate([every, dense, SPECIAL])


def _reference(name: str, x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        if name == "erf":
            return np.array([math.erf(v) for v in wide])
        if name == "sigmoid":
            return np.where(wide < 0, np.exp(wide) / (1 + np.exp(wide)), 1 / (1 + np.exp(-wide)))
        return getattr(np, name)(wide)


def _ulps(y: np.ndarray, exact: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        rounded = exact.astype(np.float32)
        return np.abs(y.astype(np.float64) - exact) / np.spacing(np.abs(rounded)).astype(np.float64)


@pytest.mark.parametrize("isa", host_isas())
@pytest.mark.parametrize("name", ULPS)
def test_function_is_within_its_error_everywhere(name: str, isa: str) -> None:
    x = _arguments()
    exact = _reference(name, x)
    op = Pointwise((ex.apply(PointOp(name), ex.Arg(0, DType.F32)),))
    y = run_step(op, [x], isa).outputs[0]
    with np.errstate(all="ignore"):
        rounded = exact.astype(np.float32)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(rounded))
    np.testing.assert_array_equal(y[np.isinf(rounded)], rounded[np.isinf(rounded)])
    assert np.isfinite(y[finite]).all()
    worst = int(np.argmax(np.where(finite, _ulps(y, exact), 0)))
    assert _ulps(y, exact)[worst] <= ULPS[name], f"{name}({x[worst]!r}) = {y[worst]!r}, not {exact[worst]!r}"


@dataclass(frozen=True)
class _ExpSpec(KernelSpec):
    short: bool
    family: ClassVar[str] = "test_exp"

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("x", "y", "count")

    def emit(self, kernel: KernelBuilder) -> None:
        b = kernel
        x, y, lanes = b.pointer("x"), b.pointer("y"), self.isa.lanes

        def vector(i: object, _: object) -> None:
            value = b.load_elements(DType.F32, lanes, b.at(x, i, 4))  # type: ignore[arg-type]
            result = softmax_exp(b, value) if self.short else VectorMath(b, lanes).exp_nonpositive(value)
            b.store(result, b.at(y, i, 4), 4)  # type: ignore[arg-type]

        b.loop(0, b.integer("count"), lanes, vector)


@pytest.mark.parametrize("isa", host_isas())
@pytest.mark.parametrize("short", [False, True])
def test_exponentials_of_a_softmax_are_exact_at_the_ends(short: bool, isa: str) -> None:
    x = np.concatenate([-np.geomspace(1e-30, 87.3, 4000), [0.0, -0.0, -88.0, -1e30, -np.inf, np.nan] * 16])
    x = x[: len(x) // 16 * 16].astype(np.float32)
    source, target = place(x), place(np.zeros_like(x))
    spec = _ExpSpec(host_isas()[isa], short)
    run_launches([launch(spec, {"x": pointer_to(source), "y": pointer_to(target), "count": len(x)}, 1)])
    y = target.buffer.data.view(np.float32)[target.offset : target.offset + len(x)]
    exact = np.exp(x.astype(np.float64))
    dense = x >= -87.3
    # Without FMA the short form loses digits of small results only.
    short_error = 4e-7 if host_isas()[isa].fma else 6e-6
    np.testing.assert_allclose(y[dense], exact[dense], rtol=short_error if short else 1.3e-7)
    assert (y[x <= -88] == 0).all()
    assert (y[x == 0] == 1).all()
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
