"""``python -m benchmarks tiles`` on the GPU: every way of running a convolution is timed."""

from __future__ import annotations

import math

import pytest

from benchmarks import cases
from benchmarks.cases.conv import ConvCase

pytestmark = pytest.mark.gpu

NAMES = ("b1 960->960@7 3x3/1 depthwise relu6", "b1 128->128@28 3x3/1 relu")


def test_variants_are_timed_the_fastest_first() -> None:
    from benchmarks.gpu.tiles import measure_all
    from engine.targets.cuda.target import CudaTarget

    chosen: list[ConvCase] = [case for case in cases.conv.CASES if case.name in NAMES]
    target = CudaTarget(0)
    try:
        found = dict(measure_all(target, chosen, 4, math.inf))
    finally:
        target.close()
    assert list(found) == chosen
    for timed in found.values():
        times = [one.us for one in timed]
        assert times == sorted(times)
        assert 0 < times[0] < 1000
        assert [one.predicted_us is None for one in timed].count(True) == 1, "the present way"
