"""The table of exports: every file has a row, which says what was found; rows of other files are stale."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cases, exports, hashes
from benchmarks.__main__ import main
from benchmarks.cases.exports import CASES, ExportCase
from benchmarks.results import FOLDER, Device, Results, Row, Run
from benchmarks.tables import problem_of, regenerated

CPU = Device("Some CPU, 2 threads")
RUN = Run("2026-01-01T10:00:00", "abc1234", "2026-01-01", "", {"onnxruntime": "1.32"}, None)
BERT = ExportCase("bert-sdpa-legacy-14")
COMMITTED = FOLDER / "cpu-amd-epyc-znver5-2-threads.json"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with one export."""
    for suffix in (".onnx", ".npz"):
        shutil.copy(hashes.FIXTURES / f"{BERT.name}{suffix}", tmp_path)
    return tmp_path


def test_every_file_with_attention_is_listed() -> None:
    files = {path.stem for path in hashes.FIXTURES.glob("*.onnx")}
    assert {case.name for case in CASES} == {name for name in files if not name.startswith("convnet")}
    assert len({case.name for case in CASES}) == len(CASES)
    assert cases.CPU["exports"] is CASES


def test_every_committed_row_is_there_and_right() -> None:
    results = Results.load(COMMITTED)
    for case in CASES:
        row = results.rows[case.suite, case.name]
        assert not row.failure
        assert set(row.errors) | set(row.reasons) >= {"PyTorch", "ONNX Runtime"}
        assert ("packed" in row.reasons) == (row.facts["packed"] == 0)
        assert row.facts["packed"] in (0, row.facts["attentions"])


def test_an_export_is_measured_beside_both() -> None:
    found = exports.measure(BERT)
    assert found.facts == {"opset": 14, "attentions": 2, "packed": 2, "opaque": 0}
    assert found.producer == "pytorch 2.11.0"
    assert set(found.measurement.errors) == {"PyTorch", "ONNX Runtime"}
    assert 0 < found.measurement.rel_err < 1e-6  # type: ignore[operator]
    assert not found.measurement.failure


def test_wrong_numbers_fail(copied: Path) -> None:
    with np.load(copied / f"{BERT.name}.npz") as file:
        arrays = dict(file)
    arrays["out_0"][1] += 0.01
    np.savez(copied / f"{BERT.name}.npz", **arrays)
    found = exports.measure(BERT, copied)
    assert "from PyTorch" in found.measurement.failure
    assert found.measurement.errors["ONNX Runtime"] < 1e-6


def test_a_lost_attention_fails() -> None:
    found = exports.measure(replace(BERT, attentions=3))
    assert found.measurement.failure == "2 attentions recognised, of 3"


def test_padded_positions_are_not_compared(copied: Path) -> None:
    with np.load(copied / f"{BERT.name}.npz") as file:
        arrays = dict(file)
    arrays["out_0"][arrays["in_attention_mask"] == 0] = 100.0
    np.savez(copied / f"{BERT.name}.npz", **arrays)
    assert not exports.measure(BERT, copied).measurement.failure


def test_a_missing_file_fails_without_the_others(copied: Path) -> None:
    results = dict(exports.measure_all([ExportCase("nothing"), BERT], folder=copied))
    assert "nothing.onnx" in results[ExportCase("nothing")].measurement.failure
    assert str(copied) not in results[ExportCase("nothing")].measurement.failure
    assert not results[BERT].measurement.failure


def test_another_file_makes_a_row_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(CPU, [RUN], [row(BERT, kernel_hash=hashes.kernel_hash(CPU, BERT))])
    assert problem_of(results, BERT) == ""
    assert problem_of(results, CASES[0]) == "missing"
    monkeypatch.setattr(hashes, "export_hash", lambda case: hashes.hash_texts(["another file"]))
    assert problem_of(results, BERT).startswith("stale")


def test_a_hash_depends_on_file_and_numbers(copied: Path) -> None:
    assert hashes.export_hash(BERT, copied) == hashes.export_hash(BERT)
    seen = {hashes.export_hash(BERT, copied)}
    for suffix in (".npz", ".onnx"):
        path = copied / f"{BERT.name}{suffix}"
        path.write_bytes(path.read_bytes() + b" ")
        seen.add(hashes.export_hash(BERT, copied))
    (copied / f"{BERT.name}.npz").unlink()
    seen.add(hashes.export_hash(BERT, copied))
    assert len(seen) == 4


def row(case: ExportCase, kernel_hash: str = "") -> Row:
    return Row(
        case.suite, case.name, None, {}, None, None, 2.4e-7, "abc1234", "2026-01-01", kernel_hash, RUN.id,
        facts={"opset": 14, "attentions": 2, "packed": 2, "opaque": 0},
        errors={"PyTorch": 2.4e-7, "ONNX Runtime": 1e-7}, producer="pytorch 2.11.0",
    )  # fmt: skip


def test_a_table_says_what_was_recognised_and_why_not(tmp_path: Path) -> None:
    vit = next(case for case in CASES if case.name == "vit_legacy")
    t5 = next(case for case in CASES if case.name.startswith("t5"))
    plain = {"opset": 17, "attentions": 2, "packed": 0, "opaque": 0}
    rows = [
        row(BERT),
        replace(row(t5), facts=plain, reasons={"packed": "attention '/a/b + /c…': its bias is more than a 'mask'"}),
        replace(row(vit), facts=plain | {"attentions": 1}, reasons={"packed": "no mask", "ONNX Runtime": "no"},
                errors={"PyTorch": 1e-3}, failure="wrong"),
    ]  # fmt: skip
    saved = Results(CPU, [RUN], rows).save(tmp_path)
    assert Results.load(saved).rows[rows[0].key] == rows[0]
    lines = regenerated(f"<!-- table: {CPU.stem} exports -->\n<!-- end -->\n", tmp_path).splitlines()
    assert lines[1:6] == [
        "| export | written by | opset | fused | packed | from PyTorch | from ONNX Runtime |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: |",
        f"| {BERT.name} | pytorch 2.11.0 | 14 | 2 of 2 | yes | 2e-07 | 1e-07 |",
        f"| {t5.name} | pytorch 2.11.0 | 17 | 2 of 2 | no: attention: its bias is more than a 'mask' | 2e-07 | 1e-07 |",
        f"| {vit.name} **failed** | pytorch 2.11.0 | 17 | 1 of 2 | no mask | 1e-03 | – |",
    ]


def test_the_program_keeps_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exports", "--results", str(tmp_path), "--case", BERT.name, "--commit", "abc1234"]) == 0
    assert "packed 2" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    found = Results.load(path).rows["exports", BERT.name]
    assert found.facts["packed"] == 2
    assert found.commit == "abc1234"
