"""Processes that get cases ready side by side: what hangs, crashes or fails costs its own cases and no others."""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path

import pytest

from benchmarks.workers import Expired, all_at_once, groups, one_at_a_time, time_limit
from tests.benchmarks.fakes import BenchRecipe

ENVIRONMENT = {"SHARED": "told"}
LATER = 60.0  # seconds that no test takes


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def measured(*recipes: BenchRecipe, ready: float = LATER, seconds: float = math.inf) -> dict[str, str]:
    now = time.monotonic()
    return dict(one_at_a_time(recipes, ENVIRONMENT, now + ready, now + seconds))


def test_groups_are_of_one_model_and_as_many_as_there_are_processes() -> None:
    cases = [(name[0], name) for name in ("a1", "a2", "b1", "a3", "a4", "c1")]
    assert groups(cases, 1) == [["a1", "a2", "a3", "a4"], ["b1"], ["c1"]]
    assert groups(cases, 4) == [["a1", "a3"], ["a2", "a4"], ["b1"], ["c1"]]
    assert groups(cases, 16) == [["a1"], ["a3"], ["a2"], ["a4"], ["b1"], ["c1"]]
    assert groups([], 4) == []


def test_all_are_ready_before_the_first_is_measured_and_none_at_the_same_time(log: Path) -> None:
    found = measured(BenchRecipe(("a", "b"), log), BenchRecipe(("c",), log, build_seconds=0.5))
    assert found == {name: f"told {name}" for name in "abc"}
    assert "SHARED" not in os.environ
    lines = log.read_text().splitlines()
    assert set(lines[:2]) == {"ready a", "ready c"}
    assert lines[2:] == [f"{what} {name}" for name in "abc" for what in ("begin", "end")]


def test_one_that_is_not_ready_in_time_begins_anew_without_what_took_so_long(log: Path) -> None:
    begin = time.monotonic()
    found = measured(BenchRecipe(("a",), log), BenchRecipe(("b",), log, build_seconds=600), ready=5)
    assert found == {"a": "told a", "b": "told b plain"}
    assert time.monotonic() - begin < LATER


def test_one_that_dies_while_it_gets_ready_begins_anew(log: Path) -> None:
    assert measured(BenchRecipe(("a",), log, dies=True)) == {"a": "told a plain"}


def test_one_that_cannot_begin_says_why_for_all_its_cases(log: Path) -> None:
    found = measured(BenchRecipe(("a", "b"), log, impossible=True), BenchRecipe(("c",), log))
    assert found == {"a": "No module named 'timm'", "b": "No module named 'timm'", "c": "told c"}


def test_a_case_that_fails_costs_itself_and_a_crash_the_rest_of_its_process(log: Path) -> None:
    found = measured(BenchRecipe(("fails", "a", "dies", "b"), log), BenchRecipe(("c",), log))
    assert found == {
        "fails": "an illegal memory access",
        "a": "told a",
        "dies": "its process ended",
        "b": "its process ended",
        "c": "told c",
    }


def test_after_the_deadline_no_case_is_begun(log: Path) -> None:
    recipes = [BenchRecipe(("a", "b"), log), BenchRecipe(("c",), log)]
    now = time.monotonic()
    stream = one_at_a_time(recipes, ENVIRONMENT, now + LATER, now + LATER)
    assert next(stream) == ("a", "told a")
    stream.close()
    assert measured(*recipes, seconds=0) == {}
    assert "begin b" not in log.read_text()


def test_where_nothing_is_timed_all_work_at_once(log: Path) -> None:
    recipes = [BenchRecipe((f"a{i}", f"b{i}"), log) for i in range(3)]
    found = dict(all_at_once(recipes, ENVIRONMENT, time.monotonic() + LATER))
    assert found == {name: f"told {name}" for recipe in recipes for name in recipe.names}


def test_at_once_too_what_crashes_or_fails_costs_its_own_cases(log: Path) -> None:
    recipes = [
        BenchRecipe(("fails", "a"), log),
        BenchRecipe(("b", "dies", "c"), log),
        BenchRecipe(("d",), log, impossible=True),
        BenchRecipe(("e", "f"), log, dies=True),
    ]
    assert dict(all_at_once(recipes, ENVIRONMENT, time.monotonic() + LATER)) == {
        "fails": "an illegal memory access",
        "a": "told a",
        "b": "told b",
        "dies": "its process ended",
        "c": "its process ended",
        "d": "No module named 'timm'",
        "e": "its process ended",
        "f": "its process ended",
    }


def test_at_once_too_the_deadline_ends_what_is_still_out(log: Path) -> None:
    begin = time.monotonic()
    recipes = [BenchRecipe(("a",), log), BenchRecipe(("b",), log, build_seconds=600)]
    assert dict(all_at_once(recipes, ENVIRONMENT, begin + 6)) == {"a": "told a"}
    assert time.monotonic() - begin < LATER


def test_a_time_limit_interrupts_what_catches_every_exception() -> None:
    begin = time.monotonic()

    def stubborn() -> None:
        while True:
            with contextlib.suppress(Exception):
                time.sleep(10)

    with pytest.raises(Expired), time_limit(begin + 0.2):
        stubborn()
    assert time.monotonic() - begin < 5
    with pytest.raises(Expired), time_limit(time.monotonic()):
        raise AssertionError("not begun: the time is up")
    with time_limit(time.monotonic() + 0.3):
        pass
    time.sleep(0.5)  # the alarm is off
