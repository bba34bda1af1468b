"""Times of sampled runs: they add up, and never count backwards."""

import numpy as np

from engine.targets.cuda.sampled_times import SampledTimes

EVERY = 16


def test_the_mean_of_the_samples_stands_for_every_run() -> None:
    times = SampledTimes(2)
    assert times.total(1).tolist() == [0.0, 0.0]
    times.add(np.array([10.0, 1.0]))
    assert times.total(2).tolist() == [20.0, 2.0]
    times.add(np.array([20.0, 3.0]))
    assert times.total(4).tolist() == [60.0, 8.0]


def test_a_quick_sample_makes_no_total_less_nor_keeps_it_far_above_the_mean() -> None:
    random, times = np.random.default_rng(0), SampledTimes(1)
    sampled, last, most, stood = [], 0.0, 0.0, 0
    for run in range(1, 2000):
        if run % EVERY == 2:
            sampled.append(float(random.exponential(1e4)))
            times.add(np.array(sampled[-1:]))
        total, mean = float(times.total(run)[0]), float(np.mean(sampled)) if sampled else 0.0
        assert total >= last
        most = max(most, mean)
        assert run * mean <= total * (1 + 1e-12) and total - run * mean <= (EVERY + 2) * most
        stood += total > run * mean * (1 + 1e-12)
        last = total
    assert len(sampled) == 125 and stood > 100  # so that the case is there
