"""What the cost models say beside what was measured."""

from __future__ import annotations

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from benchmarks import cases
from benchmarks.cases.gemm import GemmCase
from benchmarks.gpu.predictions import predicted_us
from benchmarks.gpu.steps import context, step_of, zeros

H100 = context("sm_90a", 132)


def predicted(case: cases.KernelCase) -> float | None:
    return predicted_us(step_of(case, zeros), H100)


@pytest.mark.parametrize("suite", ["gemm", "random", "fp8", "attention", "windows", "varlen", "decode"])
def test_products_and_attentions_have_a_prediction(suite: str) -> None:
    for case in cases.KERNELS[suite]:
        found = predicted(case)
        assert found is not None
        assert 1 < found < 1e5


def test_other_steps_and_other_gpus_have_none() -> None:
    assert predicted(cases.KERNELS["light"][0]) is None
    assert predicted(cases.KERNELS["conv"][0]) is None
    assert predicted_us(step_of(GemmCase(64, 64, 64), zeros), context("sm_80", 108)) is None


@pytest.mark.parametrize(("size", "measured_us", "off"), [(4096, 182.0, 0.1), (8192, 1520.0, 0.25)])
def test_the_clock_fits_what_an_h100_took(size: int, measured_us: float, off: float) -> None:
    # Long products draw so much power that the GPU lowers its clock, which the model does not know.
    assert predicted(GemmCase(size, size, size)) == pytest.approx(measured_us, rel=off)
