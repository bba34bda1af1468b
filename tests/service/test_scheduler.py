"""Which batch runs next and with what, without threads. Engine threads and their waiting are in test_worker.py."""

from __future__ import annotations

import numpy as np

from service.batching.policy import BatchAxes
from service.batching.queue import Entry
from service.batching.scheduler import Scheduler, Work
from service.workers.messages import BatchingMode, BatchingOptions, Infer, LocalTensor, ModelKey

ONE, OTHER = ModelKey("one", 1), ModelKey("other", 1)


class Requests:
    """A scheduler with two models that divide the threads, batches of at most four rows, and requests to them."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(lambda: 0.0)
        self._count = 0
        for key in (ONE, OTHER):
            axes = BatchAxes(BatchingMode.ROWS, None, {}, "")
            self.scheduler.add(key, BatchingOptions(max_batch=4), axes, 2, divides_threads=True)

    def come(self, rows: int, key: ModelKey = ONE) -> None:
        self._count += 1
        inputs = (("x", LocalTensor(np.zeros((rows, 2), np.float32))),)
        request = Infer(self._count, key, inputs, ("y",), (), arrival=0.0, deadline=9.0, priority=50)
        assert self.scheduler.submit(request) is None

    def take(self) -> Work | None:
        return self.scheduler.take(_never, wait=False)


def _never(entry: Entry) -> None:
    raise AssertionError(f"request {entry.request.id} has expired")


def started(work: Work | None) -> tuple[int, bool]:
    """Rows of a batch, and whether another may run beside it."""
    assert work is not None
    return work.batch.rows, work.side_by_side


def test_a_batch_without_others_has_all_threads_and_nothing_starts_beside_it() -> None:
    requests = Requests()
    requests.come(3)
    first = requests.take()
    assert started(first) == (3, False)
    requests.come(4)
    requests.come(4, OTHER)
    assert requests.take() is None
    assert first is not None
    requests.scheduler.done(first)
    assert started(requests.take()) == (4, True)
    assert started(requests.take()) == (4, True)


def test_threads_are_divided_where_as_much_again_waits_of_a_model_or_anything_of_another() -> None:
    for rows, key, divided in ((3, ONE, False), (4, ONE, True), (1, OTHER, True)):
        requests = Requests()
        requests.come(4)
        requests.come(rows, key)
        assert started(requests.take()) == (4, divided), (rows, key)
        assert (requests.take() is not None) == divided


def test_what_comes_while_a_batch_has_its_part_gets_the_other_part_at_once() -> None:
    requests = Requests()
    requests.come(4)
    requests.come(4)
    first, second = requests.take(), requests.take()
    assert (started(first), started(second)) == ((4, True), (4, True))
    requests.come(1)
    assert requests.take() is None, "there are two parts"
    assert first is not None
    requests.scheduler.done(first)
    assert started(requests.take()) == (1, True)


def test_what_may_not_start_beside_a_batch_takes_no_threads_from_it() -> None:
    requests = Requests()
    axes = BatchAxes(BatchingMode.ROWS, None, {}, "")
    alone, later = ModelKey("alone", 1), ModelKey("later", 1)
    requests.scheduler.add(alone, BatchingOptions(max_batch=4), axes)
    requests.scheduler.add(later, BatchingOptions(max_batch=4, max_delay_s=5.0), axes, 2, divides_threads=True)
    requests.come(4)
    requests.come(1, alone)
    requests.come(1, later)
    assert started(requests.take()) == (4, False)


def test_all_threads_again_once_nothing_runs() -> None:
    requests = Requests()
    requests.come(4)
    requests.come(4)
    for work in [requests.take(), requests.take()]:
        assert work is not None
        requests.scheduler.done(work)
    requests.come(2)
    assert started(requests.take()) == (2, False)
