"""The engine worker and its scheduler through messages alone, as a process of its own would see them."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from service.batching.policy import find_axes
from service.batching.scheduler import Scheduler, Work
from service.workers.engine_worker import EngineWorker
from service.workers.messages import (
    BatchDone,
    BatchingMode,
    BatchingOptions,
    Cancel,
    FailureCode,
    Infer,
    InferFailed,
    InferResult,
    LoadFailed,
    LoadModel,
    LocalTensor,
    ModelKey,
    ModelReady,
    Report,
    Stats,
    StatsReport,
    Stop,
    Stopped,
    TensorInfo,
    Unload,
    Unloaded,
)
from tests.service.conftest import add_model, wait_for
from tests.service.fakes import EngineError, FakeEngine

T = TypeVar("T", bound=Report)


class Harness:
    """A worker, its engine and its reports."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.engine = FakeEngine()
        self.reports: queue.Queue[Report] = queue.Queue()
        self.worker = EngineWorker(lambda: self.engine, lambda reports: [self.reports.put(r) for r in reports])
        self.worker.start()
        self.stopped = False

    def stop(self) -> None:
        """Tell the worker to end, once."""
        if not self.stopped:
            self.worker.handle(Stop())
        self.stopped = True

    def load(
        self, kind: str, options: BatchingOptions | None = None, name: str = "", packed: str = "auto", **arguments: Any
    ) -> ModelReady:
        key = ModelKey(name or kind, 1)
        path = add_model(self.root, key.name, kind, **arguments) / "1" / "model.onnx"
        command = LoadModel(key, str(path), "cpu", "auto", None, options or BatchingOptions(), None, packed)
        self.worker.handle(command)
        return self.next(ModelReady)

    def infer(self, number: int, value: float, name: str = "identity", rows: int = 1, **changes: Any) -> None:
        array = np.full((rows, 4), value, np.float32)
        values = {"deadline": time.monotonic() + 20, "priority": 50, "lengths": (), **changes}
        inputs = (("input", LocalTensor(array)),)
        now = time.monotonic()
        self.worker.handle(Infer(number, ModelKey(name, 1), inputs, ("output",), arrival=now, **values))

    def next(self, kind: type[T]) -> T:
        """The next report of a kind; others are passed over."""
        while True:
            report = self.reports.get(timeout=30)
            if isinstance(report, kind):
                return report

    def answers(self, count: int) -> dict[int, InferResult | InferFailed]:
        found: dict[int, InferResult | InferFailed] = {}
        while len(found) < count:
            report = self.reports.get(timeout=30)
            if isinstance(report, InferResult | InferFailed):
                assert report.id not in found
                found[report.id] = report
        return found

    def hold(self) -> None:
        """Start a run that stays in the engine until `engine.gate.set()`; what follows waits."""
        self.engine.gate.clear()
        self.infer(0, 0.0)
        assert self.engine.running.acquire(timeout=30)


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    harness = Harness(tmp_path)
    yield harness
    harness.engine.gate.set()
    if not harness.stopped:
        harness.stop()
        harness.next(Stopped)
    assert all(model.closed for model in harness.engine.models)


def value_of(answer: InferResult | InferFailed) -> float:
    assert isinstance(answer, InferResult), answer
    return float(dict(answer.outputs)["output"].view()[0, 0])


def test_what_waits_while_the_engine_is_busy_goes_as_one_batch(harness: Harness) -> None:
    harness.load("identity")
    harness.hold()
    for number in range(1, 6):
        harness.infer(number, float(number))
    harness.engine.gate.set()
    answers = harness.answers(6)
    assert {number: value_of(answer) for number, answer in answers.items()} == {n: float(n) for n in range(6)}
    assert [shape for _, shape in harness.engine.calls] == [(1, 4), (5, 4)]


def test_an_idle_engine_starts_a_request_at_once(harness: Harness) -> None:
    harness.load("identity")
    waited = []
    for number in range(20):
        harness.infer(number, 1.0)
        waited.append(harness.next(InferResult).queue_seconds)
    assert min(waited) < 0.05, "waits that only a busy machine makes are not the rule"
    assert [shape for _, shape in harness.engine.calls] == [(1, 4)] * 20


