"""Checks come before times; what is wrong does not count, and the row says why."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.cases.gemm import GemmCase
from benchmarks.environment import new_run
from benchmarks.measure import Contender, Entry, measure, order_of, worst
from benchmarks.recorder import Recorder
from benchmarks.results import Ceilings, Device, Results
from tests.benchmarks.fakes import Fake, Stuck

CASE = GemmCase(1, 2, 3)
GPU = Device("Some GPU", "sm_90a", 132)
RUN = new_run("gpu", "abc1234", Ceilings(1e12, 1e12))


def refuses() -> Contender:
    raise RuntimeError("no kernel\nfor this shape")


def test_figures_are_medians_of_rounds_and_the_ratio_is_to_the_best_peer() -> None:
    ours = Fake(times=(10, 90, 11, 12, 1))
    entries = [Entry("slow", lambda: Fake(times=(40.0,))), Entry("fast", lambda: Fake(times=(5, 22, 22, 70, 22)))]
    found = measure(lambda: ours, entries, 1e-2, rounds=5)
    assert found.ours_us == 11
    assert found.peers == {"slow": 40, "fast": 22}
    assert found.ratio == 2
    assert found.rel_err == 1e-4
    assert not found.failure


def test_of_errors_one_that_is_not_a_number_is_the_worst() -> None:
    assert worst([1e-3, 2e-3]) == 2e-3
    assert math.isnan(worst([1e-3, float("nan")])) and math.isnan(worst([float("nan"), 1e-3]))


def test_contenders_take_turns() -> None:
    turns: list[str] = []

    class Turn(Fake):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def round_us(self) -> float:
            turns.append(self.name)
            return 1.0

    measure(lambda: Turn("ours"), [Entry("a", lambda: Turn("a")), Entry("b", lambda: Turn("b"))], 1e-2, rounds=2)
    assert turns == ["ours", "a", "b", "ours", "b", "a"]


@pytest.mark.parametrize("count", range(1, 8))
def test_every_contender_follows_every_other_one(count: int) -> None:
    orders = [order_of(number, count) for number in range(count * (1 + count % 2))]
    assert all(sorted(order) == list(range(count)) for order in orders)
    follows = Counter(pair for order in orders for pair in pairwise(order))
    assert len(follows) == count * (count - 1) and len(set(follows.values())) <= 1


@pytest.mark.parametrize("error", [2e-2, float("nan"), float("inf")])
def test_a_wrong_result_of_ours_is_a_failure_and_nothing_is_timed(error: float) -> None:
    ours, peer = Fake(error), Fake()
    found = measure(lambda: ours, [Entry("peer", lambda: peer)], 1e-2)
    assert found.failure.startswith("relative error")
    assert found.ours_us is None
    assert found.ratio is None
    assert ours.rounds == peer.rounds == 0


def test_ours_that_does_not_run_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(refuses, [], 1e-2).failure == "no kernel for this shape"
    assert measure(Stuck, [], 1e-2).failure == "an illegal memory access"
    assert "RuntimeError" in capsys.readouterr().err


def test_a_peer_with_a_wrong_result_does_not_count() -> None:
    wrong, right = Fake(2e-2, (1.0,)), Fake(9e-3, (20.0,))
    found = measure(Fake, [Entry("wrong", lambda: wrong), Entry("right", lambda: right)], 1e-2)
    assert found.peers == {"wrong": None, "right": 20}
    assert found.reasons == {"wrong": "its own result is off: relative error 2.0e-02"}
    assert found.ratio == 2
    assert wrong.rounds == 0


def test_a_peer_that_cannot_run_does_not_count() -> None:
    found = measure(Fake, [Entry("none", refuses), Entry("stuck", Stuck)], 1e-2)
    assert found.peers == {"none": None, "stuck": None}
    assert found.reasons == {"none": "no kernel for this shape", "stuck": "an illegal memory access"}
    assert found.ours_us == 10
    assert found.ratio is None


def test_a_part_takes_no_part_in_the_ratio() -> None:
    entries = [Entry("whole", lambda: Fake(times=(30.0,))), Entry("alone", lambda: Fake(times=(5.0,)), part=True)]
    found = measure(Fake, entries, 1e-2)
    assert found.peers == {"whole": 30}
    assert found.parts == {"alone": 5}
    assert found.ratio == 3


def test_a_failing_check_is_a_failing_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(GPU, RUN, tmp_path)
    recorder.add(CASE, measure(lambda: Fake(float("nan")), [], 1e-2), "hash", floor_us=1.0)
    assert recorder.end(1) == 1
    assert f"{CASE.name:42} FAILED relative error nan" in capsys.readouterr().out
    row = Results.load(tmp_path / "some-gpu.json").rows["gemm", CASE.name]
    assert row.failure
    assert row.ours_us is None
    assert row.rel_err is None


def test_a_row_that_holds_is_recorded_with_all_it_depends_on(tmp_path: Path) -> None:
    recorder = Recorder(GPU, RUN, tmp_path)
    entries = [Entry("peer", lambda: Fake(times=(12.345678,))), Entry("none", refuses)]
    recorder.add(CASE, measure(Fake, entries, 1e-2), "0123", floor_us=1.23456, run_us=55.55)
    assert recorder.end(1) == 0
    assert recorder.end(2) == 1, "a row is missing"
    results = Results.load(tmp_path / "some-gpu.json")
    row = results.rows["gemm", CASE.name]
    assert (row.ours_us, row.peers, row.ratio) == (10.0, {"peer": 12.35, "none": None}, 1.235)
    assert (row.floor_us, row.run_us, row.reasons) == (1.23, 55.5, {"none": "no kernel for this shape"})
    assert (row.commit, row.date, row.kernel_hash) == ("abc1234", RUN.date, "0123")
    assert results.runs[row.run] == RUN


def test_a_run_without_rows_fails(tmp_path: Path) -> None:
    assert Recorder(GPU, RUN, tmp_path).end(1) == 1
