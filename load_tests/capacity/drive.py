"""Locust's users on a server, as a library: so many users for so long, and what they got.

One `Driver` per scenario. Users send the next request when they have the last answer; an answer counts from when it
came, so that a request that a stage did not begin is in the stage that it ended in.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import gevent
from locust.env import Environment

from load_tests.capacity.saturation import Stage
from load_tests.capacity.scrape import Samples, fetch, split

_MOST_SPAWNED = 100
"""Users started in a second: more make locust complain."""

REFUSALS = ("status 429", "status 503")
"""What a server says that has enough: an answer as it should be, but no throughput."""


class Driver:
    """Users of these kinds on one server; `close` ends them."""

    def __init__(self, kinds: Sequence[type], target: str, headers: Mapping[str, str]) -> None:
        self._target, self._headers = target, headers
        self._environment = Environment(user_classes=list(kinds), host=target)
        self._runner = self._environment.create_local_runner()
        self._environment.events.request.add_listener(self._note)  # type: ignore[no-untyped-call]
        self._answers: list[tuple[float, float]] = []
        self._refused = 0
        self._failures: Counter[str] = Counter()

    def _note(self, response_time: float, exception: BaseException | None, **_: Any) -> None:
        if exception is None:
            self._answers.append((time.monotonic(), response_time / 1e3))
        elif str(exception).startswith(REFUSALS):
            self._refused += 1
        else:
            self._failures[str(exception)[:200]] += 1

    def stage(self, users: int, seconds: float, settle: float) -> Stage:
        """Have so many users, wait until they have settled, and look at what they get. Raises OSError where the server
        does not say what it does."""
        while self._runner.user_count > users:  # who is too many goes at once; locust would let them go one by one
            self._runner.start(max(users, self._runner.user_count - _MOST_SPAWNED), _MOST_SPAWNED)
            going = self._runner.spawning_greenlet
            assert going is not None
            going.join()
        self._runner.start(users, spawn_rate=min(users, _MOST_SPAWNED))
        gevent.sleep(settle)
        before, asked = self._scrape()
        self._answers, self._refused, self._failures = [], 0, Counter()
        started, cpu = time.monotonic(), _own_cpu()
        gevent.sleep(seconds)
        answers, refused, failures = self._answers, self._refused, self._failures
        lasted, cpu = time.monotonic() - started, _own_cpu() - cpu
        after, asked_again = self._scrape()
        between = split(before, after, asked_again - asked)
        timeline = [(at - started, latency) for at, latency in answers]
        latencies = sorted(latency for _, latency in answers)
        return Stage(users, lasted, latencies, refused, failures, cpu, between, timeline)

    def _scrape(self) -> tuple[Samples, float]:
        """What the server counts, and when it counted that: in the middle of the request, as far as can be told."""
        began = time.monotonic()
        samples = fetch(self._target, self._headers)
        return samples, (began + time.monotonic()) / 2

    def close(self) -> None:
        """End the users; answers that are under way are not waited for."""
        self._runner.quit()


def _own_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