def test_max_delay_lets_a_batch_fill(harness: Harness) -> None:
    harness.load("identity", BatchingOptions(max_batch=3, max_delay_s=60.0))
    for number in range(3):
        harness.infer(number, 1.0)
    harness.answers(3)  # long before the delay is over
    assert [shape for _, shape in harness.engine.calls] == [(3, 4)]


def test_max_delay_ends(harness: Harness) -> None:
    harness.load("identity", BatchingOptions(max_batch=3, max_delay_s=0.05))
    harness.infer(1, 1.0)
    assert harness.next(InferResult).queue_seconds >= 0.05


def test_a_cancelled_request_never_reaches_the_engine(harness: Harness) -> None:
    harness.load("identity")
    harness.hold()
    harness.infer(1, 1.0)
    harness.infer(2, 2.0)
    harness.worker.handle(Cancel(1))
    harness.engine.gate.set()
    assert set(harness.answers(2)) == {0, 2}
    assert [shape for _, shape in harness.engine.calls] == [(1, 4), (1, 4)]
    harness.worker.handle(Stats(9))
    (stats,) = harness.next(StatsReport).models
    assert (stats.dropped, stats.queued) == (1, 0)


def test_cancelling_what_runs_loses_only_that_answer(harness: Harness) -> None:
    harness.load("identity")
    harness.hold()
    harness.worker.handle(Cancel(0))
    harness.engine.gate.set()
    harness.infer(1, 1.0)
    assert set(harness.answers(1)) == {1}


def test_a_request_past_its_deadline_is_dropped_before_compute(harness: Harness) -> None:
    harness.load("identity")
    harness.hold()
    harness.infer(1, 1.0, deadline=time.monotonic() + 0.02)
    time.sleep(0.05)
    harness.engine.gate.set()
    answer = harness.answers(2)[1]
    assert isinstance(answer, InferFailed)
    assert answer.code is FailureCode.DEADLINE
    assert len(harness.engine.calls) == 1


def test_a_full_queue_refuses_with_a_time_to_come_back(harness: Harness) -> None:
    harness.load("identity", BatchingOptions(max_batch=2, queue_batches=2), sleep=0.05)
    harness.infer(100, 1.0)
    harness.next(InferResult)
    harness.engine.running.acquire()
    harness.hold()
    for number in range(1, 7):
        harness.infer(number, 1.0)
    harness.engine.gate.set()
    answers = harness.answers(7)
    refused = {number: a for number, a in answers.items() if isinstance(a, InferFailed)}
    assert set(refused) == {5, 6}
    assert {a.code for a in refused.values()} == {FailureCode.OVERLOADED}
    assert all(a.retry_after is not None and a.retry_after >= 1 for a in refused.values())


def test_a_request_that_could_never_be_queued_is_too_large(harness: Harness) -> None:
    harness.load("identity", BatchingOptions(max_batch=2, queue_batches=2))
    harness.infer(1, 1.0, rows=5)
    answer = harness.next(InferFailed)
    assert answer.code is FailureCode.TOO_LARGE
    assert "5 rows" in answer.reason
    harness.infer(2, 1.0, rows=4)
    assert dict(harness.next(InferResult).outputs)["output"].view().shape == (4, 4)


def test_a_request_that_fails_does_not_fail_its_neighbours(harness: Harness) -> None:
    harness.load("identity", poison=666)
    harness.hold()
    for number, value in enumerate((1.0, 666.0, 3.0), start=1):
        harness.infer(number, value)
    harness.engine.gate.set()
    answers = harness.answers(4)
    assert value_of(answers[1]) == 1.0
    assert value_of(answers[3]) == 3.0
    failed = answers[2]
    assert isinstance(failed, InferFailed)
    assert failed.code is FailureCode.INVALID_INPUT
    assert "666" in failed.reason


