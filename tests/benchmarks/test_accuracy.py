"""The suite of accuracy, as far as it needs no GPU: references, distances, the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cupy")

import engine
from benchmarks import cases
from benchmarks.cases import accuracy
from benchmarks.cases.models import MINILM, MOBILENET, ModelCase
from benchmarks.gpu.accuracy import error, judged, references
from benchmarks.models.store import build_all, model_file, weights_file
from benchmarks.results import Device, Results, Row, Run
from benchmarks.tables import regenerated

SMALL = (ModelCase(MOBILENET, 1), ModelCase(MOBILENET, 2))
RUN = Run("2026-01-01T10:00:00", "abc1234", "2026-01-01", "580.1", {}, None)


def test_the_cpu_is_close_to_the_reference_and_what_is_wrong_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "compared", lambda name: SMALL)
    build_all([MOBILENET, MOBILENET], tmp_path)
    path = model_file(tmp_path, MOBILENET)
    assert weights_file(path).exists()
    expected = references(MOBILENET, path, threads=1)
    assert set(expected) == {sizes.name for sizes in SMALL}
    with engine.load(path, device="cpu", strict=True) as model:
        for sizes in SMALL:
            assert error(model, sizes, expected[sizes.name]) <= 1e-5
        right = expected[SMALL[0].name]["logits"]
        wrong = right + np.float32(1e-3 * right.std())
        assert error(model, SMALL[0], {"logits": wrong}) > 1e-4
        assert error(model, SMALL[0], {"logits": right[:, :-1]}) == float("inf")


def test_the_worst_size_counts_and_all_beyond_the_bound_are_named() -> None:
    found = judged({"resnet50 batch=1": 1.23e-3, "resnet50 batch=7": 4.56e-3}, 5e-3)
    assert (found.rel_err, found.failure) == (4.6e-3, "")
    assert found.errors == {"batch=1": 1.2e-3, "batch=7": 4.6e-3}
    wrong = judged({"a batch=1": 2e-2, "a batch=7": 1e-4, "a batch=32": float("nan")}, 5e-3)
    assert wrong.failure == "relative error above 0.005 at a batch=1: 2.0e-02, a batch=32: nan"


def test_sizes_fit_the_models() -> None:
    for case in cases.ACCURACY:
        every = (*accuracy.compared(case.model), accuracy.largest(case.model), *accuracy.buckets(case.model))
        assert {sizes.model for sizes in every} == {case.model}
        assert len(set(accuracy.buckets(case.model))) == 8
    assert [sizes.sequence for sizes in accuracy.compared(MINILM)] == [17, 128, 384] * 3


def test_the_table_has_errors_counts_and_memory(tmp_path: Path) -> None:
    first, second = cases.ACCURACY[:2]
    empty = Row("accuracy", first.name, None, {}, None, None, 1.5e-3, "abc1234", "2026-01-01", "00", RUN.id)
    facts = {"steps": 51, "opaque": 0, "kernels": 20, "arena_bytes": 10_000_000, "activations_bytes": 123_400_000}
    rows = [
        replace(empty, facts={**facts, "weights_bytes": 9_300_000, "buckets_bytes": 30_000_000}),
        replace(empty, case=second.name, rel_err=3e-2, facts=facts, failure="relative error 3.0e-02, above 0.02"),
    ]
    device = Device("Some GPU", "sm_90a", 132)
    saved = Results(device, [RUN], rows).save(tmp_path)
    assert Results.load(saved).rows[rows[0].key] == rows[0]
    text = regenerated("<!-- table: some-gpu accuracy -->\n<!-- end -->\n", tmp_path)
    assert "| case | error | bound | steps | opaque | kernels | activations | arena | weights | 8 plans, all |" in text
    assert f"| {first.name} | 1.5e-03 | 0.005 | 51 | 0 | 20 | 123.4 | 10.0 | 9.3 | 30.0 |" in text
    assert f"| {second.name} | **failed** 3.0e-02 | 0.02 | 51 | 0 | 20 | 123.4 | 10.0 | – | – |" in text
    assert "MB (10⁶ bytes). Some GPU; driver 580.1; commit abc1234; 2026-01-01." in text
