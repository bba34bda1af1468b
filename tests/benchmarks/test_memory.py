"""The suite of memory, as far as it needs no GPU: the model, the distance, the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import engine
from benchmarks import cases
from benchmarks.cases.memory import BOUND, MemoryCase
from benchmarks.gpu.memory import attention, distance, drawn
from benchmarks.results import Device, Results, Row, Run
from benchmarks.tables import regenerated

SMALL = MemoryCase(2, 96, 16)
RUN = Run("2026-01-01T10:00:00", "abc1234", "2026-01-01", "580.1", {}, None)


def test_the_distance_is_that_of_attention() -> None:
    feeds = drawn(SMALL)
    with engine.load(attention(SMALL), device="cpu") as model:
        result = model.run(feeds)["y"]
    assert distance(SMALL, feeds, result) < BOUND
    worse, wrong = result.copy(), result.copy()
    worse[:, 1] *= np.float16(1.01)
    assert 9e-3 < distance(SMALL, feeds, worse) < 2e-2
    wrong[:, 1] = np.nan
    assert not distance(SMALL, feeds, wrong) <= BOUND


def test_the_table_has_megabytes(tmp_path: Path) -> None:
    (case,) = cases.MEMORY
    facts = {"tensors_bytes": 537_000_000, "arena_bytes": 0, "model_bytes": 538_000_000, "device_bytes": 550_000_000}
    row = Row("memory", case.name, None, {}, None, None, 3e-4, "abc1234", "2026-01-01", "00", RUN.id, facts=facts)
    device = Device("Some GPU", "sm_90a", 132)
    table = "<!-- table: some-gpu memory -->\n<!-- end -->\n"
    Results(device, [RUN], [row]).save(tmp_path)
    assert f"| {case.name} | 3.0e-04 | 537 | 0 | 538 | 550 | – |" in regenerated(table, tmp_path)
    Results(device, [RUN], [replace(row, failure="wrong")]).save(tmp_path)
    assert f"| {case.name} **failed** |" in regenerated(table, tmp_path)