def test_answers_are_told_when_the_next_batch_starts_or_fails_before(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.load("identity", BatchingOptions(max_batch=1))
    model = harness.engine.models[0]
    run, first_may_compute = model.run, threading.Event()

    def watched(feeds: Any, on_start: Callable[[], None], side_by_side: bool) -> Any:
        value = feeds["input"][0, 0]
        if value == 2:
            raise harness.engine.ShapeError("before it has started")

        def start() -> None:
            on_start()
            assert value != 1 or first_may_compute.wait(30)

        return run(feeds, start, side_by_side)

    monkeypatch.setattr(model, "run", watched)
    harness.hold()
    for number in (1, 2, 3):
        harness.infer(number, float(number))
    harness.engine.gate.set()
    assert harness.next(InferResult).id == 0
    first_may_compute.set()
    assert list(harness.answers(3)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "code"),
    [("OutOfMemory", FailureCode.OUT_OF_MEMORY), ("EngineError", FailureCode.ENGINE)],
)
def test_engine_errors_have_codes(harness: Harness, error: str, code: FailureCode) -> None:
    harness.engine.poison_error = getattr(harness.engine, error)
    assert issubclass(harness.engine.poison_error, EngineError)
    harness.load("identity", poison=666)
    harness.infer(1, 666.0)
    assert harness.next(InferFailed).code is code
    harness.infer(2, 2.0)
    assert value_of(harness.next(InferResult)) == 2.0


def test_the_worker_survives_a_bug_in_the_engine(harness: Harness) -> None:
    harness.load("identity", crash=True)
    harness.infer(1, -1.0)
    assert harness.next(InferFailed).code is FailureCode.ENGINE
    harness.infer(2, 2.0)
    assert value_of(harness.next(InferResult)) == 2.0


def test_two_busy_models_share_the_engine_by_time(harness: Harness) -> None:
    """A model with slow runs and a long queue does not starve one with fast runs: seconds are shared, not turns."""
    options = BatchingOptions(max_batch=1, queue_batches=500)
    harness.load("identity", options, name="slow", sleep=0.02)
    harness.load("identity", options, name="fast", sleep=0.001)
    harness.engine.gate.clear()
    for number in range(20):
        harness.infer(number, 0.0, name="slow")
    for number in range(100, 140):
        harness.infer(number, 0.0, name="fast")
    harness.engine.gate.set()
    finished = []
    while len(finished) < 60:
        report = harness.reports.get(timeout=30)
        if isinstance(report, InferResult):
            finished.append(report.id)
    slow_before_fast_ended = [number for number in finished[: finished.index(139)] if number < 100]
    assert 1 <= len(slow_before_fast_ended) <= 8


@pytest.mark.parametrize("model", ["mixing", "quantised", "quantised_pixels", "third"])
def test_a_model_whose_rows_see_each_other_is_found_out_and_never_batched(harness: Harness, model: str) -> None:
    ready = harness.load(model)
    assert ready.batching is BatchingMode.NONE
    assert "rows together" in ready.batching_reason


@pytest.mark.parametrize("model", ["int32", "places"])
def test_integers_are_batched_whether_large_ones_are_errors_or_not(harness: Harness, model: str) -> None:
    assert harness.load(model).batching is BatchingMode.ROWS


def test_a_model_whose_padding_shows_is_batched_without_padding(harness: Harness) -> None:
    ready = harness.load("unmasked")
    assert ready.batching is BatchingMode.ROWS
    assert "padding changes" in ready.batching_reason
    assert harness.load("encoder").batching is BatchingMode.PADDED


def test_a_model_that_computes_for_seconds_on_a_row_is_run_once_and_not_batched(harness: Harness) -> None:
    assert harness.load("identity", name="light", flops=0.9e12).batching is BatchingMode.ROWS
    assert [shape for _, shape in harness.engine.probes] == [(1, 4), (5, 4), *[(1, 4)] * 3]
    harness.engine.probes.clear()
    ready = harness.load("identity", name="heavy", flops=2.5e12)
    assert ready.batching is BatchingMode.NONE
    assert "computes for 2.5 s" in ready.batching_reason
    assert [shape for _, shape in harness.engine.probes] == [(1, 4)]
    harness.infer(1, 7.0, name="heavy", rows=3)
    assert value_of(harness.next(InferResult)) == 7.0


def test_what_is_not_loaded_yet_at_the_end_is_not_waited_for(harness: Harness) -> None:
    harness.load("identity")
    harness.engine.loading.acquire()
    harness.engine.load_gate.clear()
    for name in ("late", "later"):
        path = add_model(harness.root, name, "identity") / "1" / "model.onnx"
        harness.worker.handle(LoadModel(ModelKey(name, 1), str(path), "cpu", "auto", None, BatchingOptions(), None))
    assert harness.engine.loading.acquire(timeout=30)
    harness.stop()
    harness.next(Stopped)
    harness.engine.load_gate.set()
    wait_for(lambda: len(harness.engine.models) == 2 and harness.engine.models[1].closed)
    assert harness.reports.empty()


