"""Which runs are sampled, and their times: they add up, and never count backwards."""

import numpy as np
import pytest

from engine.targets.cuda.sampled_times import MOST_RUNS, SampledTimes, Sampling

EVERY = 16


def test_the_mean_of_the_samples_stands_for_every_run() -> None:
    times = SampledTimes(2)
    assert times.total(1).tolist() == [0.0, 0.0]
    times.add(np.array([10.0, 1.0]), 2)
    assert times.total(2).tolist() == [20.0, 2.0]
    times.add(np.array([20.0, 3.0]), 2)
    assert times.total(4).tolist() == [60.0, 8.0]


def test_a_sample_counts_as_often_as_the_runs_that_it_stands_for() -> None:
    """Runs one by one, of which every sixteenth is sampled, then a burst of quicker ones, in which fewer are."""
    times, sampling, starts = SampledTimes(1), Sampling(), [*steady(1600, 3.5e-3), *steady(6400, 220e-6, start=6.0)]
    truth, at_change = 0.0, 0.0
    for run, now in enumerate(starts):
        took = 500.0 if run < 1600 else 100.0
        truth += took
        if stands_for := sampling.stands_for(run, EVERY):
            sampling.taken(run, EVERY, 0.015, now)
            times.add(np.array([took]), stands_for)
        if run == 1599:
            at_change = float(times.total(run + 1)[0])
            assert at_change == truth
    assert times.samples < 220
    assert float(times.total(len(starts))[0]) == pytest.approx(truth, rel=0.01)
    rate = (float(times.total(len(starts))[0]) - at_change) / 6400
    assert rate == pytest.approx(100.0, rel=0.1), "and so does the difference of two scrapes"


def test_a_quick_sample_makes_no_total_less_nor_keeps_it_far_above_the_mean() -> None:
    random, times = np.random.default_rng(0), SampledTimes(1)
    sampled, last, most, stood = [], 0.0, 0.0, 0
    for run in range(1, 2000):
        if run % EVERY == 2:
            sampled.append(float(random.exponential(1e4)))
            times.add(np.array(sampled[-1:]), EVERY)
        total, mean = float(times.total(run)[0]), float(np.mean(sampled)) if sampled else 0.0
        assert total >= last
        most = max(most, mean)
        assert run * mean <= total * (1 + 1e-12) and total - run * mean <= (EVERY + 2) * most
        stood += total > run * mean * (1 + 1e-12)
        last = total
    assert len(sampled) == 125 and stood > 100  # so that the case is there


def taken(starts: list[float], every: int = EVERY, seconds: float = 0.015) -> list[int]:
    """The numbers of the runs that are sampled, of runs that are queued at these times."""
    sampling, found = Sampling(), list[int]()
    for run, now in enumerate(starts):
        if sampling.stands_for(run, every):
            sampling.taken(run, every, seconds, now)
            found.append(run)
    return found


def steady(runs: int, spacing: float, start: float = 0.0) -> list[float]:
    return [start + run * spacing for run in range(runs)]


def test_long_runs_are_sampled_one_in_sixteen() -> None:
    assert taken(steady(100, 3.5e-3)) == [1, 17, 33, 49, 65, 81, 97]


def test_short_runs_are_sampled_by_how_fast_they_come() -> None:
    assert taken(steady(300, 220e-6)) == [1, 17, 86, 155, 224, 293]


def test_the_shortest_runs_are_not_waited_for_without_end() -> None:
    found = taken(steady(1000, 1e-6))
    assert np.diff(found).tolist() == [EVERY, *[MOST_RUNS] * 3]
    assert taken([0.0] * 40) == [1, 17, 33], "a clock that stands still says nothing"


def test_after_a_burst_a_model_that_is_asked_seldom_is_sampled_again() -> None:
    burst = steady(400, 220e-6)
    found = taken(burst + steady(200, 0.1, start=1.0))
    last = max(run for run in found if run < len(burst))
    after = [run for run in found if run >= len(burst)]
    assert after[0] - last <= 69 and set(np.diff(after)) == {EVERY}


def test_the_first_runs_of_bursts_are_sampled_no_more_often_than_others() -> None:
    random = np.random.default_rng(0)
    starts, is_first, now = list[float](), list[bool](), 0.0
    for _ in range(5000):
        for run in range(int(random.integers(1, 41))):
            starts.append(now)
            is_first.append(run == 0)
            now += 220e-6
        now += float(random.exponential(0.05))
    found = taken(starts)
    assert len(found) > 2000
    assert abs(np.mean([is_first[run] for run in found]) - np.mean(is_first)) < 0.01


def test_every_run_is_stood_for_once() -> None:
    sampling, stood = Sampling(), 0
    for run, now in enumerate(steady(1000, 220e-6)):
        if stands_for := sampling.stands_for(run, EVERY):
            sampling.taken(run, EVERY, 0.015, now)
            stood += stands_for
            assert stood == run + 1


def test_nothing_is_sampled_where_none_is_to_be() -> None:
    assert taken(steady(100, 1e-3), every=0) == []
    assert taken(steady(8, 1e-3), every=1, seconds=0.0) == [1, 2, 3, 4, 5, 6, 7]
