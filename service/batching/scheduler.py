"""Which model runs next: the queues of all models of one engine, behind one lock.

The receiving thread (HTTP side in-process) calls `submit`, `wake` after one or many of them, and `cancel`; the engine
threads call `take`, `done` and `reported`, and sleep in `take` on a condition, never on a timer that polls.
Whoever may run light batches itself takes them with `take_at_once`. Models share the engine by the seconds they used:
the one with the least goes next, and one that was idle starts level with the others.

A batch is formed when it may start: where nothing runs, or where what runs and the model itself overlap so many runs.
While k batches run, a second of the clock is 1/k of an engine second for each. Models that divide the threads run side
by side while there is work for two: a batch that starts when nothing runs, and when not as much again waits, gets all
threads, and nothing starts beside it.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from service.batching.light import LightRuns
from service.batching.policy import BatchAxes
from service.batching.queue import Batch, Entry, ModelQueue, make_entry
from service.record import record
from service.workers.messages import BatchingOptions, FailureCode, Infer, InferFailed, ModelKey

_RATE_WEIGHT = 0.2  # of the newest batch in the running mean of a model's rate


@dataclass(slots=True)
class _Lane:
    """One model in the scheduler. `used` are engine seconds; `rate` is cost per engine second, 0 until measured;
    `running` batches of at most `concurrent_runs`; `untold` have run, and their answers are not reported."""

    key: ModelKey
    queue: ModelQueue
    concurrent_runs: int
    divides_threads: bool
    light: LightRuns
    running: int = 0
    untold: int = 0
    used: float = 0.0
    rate: float = 0.0
    dropped: int = 0
    removed: bool = False


@record
class Work:
    """A batch and the model it belongs to; `began` is of the engine seconds, `side_by_side` where another may run
    meanwhile that divides the threads with it."""

    lane: _Lane
    batch: Batch
    began: float
    side_by_side: bool

    @property
    def key(self) -> ModelKey:
        """The model."""
        return self.lane.key

    @property
    def light(self) -> LightRuns:
        """What its batches took."""
        return self.lane.light

    @property
    def axes(self) -> BatchAxes:
        """Its axes."""
        return self.lane.queue.axes


class Scheduler:
    """Queues of all models of one engine instance."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        self._lanes: dict[ModelKey, _Lane] = {}
        self._handed: deque[Work] = deque()
        self._stopping = False
        self._running = 0  # batches of all lanes
        self._has_all_threads = False  # one that runs, which others would divide with
        self._engine_seconds = 0.0
        self._counted_until = clock()

    def add(
        self,
        key: ModelKey,
        options: BatchingOptions,
        axes: BatchAxes,
        concurrent_runs: int = 1,
        light_s: float = 0.0,
        divides_threads: bool = False,
    ) -> None:
        """Accept requests for a model from now on, and run so many batches of it at once; a light one takes less than
        `light_s`."""
        with self._lock:
            queue, light = ModelQueue(options, axes), LightRuns(light_s)
            self._lanes[key] = _Lane(key, queue, concurrent_runs, divides_threads, light, used=self._level())

    def remove(self, key: ModelKey) -> None:
        """Accept no more requests for a model and wait until what it accepted is done."""
        with self._lock:
            lane = self._lanes.get(key)
            if lane is None:
                return
            lane.removed = True
            self._condition.wait_for(lambda: not (lane.queue.entries or lane.running or lane.untold))
            del self._lanes[key]

    def submit(self, request: Infer) -> InferFailed | None:
        """Queue a request; the refusal if there is no such model or its queue is full. `wake` has to follow."""
        with self._lock:
            lane = self._lanes.get(request.key)
            if lane is None or lane.removed or self._stopping:
                return InferFailed(request.id, FailureCode.NOT_LOADED, f"model {request.key} is not loaded")
            queue = lane.queue
            entry = make_entry(request, queue.axes)
            if entry.cost > queue.capacity:
                unit = "rows" if not entry.lengths else "tokens"
                text = f"the request has {entry.cost} {unit}; the most that one request may have is {queue.capacity}"
                return InferFailed(request.id, FailureCode.TOO_LARGE, text)
            if queue.cost + entry.cost > queue.capacity:
                text = f"the queue of model {request.key.name} is full"
                return InferFailed(request.id, FailureCode.OVERLOADED, text, self._retry_after())
            if not queue.entries:
                lane.used = max(lane.used, self._level())
            queue.push(entry)
        return None

    def wake(self) -> None:
        """Have the engine threads look for work, if there is some."""
        with self._lock:
            if self._stopping or self._handed or self._has_work():
                self._condition.notify_all()

    def _has_work(self) -> bool:
        """Whether something waits that is in no batch."""
        for lane in self._lanes.values():  # noqa: SIM110, a generator takes several times as long
            if lane.queue.cost:
                return True
        return False

    def cancel(self, request_id: int) -> None:
        """Drop a request; rows that are computing now are thrown away when they are done."""
        with self._lock:
            for lane in self._lanes.values():
                entry = lane.queue.remove(request_id)
                if entry is not None:
                    lane.dropped += entry.started is None
                    self._condition.notify_all()
                    return

    def finish(self, work: Work, entries: Iterable[Entry]) -> list[Entry]:
        """Take answered or failed entries of a batch out of the books; those that were not cancelled meanwhile."""
        with self._lock:
            queue = work.lane.queue
            return [entry for entry in entries if queue.remove(entry.request.id) is not None]

    def stop(self) -> None:
        """Accept nothing more; `take` returns None once everything accepted has been taken."""
        with self._lock:
            self._stopping = True
            self._condition.notify_all()

    def take(self, on_expired: Callable[[Entry], None], wait: bool = True) -> Work | None:
        """The next batch, waiting for one as long as it takes, or not at all; None where there is none, after waiting
        only when stopped and empty. `done` has to follow.

        Entries whose deadline passed in the queue are handed to `on_expired` (engine thread, lock held) and dropped.
        """
        with self._lock:
            while True:
                if self._handed:
                    return self._handed.popleft()
                now = self._clock()
                self._expire(now, on_expired)
                lane, due = self._next(now)
                if lane is not None:
                    work = self._start(lane, now)
                    if work is not None:
                        return work
                    continue  # all that waited there has been closed
                if not wait or (self._stopping and not self._waits(now)):
                    return None
                self._condition.wait(None if due is None else max(due - now, 0.0))

    def take_at_once(self, on_expired: Callable[[Entry], None]) -> Work | None:
        """The next batch if it is due, nothing runs and its model has light ones; `done` or `hand_over` has to follow.
        None where the engine threads are to do what there is: they are woken."""
        with self._lock:
            if self._handed or self._has_work():
                work = None if self._handed or self._running else self._start_light(on_expired)
                if work is not None:
                    return work
                self._condition.notify_all()
            elif self._stopping:
                self._condition.notify_all()
            return None

    def _start_light(self, on_expired: Callable[[Entry], None]) -> Work | None:
        now = self._clock()
        self._expire(now, on_expired)
        lane, _ = self._next(now)
        return self._start(lane, now) if lane is not None and lane.light.any else None

    def hand_over(self, work: Work) -> None:
        """A batch that was taken is for an engine thread."""
        with self._lock:
            self._handed.append(work)
            self._condition.notify_all()

    def _start(self, lane: _Lane, now: float) -> Work | None:
        batch = lane.queue.take(now)
        if batch is None:
            return None
        self._count_seconds(now)
        side_by_side = lane.divides_threads and (self._running > 0 or self._has_as_much(lane, batch, now))
        self._has_all_threads = lane.divides_threads and not side_by_side
        lane.running += 1
        self._running += 1
        return Work(lane, batch, self._engine_seconds, side_by_side)

    def _has_as_much(self, lane: _Lane, batch: Batch, now: float) -> bool:
        """Whether there is a batch that may start beside this one of a model: as large a one of its own, or any of
        another that divides the threads, too."""
        for other in self._lanes.values():
            if other.divides_threads and other.queue.cost >= (_cost(batch) if other is lane else 1):
                due = other.queue.due(now)
                if due is not None and due <= now:
                    return True
        return False

    def _waits(self, now: float) -> bool:
        return any(lane.queue.due(now) is not None for lane in self._lanes.values())

    def done(self, work: Work, succeeded: bool = True) -> float:
        """A batch that was taken is over; another may start. Its engine seconds: those that pass while batches run,
        slower the more of them. `wake` and `reported` have to follow."""
        with self._lock:
            self._count_seconds(self._clock())
            lane = work.lane
            lane.running -= 1
            self._running -= 1
            self._has_all_threads = False
            lane.untold += 1
            seconds = self._engine_seconds - work.began
            lane.used += seconds
            if succeeded and seconds > 0:
                rate = _cost(work.batch) / seconds
                lane.rate = rate if not lane.rate else lane.rate + _RATE_WEIGHT * (rate - lane.rate)
            return seconds

    def reported(self, work: Work) -> None:
        """Its answers have been told."""
        with self._lock:
            work.lane.untold -= 1
            if work.lane.removed:
                self._condition.notify_all()

    def _count_seconds(self, now: float) -> None:
        if self._running:
            self._engine_seconds += (now - self._counted_until) / self._running
        self._counted_until = now

    def depth(self, key: ModelKey) -> tuple[int, int]:
        """Requests of a model that wait and that were dropped before compute."""
        with self._lock:
            lane = self._lanes.get(key)
            if lane is None:
                return 0, 0
            return sum(entry.started is None for entry in lane.queue.entries.values()), lane.dropped

    def _expire(self, now: float, on_expired: Callable[[Entry], None]) -> None:
        for lane in self._lanes.values():
            if now < lane.queue.earliest_deadline:
                continue
            for entry in lane.queue.expired(now):
                lane.queue.remove(entry.request.id)
                lane.dropped += 1
                on_expired(entry)

    def _next(self, now: float) -> tuple[_Lane | None, float | None]:
        """The model to run now, or None and when the next batch is due (None: nothing waits, or what is next waits for
        a batch to end)."""
        best: _Lane | None = None
        soonest: float | None = None
        for lane in self._lanes.values():
            due = lane.queue.due(now)
            if due is None:
                continue
            if due > now and not (self._stopping or lane.removed):
                soonest = due if soonest is None else min(soonest, due)
            elif best is None or lane.used < best.used:
                best = lane
        # The model whose turn it is waits for those that it cannot run beside; nobody overtakes it meanwhile.
        if best is not None and self._running and not self._may_start(best):
            return None, None
        return best, soonest

    def _may_start(self, lane: _Lane) -> bool:
        if self._has_all_threads:
            return False
        running = [other for other in self._lanes.values() if other.running]
        return self._running < min(other.concurrent_runs for other in (lane, *running))

    def _level(self) -> float:
        """Engine seconds of the busy model that used least: where a model that comes back starts."""
        return min([lane.used for lane in self._lanes.values() if lane.queue.entries], default=0.0)

    def _retry_after(self) -> float:
        """Seconds until what waits now is done at the measured rates; at least one."""
        waiting = sum(lane.queue.cost / lane.rate for lane in self._lanes.values() if lane.rate)
        return float(max(1, math.ceil(waiting)))


def _cost(batch: Batch) -> int:
    """Tokens, or rows of a model without them."""
    return batch.tokens or batch.rows