def test_a_model_with_an_input_of_terabytes_is_refused(harness: Harness) -> None:
    path = add_model(harness.root, "m", "endless") / "1" / "model.onnx"
    harness.worker.handle(LoadModel(ModelKey("m", 1), str(path), "cpu", "auto", None, BatchingOptions(), None))
    reason = harness.next(LoadFailed).reason
    assert "there is not enough memory for it: input 'input' of shape [1048576, 1048576] has 4398046511104" in reason
    assert harness.engine.models[0].closed


def test_a_model_with_strings_is_warmed_up_and_batched(harness: Harness) -> None:
    ready = harness.load("strings")
    assert ready.batching is BatchingMode.ROWS
    assert [shape for _, shape in harness.engine.probes] == [(1, 2), (5, 2), *[(1, 2)] * 3]


def test_strings_that_a_model_cannot_read_are_no_reason_not_to_load_it(harness: Harness) -> None:
    ready = harness.load("strings", probe_error="'1' is no colour")
    assert ready.batching is BatchingMode.NONE
    assert "guessed strings for input 'input' failed" in ready.batching_reason
    assert "'1' is no colour" in ready.batching_reason


def test_a_model_with_tensors_of_a_type_that_the_protocol_does_not_have_is_refused(harness: Harness) -> None:
    path = add_model(harness.root, "m", "fp8") / "1" / "model.onnx"
    harness.worker.handle(LoadModel(ModelKey("m", 1), str(path), "cpu", "auto", None, BatchingOptions(), None))
    reason = harness.next(LoadFailed).reason
    assert reason == "tensor 'input' is of float8_e4m3fn, which the protocol does not have: cast it in the model"


def test_a_bug_of_the_engine_while_loading_says_so(harness: Harness) -> None:
    path = add_model(harness.root, "m", "identity", bug=True) / "1" / "model.onnx"
    harness.worker.handle(LoadModel(ModelKey("m", 1), str(path), "cpu", "auto", None, BatchingOptions(), None))
    reason = harness.next(LoadFailed).reason
    assert reason == "the engine failed in a way it should not, please report it: LookupError: oops"


def test_a_file_that_is_no_model_is_reported_with_its_reason(harness: Harness, tmp_path: Path) -> None:
    file = tmp_path / "x.onnx"
    file.write_bytes(b"\x00junk")
    harness.worker.handle(LoadModel(ModelKey("x", 1), str(file), "cpu", "auto", None, BatchingOptions(), None))
    assert "no ONNX model" in harness.next(LoadFailed).reason


def test_unloading_finishes_what_waits_and_closes_the_model(harness: Harness) -> None:
    harness.load("identity")
    harness.hold()
    harness.infer(1, 1.0)
    harness.worker.handle(Unload(ModelKey("identity", 1)))
    wait_for(lambda: _refuses(harness))
    assert not harness.engine.models[0].closed
    harness.engine.gate.set()
    assert value_of(harness.answers(2)[1]) == 1.0
    harness.next(Unloaded)
    assert harness.engine.models[0].closed


def _refuses(harness: Harness) -> bool:
    """Whether a new request is refused as not loaded; if it was accepted, take it back."""
    harness.infer(777, 0.0)
    try:
        report = harness.reports.get(timeout=0.05)
    except queue.Empty:
        harness.worker.handle(Cancel(777))
        return False
    assert isinstance(report, InferFailed)
    return report.code is FailureCode.NOT_LOADED


def test_stopping_answers_everything_accepted_first(harness: Harness) -> None:
    harness.load("identity")
    harness.hold()
    for number in range(1, 4):
        harness.infer(number, 1.0)
    harness.stop()
    harness.infer(9, 1.0)
    refused = harness.next(InferFailed)
    assert (refused.id, refused.code) == (9, FailureCode.NOT_LOADED)
    harness.engine.gate.set()
    assert set(harness.answers(4)) == {0, 1, 2, 3}
    harness.next(Stopped)


