"""Which cases are timed on a hot chip."""

from __future__ import annotations

import pytest

from benchmarks.cases import conv, gemm
from benchmarks.gpu.pace import COOL, HOT, pace_of
from benchmarks.gpu.steps import step_of


@pytest.mark.parametrize(
    ("name", "pace"),
    [
        ("b32 256->256@56 3x3/1 relu", HOT),
        ("b128 64->128@112 3x3/1 relu", HOT),
        ("b1 512->512@7 3x3/1 relu", COOL),
        ("b128 144->144@56 3x3/1 depthwise silu", COOL),
        ("b128 3->32@224 3x3/2 relu6", COOL),
    ],
)
def test_pace_of_convolutions(name: str, pace: object) -> None:
    (case,) = (case for case in conv.CASES if case.name == name)
    assert pace_of([step_of(case)]) is pace


def test_pace_of_products() -> None:
    assert pace_of([step_of(gemm.GemmCase(4096, 4096, 4096))]) is HOT
    assert pace_of([step_of(gemm.GemmCase(16, 4096, 4096))]) is COOL
    assert pace_of([step_of(gemm.GemmCase(256, 256, 256))]) is COOL
    assert HOT.warm_ms > COOL.warm_ms > COOL.round_ms


def test_pace_of_steps_is_that_of_all_together() -> None:
    heavy, light = step_of(gemm.GemmCase(8192, 8192, 8192)), step_of(gemm.GemmCase(1, 8192, 8192))
    assert pace_of([heavy, light]) is HOT
    assert pace_of([light] * 3) is COOL
    assert pace_of([]) is COOL
