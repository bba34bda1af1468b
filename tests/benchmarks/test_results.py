"""Results files: what is written is what is read, and partial runs add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cases
from benchmarks.__main__ import main
from benchmarks.results import FOLDER, Ceilings, Device, Results, Row, Run

GPU = Device("NVIDIA H100 80GB HBM3", "sm_90a", 132)
FIRST = Run("2026-01-01T10:00:00", "aaa", "2026-01-01", "580.1", {"torch": "2.11"}, Ceilings(6.6e14, 3e12))
SECOND = Run("2026-01-02T10:00:00", "bbb", "2026-01-02", "580.2", {"torch": "2.12"}, None)


def row(case: str, run: Run, ours_us: float = 2.0) -> Row:
    return Row("gemm", case, ours_us, {"cuBLAS": 3.0}, 1.5, 1.0, 2e-4, run.commit, run.date, "00ff", run.id)


def results(run: Run, *rows: Row) -> Results:
    return Results(GPU, [run], rows)


def test_a_file_is_named_after_its_device() -> None:
    assert GPU.stem == "nvidia-h100-80gb-hbm3"
    assert Device("AMD EPYC znver5, 2 threads").stem == "cpu-amd-epyc-znver5-2-threads"


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    full = replace(
        row("a", FIRST), parts={"cuBLAS alone": 2.5}, reasons={"flash": "no masks"}, run_us=9.0, peers={"flash": None}
    )
    failed = replace(row("b", FIRST), ours_us=None, ratio=None, rel_err=None, failure="relative error nan")
    saved = results(FIRST, full, failed, row("c", FIRST))
    loaded = Results.load(saved.save(tmp_path))
    assert loaded.device == GPU
    assert loaded.runs == saved.runs
    assert loaded.rows == saved.rows


def test_a_file_says_device_driver_and_versions_at_its_top(tmp_path: Path) -> None:
    both = results(FIRST, row("a", FIRST))
    both.merge(results(SECOND, row("b", SECOND)))
    content = json.loads(both.save(tmp_path).read_text())
    assert (content["device"], content["driver"]) == (GPU.name, SECOND.driver)
    assert content["versions"] == SECOND.versions
    assert [run["ceilings"] for run in content["runs"]] == [
        {"flops": 6.6e14, "bytes": 3e12, "cache_bytes": 0, "cached_bytes": 0.0},
        None,
    ]


def test_a_partial_run_replaces_its_rows_and_leaves_the_others(tmp_path: Path) -> None:
    whole = results(FIRST, row("a", FIRST), row("b", FIRST))
    whole.merge(results(SECOND, row("b", SECOND, 1.0), row("c", SECOND)))
    loaded = Results.load(whole.save(tmp_path))
    assert {key[1]: (found.commit, found.ours_us) for key, found in loaded.rows.items()} == {
        "a": ("aaa", 2.0),
        "b": ("bbb", 1.0),
        "c": ("bbb", 2.0),
    }
    assert set(loaded.runs) == {FIRST.id, SECOND.id}


def test_a_run_with_no_row_left_is_dropped(tmp_path: Path) -> None:
    whole = results(FIRST, row("a", FIRST))
    whole.merge(results(SECOND, row("a", SECOND)))
    assert set(Results.load(whole.save(tmp_path)).runs) == {SECOND.id}


def test_rows_of_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot join"):
        results(FIRST).merge(Results(Device("NVIDIA H200", "sm_90a", 132), [SECOND], [row("a", SECOND)]))


@pytest.mark.parametrize("content", ["[]", "{}", '{"device": "x"}', "not json"])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError):
        Results.load(tmp_path / "x.json")


def test_rows_of_unknown_runs_are_refused(tmp_path: Path) -> None:
    path = results(FIRST, row("a", FIRST)).save(tmp_path)
    path.write_text(path.read_text().replace(f'"run": "{FIRST.id}"', '"run": "2020"'))
    with pytest.raises(ValueError, match="unknown runs"):
        Results.load(path)


def test_the_floor_is_the_sum_of_what_each_step_takes_at_least() -> None:
    steps = [(10**9, 0, 0), (0, 10**6, 0), (10**6, 10**6, 0)]
    assert Ceilings(1e12, 1e9).floor_us(steps) == pytest.approx(1000 + 1000 + 1000)
    cached = Ceilings(1e12, 1e9, cache_bytes=10**6, cached_bytes=4e9)
    assert cached.floor_us([*steps, (0, 10**6, 10**6), (0, 10**6, 4 * 10**5)]) == pytest.approx(3000 + 250 + 600 + 100)


def test_merge_adds_files_measured_elsewhere_and_drops_what_the_lists_have_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    a, b = (case.name for case in cases.KERNELS["gemm"][:2])
    results(FIRST, row(a, FIRST), row(b, FIRST), row("of old", FIRST)).save(here)
    path = results(SECOND, row(b, SECOND), row("of a list to come", SECOND)).save(there)
    assert main(["merge", "--results", str(here), str(path)]) == 0
    merged = Results.load(here / path.name)
    assert {case: found.commit for (_, case), found in merged.rows.items()} == {
        a: "aaa", b: "bbb", "of a list to come": "bbb"
    }  # fmt: skip
    assert "1 not listed any more dropped" in capsys.readouterr().out


def test_merge_leaves_rows_that_are_newer(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    results(SECOND, replace(row("a", SECOND), date="2026-11-25")).save(here)
    path = results(FIRST, replace(row("a", FIRST), date="2020-01-01")).save(there)
    assert main(["merge", "--results", str(here), str(path)]) == 0
    assert Results.load(here / path.name).rows["gemm", "a"].commit == "bbb"


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    path = results(FIRST, row("a", FIRST)).save(tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(SystemExit, match=path.name):
        main(["merge", "--results", str(tmp_path), str(path)])


def test_the_committed_files_are_this_programs() -> None:
    paths = sorted(FOLDER.glob("*"))
    assert paths
    for path in paths:
        loaded = Results.load(path)
        assert path.name == f"{loaded.device.stem}.json"
        assert all(found.commit and found.date and found.kernel_hash for found in loaded.rows.values())
