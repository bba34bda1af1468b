"""Throughput with and without stamps: the ratio with its interval, fours of sides, loads. Needs no GPU."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.gpu import overhead
from benchmarks.gpu.overhead import Effort, Ratio


def sides(costs: list[float]) -> tuple[list[float], list[float]]:
    """With and without stamps, of fours in which the stamps cost so much."""
    return [1.0 + cost for cost in costs for _ in range(2)], [1.0] * (2 * len(costs))


def test_even_fours_leave_no_doubt() -> None:
    found = overhead.ratio_of(*sides([0.01] * 8))
    assert found.low == pytest.approx(found.centre) == pytest.approx(found.high) == pytest.approx(1 / 1.01)


def test_a_few_fours_that_were_disturbed_move_nothing() -> None:
    calm = [0.004, 0.006, 0.005, 0.0055, 0.0045] * 4
    found, other = overhead.ratio_of(*sides(calm)), overhead.ratio_of(*sides([*calm, 0.5, 0.4]))
    assert found.centre == pytest.approx(1 / 1.005, abs=1e-4)
    assert other.centre == pytest.approx(found.centre, abs=5e-4) and other.low > 0.99


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    random, within, truth = np.random.default_rng(0), 0, 1 / 1.01
    for n in (8, 20) * 750:
        noise = np.exp(random.normal(0, 0.01, 2 * n))
        found = overhead.ratio_of((1.01 * noise).tolist(), [1.0] * (2 * n))
        assert found.low <= found.centre <= found.high
        within += found.low <= truth <= found.high
    assert 0.94 < within / 1500 < 0.98


@pytest.mark.parametrize("fours", [0, 7])
def test_too_few_fours_have_no_interval(fours: int) -> None:
    with pytest.raises(ValueError, match="8 fours"):
        overhead.ratio_of(*sides([0.01] * fours))


class Clock:
    """A GPU whose clock drifts, and what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, drift: float = 0.0, noise: float = 0.0) -> None:
        self.now, self.drift, self.noise = 0.0, drift, noise
        self.stamped = True
        self.sides: list[tuple[bool, int]] = []
        self._random = np.random.default_rng(0)
        monkeypatch.setattr(overhead.time, "perf_counter", lambda: self.now)

    def switch(self, on: bool) -> None:
        self.stamped = on

    def run(self, runs: int) -> None:
        assert not gc.isenabled() or len(self.sides) < 2
        self.sides.append((self.stamped, runs))
        slower = (1 + self.drift * self.now) * (1 + self._random.normal(0, self.noise))
        self.now += runs * 1e-3 * slower * (1.02 if self.stamped else 1.0)


def test_sides_come_in_fours_whose_order_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = overhead.measure(overhead.batches(clock.run, clock.switch, 16), Effort(0.004, 10.0))
    assert (found.us, found.with_us) == (pytest.approx(1000), pytest.approx(1020))
    assert found.ratio.centre == pytest.approx(1 / 1.02)
    fours = clock.sides[3:]
    assert len(fours) == 4 * overhead.LEAST_FOURS, "no more than it takes"
    assert [on for on, _ in fours[:8]] == [False, True, True, False, True, False, False, True]
    assert {runs for _, runs in fours} == {128}, "0.12 s, and a multiple of what one sample stands for"
    assert gc.isenabled()


def test_a_drift_meets_both_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, drift=0.05)
    found = overhead.measure(overhead.batches(clock.run, clock.switch, 16), Effort(0.004, 10.0))
    assert found.ratio.centre == pytest.approx(1 / 1.02, abs=2e-4)


def test_it_goes_on_until_the_interval_is_narrow_or_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, noise=0.02)
    narrow = overhead.measure(overhead.batches(clock.run, clock.switch, 16), Effort(0.006, 100.0))
    assert narrow.ratio.half <= 0.006 and len(clock.sides) > 8 * overhead.LEAST_FOURS
    clock = Clock(monkeypatch, noise=0.02)
    begin = clock.now
    brief = overhead.measure(overhead.batches(clock.run, clock.switch, 16), Effort(0.0, 6.0, warm_up=1.0))
    assert brief.ratio.half > narrow.ratio.half and 7.0 < clock.now - begin < 8.0


def test_threads_run_through_all_sides() -> None:
    """What a side sees is the runs that end in it; nobody waits in between."""
    stamped, started = [False], list[threading.Thread]()

    def run() -> None:
        started.append(threading.current_thread())
        time.sleep(0.003 if stamped[0] else 0.001)

    def switch(on: bool) -> None:
        stamped[0] = on

    with overhead.steady(run, 2, switch) as side:
        plain, slow, again = side(False), side(True), side(False)
    assert len(set(started)) == 2
    assert slow > 1.5 * max(plain, again)
    ran = len(started)
    time.sleep(0.01)
    assert len(started) == ran, "they have ended"


def failing_after(runs: int) -> Callable[[], None]:
    left = [runs]

    def run() -> None:
        time.sleep(1e-4)
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the device is lost")

    return run


def test_a_run_that_fails_is_the_failure() -> None:
    with overhead.steady(failing_after(20), 2, lambda on: None) as side, pytest.raises(RuntimeError, match="lost"):
        side(False)


def test_half_of_an_interval() -> None:
    assert Ratio(0.995, 0.99, 1.0).half == pytest.approx(0.005)
