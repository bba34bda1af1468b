"""How contenders that take turns compare."""

from __future__ import annotations

import pytest

from load_tests.http_client import Results
from load_tests.turns import in_turn, ratio_of_turns


def turn(*latencies: float) -> Results:
    results = Results(seconds=1.0)
    for latency in latencies:
        results.count(200, latency, None)
    return results


def test_a_ratio_is_the_median_of_turns_beside_each_other() -> None:
    """A turn in which something held up one side counts as one of three."""
    ours, others = [turn(1, 2, 30), turn(4, 4, 4), turn(3, 3, 3)], [turn(1, 1, 3), turn(4, 4, 2), turn(2, 2, 2)]
    assert ratio_of_turns(ours, others, lambda results: results.percentile(99)) == 1.5
    assert ratio_of_turns(ours, others, lambda results: results.percentile(50)) == 1.5
    assert ratio_of_turns(ours, others, lambda results: results.rate) == 1
    with pytest.raises(ValueError, match="zip"):
        ratio_of_turns(ours, others[:2], lambda results: results.rate)


def test_every_other_time_in_the_opposite_order() -> None:
    assert list(in_turn({"a": 1, "b": 2, "c": 3}, 3)) == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]
