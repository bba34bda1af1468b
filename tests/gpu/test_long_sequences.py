"""Attention over one very long sequence: right, and nowhere a matrix of scores."""

from __future__ import annotations

import pytest

from benchmarks.cases.memory import BOUND, CASES, MemoryCase

pytestmark = pytest.mark.gpu

OTHERS = 64 << 20


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_long_sequence_takes_the_memory_of_its_tensors(case: MemoryCase) -> None:
    from benchmarks.gpu.memory import measure

    error, facts = measure(case)
    assert error <= BOUND
    assert facts["arena_bytes"] == 0
    assert facts["model_bytes"] <= 2 * case.tensors_bytes + OTHERS, "two runs' inputs and results at most"
    assert facts["device_bytes"] <= 2 * case.tensors_bytes + 8 * OTHERS, "with the driver's own and the kernels"
    assert 4 * facts["device_bytes"] < case.scores_bytes
