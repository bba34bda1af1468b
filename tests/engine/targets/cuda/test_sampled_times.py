"""Times of sampled runs: they add up, and never count backwards."""

import numpy as np

from engine.targets.cuda.sampled_times import SampledTimes


def test_each_sample_stands_for_the_runs_until_the_next() -> None:
    times = SampledTimes(2)
    assert times.total(1).tolist() == [0.0, 0.0]
    times.add(2, np.array([10.0, 1.0]))
    assert times.total(2).tolist() == [20.0, 2.0]
    assert times.total(5).tolist() == [50.0, 5.0]
    times.add(6, np.array([4.0, 2.0]))
    assert times.total(6).tolist() == [60.0, 6.0]
    assert times.total(8).tolist() == [68.0, 10.0]


def test_no_sample_makes_the_total_less() -> None:
    """A mean over all samples, scaled to all runs, would fall at the quick sample after slow ones."""
    random, times, last = np.random.default_rng(0), SampledTimes(1), 0.0
    for run in range(1, 2000):
        if run % 16 == 2:
            times.add(run, random.exponential(1e4, 1))
        total = float(times.total(run)[0])
        assert total >= last
        last = total
    assert abs(last / 1999 - 1e4) < 3e3  # three deviations of the mean of 125 samples