def test_a_model_that_overlaps_runs_has_two_batches_under_way(harness: Harness) -> None:
    harness.load("identity", concurrent_runs=2)
    harness.hold()
    harness.infer(1, 1.0)
    assert harness.engine.running.acquire(timeout=30), "the second batch waits for the first"
    for number in range(2, 6):
        harness.infer(number, float(number))
    assert not harness.engine.running.acquire(timeout=0.1), "a third batch is formed before a run has ended"
    harness.engine.gate.set()
    answers = harness.answers(6)
    assert {number: value_of(answer) for number, answer in answers.items()} == {n: float(n) for n in range(6)}
    assert sum(shape[0] for _, shape in harness.engine.calls) == 6
    assert [shape for _, shape in harness.engine.calls[:2]] == [(1, 4), (1, 4)]


def test_a_request_whose_last_rows_are_done_first_waits_for_the_others(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.load("identity", BatchingOptions(max_batch=2), concurrent_runs=2)
    model = harness.engine.models[0]
    run, first_may_end, calls = model.run, threading.Event(), itertools.count()

    def slow_first(*arguments: Any) -> Any:
        if next(calls) == 0:
            assert first_may_end.wait(60)
        return run(*arguments)

    monkeypatch.setattr(model, "run", slow_first)
    rows = np.arange(16, dtype=np.float32).reshape(4, 4)
    now = time.monotonic()
    inputs = (("input", LocalTensor(rows)),)
    harness.worker.handle(Infer(1, ModelKey("identity", 1), inputs, ("output",), (), now, now + 20, 50))
    assert harness.next(BatchDone).rows == 2
    with pytest.raises(queue.Empty):
        harness.reports.get(timeout=0.1)
    first_may_end.set()
    answer = harness.next(InferResult)
    assert np.array_equal(dict(answer.outputs)["output"].view(), rows)
    assert answer.compute_seconds <= time.monotonic() - now


def test_a_model_that_takes_turns_runs_beside_no_other_and_is_not_overtaken_for_ever(harness: Harness) -> None:
    one = BatchingOptions(max_batch=1, queue_batches=500)
    harness.load("identity", one, name="overlapping", concurrent_runs=2, sleep=0.002)
    harness.load("identity", one, name="alone", sleep=0.002)
    harness.engine.gate.clear()
    for number in range(2):
        harness.infer(number, 0.0, name="overlapping")
        assert harness.engine.running.acquire(timeout=30)
    for number in range(2, 30):
        harness.infer(number, 0.0, name="overlapping")
    harness.infer(100, 0.0, name="alone")
    assert not harness.engine.running.acquire(timeout=0.1)
    harness.engine.gate.set()
    order = []
    while len(order) < 31:
        report = harness.reports.get(timeout=30)
        if isinstance(report, InferResult):
            order.append(report.id)
    assert order.index(100) <= 4


def test_threads_are_divided_only_while_there_is_work_for_two(harness: Harness) -> None:
    harness.load("identity", BatchingOptions(max_batch=2), concurrent_runs=2, divides_threads=True)
    harness.hold()
    for number in range(1, 5):
        harness.infer(number, float(number))
    assert not harness.engine.running.acquire(timeout=0.1), "a batch is formed beside one that has all threads"
    harness.engine.gate.set()
    answers = harness.answers(5)
    assert {number: value_of(answer) for number, answer in answers.items()} == {n: float(n) for n in range(5)}
    # The first had the engine for itself; of the two that waited, the first left as much as it took.
    assert harness.engine.side_by_side[:2] == [False, True]


def test_a_lost_device_fails_both_batches(harness: Harness) -> None:
    harness.engine.poison_error = harness.engine.DeviceLost
    harness.load("identity", poison=666, concurrent_runs=2)
    harness.engine.gate.clear()
    for number in range(2):
        harness.infer(number, 666.0)
        assert harness.engine.running.acquire(timeout=30)
    harness.engine.gate.set()
    answers = harness.answers(2)
    assert all(isinstance(a, InferFailed) and a.code is FailureCode.WORKER_LOST for a in answers.values())
    harness.infer(3, 1.0)
    assert value_of(harness.next(InferResult)) == 1.0


def test_unloading_and_stopping_wait_for_both_batches(harness: Harness) -> None:
    harness.load("identity", concurrent_runs=2)
    harness.engine.gate.clear()
    for number in range(2):
        harness.infer(number, float(number))
        assert harness.engine.running.acquire(timeout=30)
    assert harness.worker.busy_seconds > 0
    harness.worker.handle(Unload(ModelKey("identity", 1)))
    harness.stop()
    with pytest.raises(queue.Empty):
        harness.reports.get(timeout=0.1)
    harness.engine.gate.set()
    assert {number: value_of(answer) for number, answer in harness.answers(2).items()} == {0: 0.0, 1: 1.0}
    harness.next(Unloaded)
    harness.next(Stopped)
    assert harness.worker.busy_seconds == 0


def test_batches_that_run_side_by_side_share_the_engine_seconds() -> None:
    now = [0.0]
    scheduler = Scheduler(lambda: now[0])
    infos = (
        (TensorInfo("input", np.dtype(np.float32), ("batch", 4)),),
        (TensorInfo("output", np.dtype(np.float32), ("batch", 4)),),
    )
    key = ModelKey("identity", 1)
    scheduler.add(key, BatchingOptions(max_batch=1), find_axes(*infos), 2)
    for number in range(2):
        inputs = (("input", LocalTensor(np.zeros((1, 4), np.float32))),)
        scheduler.submit(Infer(number, key, inputs, ("output",), (), 0.0, 1e9, 50))

    def take() -> Work:
        work = scheduler.take(lambda _: None)
        assert work is not None
        return work

    first = take()
    now[0] = 2.0  # alone
    second = take()
    now[0] = 6.0  # both
    assert scheduler.done(first) == 4.0
    scheduler.reported(first)
    now[0] = 7.0  # the second alone
    assert scheduler.done(second) == 3.0
    scheduler.reported(second)
    now[0] = 50.0  # idle
    scheduler.submit(Infer(2, key, inputs, ("output",), (), 0.0, 1e9, 50))
    third = take()
    now[0] = 51.0
    assert scheduler.done(third) == 1.0
    scheduler.reported(third)


def test_padding_is_counted(harness: Harness) -> None:
    harness.load("encoder", BatchingOptions(buckets=(16,)))
    harness.load("identity")
    harness.hold()
    for number, length in ((1, 9), (2, 16)):
        ids, mask = np.ones((1, length), np.int64), np.ones((1, length), np.int64)
        inputs = (("input_ids", LocalTensor(ids)), ("attention_mask", LocalTensor(mask)))
        now = time.monotonic()
        outputs = ("last_hidden_state",)
        harness.worker.handle(Infer(number, ModelKey("encoder", 1), inputs, outputs, (length,), now, now + 20, 50))
    harness.engine.gate.set()
    done = [harness.next(BatchDone), harness.next(BatchDone)]
    (batch,) = [d for d in done if d.key.name == "encoder"]
    assert (batch.rows, batch.tokens, batch.padding) == (2, 25, 7)


def test_packed_rows_share_a_run_and_what_is_computed_beside_them_is_padding(harness: Harness) -> None:
    ready = harness.load("encoder", BatchingOptions(max_tokens=64), token_step=32)
    assert ready.batching is BatchingMode.PACKED
    assert "what 'attention_mask' hides is not computed" in ready.batching_reason
    harness.load("identity")
    harness.hold()
    lengths = (3, 40, 9, 30)
    for number, length in enumerate(lengths, 1):
        ids, mask = np.full((1, length), number), np.ones((1, length), np.int64)
        inputs = (("input_ids", LocalTensor(ids)), ("attention_mask", LocalTensor(mask)))
        now = time.monotonic()
        outputs = ("last_hidden_state",)
        harness.worker.handle(Infer(number, ModelKey("encoder", 1), inputs, outputs, (length,), now, now + 20, 50))
    harness.engine.gate.set()
    done = [harness.next(BatchDone) for _ in range(3)]
    batches = [(d.rows, d.tokens, d.padding) for d in done if d.key.name == "encoder"]
    assert batches == [(3, 52, 12), (1, 30, 2)]


@pytest.mark.parametrize("packed", ["on", "off"])
def test_rows_are_not_widened_past_a_models_positions(harness: Harness, packed: str) -> None:
    """They end at 10 tokens, and the rows' bucket at 16: a run that fails is run again, each request alone."""
    harness.load("short", packed=packed, token_step=8, limits={"sequence": 10})
    harness.load("identity")
    harness.hold()
    for number, length in enumerate((9, 10, 9), 1):
        inputs = tuple((name, LocalTensor(np.ones((1, length), np.int64))) for name in ("input_ids", "attention_mask"))
        now = time.monotonic()
        outputs = ("last_hidden_state",)
        harness.worker.handle(Infer(number, ModelKey("short", 1), inputs, outputs, (length,), now, now + 20, 50))
    harness.engine.gate.set()
    assert all(isinstance(answer, InferResult) for answer in harness.answers(4).values())
    assert [shape for kind, shape in harness.engine.calls if kind == "short"] == [(3, 10)]


def test_rows_are_padded_where_packing_is_switched_off(harness: Harness) -> None:
    assert harness.load("encoder", packed="off", token_step=8).batching is BatchingMode.PADDED


def test_a_packed_model_whose_padding_shows_is_batched_without_padding(harness: Harness) -> None:
    assert harness.load("unmasked", token_step=8).batching is BatchingMode.ROWS


def test_statistics_are_answered_while_the_engine_is_busy(harness: Harness) -> None:
    harness.load("identity")
    harness.hold()
    harness.worker.handle(Stats(5))
    report = harness.next(StatsReport)
    assert report.id == 5
    assert {kernel.kernel for kernel in report.models[0].kernels} == {"gemm_f32", "pointwise_f32"}


def light(root: Path, **arguments: Any) -> Harness:
    """A harness whose worker runs on the caller what takes less than 10 ms."""
    harness = Harness(root)
    harness.worker.handle(Stop())
    harness.next(Stopped)
    report = harness.reports.put
    harness.worker = EngineWorker(lambda: harness.engine, lambda reports: [report(r) for r in reports], light_s=0.01)
    harness.worker.start()
    harness.load("identity", BatchingOptions(max_batch=4), **arguments)
    return harness


def bring(harness: Harness, *numbers: int, rows: int = 1) -> list[str]:
    """Requests that come together, answered; the threads that ran them."""
    before = len(harness.engine.threads)
    for number in numbers:
        inputs = (("input", LocalTensor(np.full((rows, 4), number, np.float32))),)
        now = time.monotonic()
        harness.worker.accept(Infer(number, ModelKey("identity", 1), inputs, ("output",), (), now, now + 20, 50))
    name, threading.current_thread().name = threading.current_thread().name, "http"
    try:
        harness.worker.work_off()
    finally:
        threading.current_thread().name = name
    answers = harness.answers(len(numbers))
    assert {number: value_of(answer) for number, answer in answers.items()} == {n: float(n) for n in numbers}
    return harness.engine.threads[before:]


def test_batches_that_have_been_quick_run_on_the_thread_that_brought_them(tmp_path: Path) -> None:
    harness = light(tmp_path)
    assert [bring(harness, number) for number in range(4)] == [["engine"]] * 4
    assert [bring(harness, number) for number in range(4, 9)] == [["http"]] * 5
    assert bring(harness, 10, 11) == ["engine"], "this shape is new"
    assert bring(harness, 12, rows=3) == ["engine"], "and so is this"
    for number in range(20, 28):
        bring(harness, number, number + 100, number + 200, number + 300, number + 400)
    assert bring(harness, 1, 2, 3, 4, 5, 6, 7, 8, 9) == ["http"] * 3, "two full batches and one of one row"
    harness.stop()
    harness.next(Stopped)


def test_batches_that_take_long_stay_on_the_engine_thread(tmp_path: Path) -> None:
    harness = light(tmp_path, sleep=0.03)
    assert [bring(harness, number) for number in range(8)] == [["engine"]] * 8
    harness.stop()
    harness.next(Stopped)


def test_a_batch_that_is_no_longer_quick_goes_back_to_the_engine_thread(tmp_path: Path) -> None:
    harness = light(tmp_path)
    for number in range(6):
        bring(harness, number)
    (model,) = harness.engine.models
    model._arguments["sleep"] = 0.05
    for number in range(200):
        if bring(harness, number) == ["engine"]:
            break
    else:
        raise AssertionError("it is slow, and runs on the thread that brings it all the same")
    harness.stop()
    harness.next(Stopped)
