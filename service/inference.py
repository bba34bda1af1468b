"""One inference request from the HTTP side: when it started, its deadline, where its time went, how it is counted.

Routes open an `InferenceRequest` as a context manager around their work and await `run`; `direct.py`, which has no task
to wait in, calls `begin`, `start` and `end`. Either way metrics and statistics are stamped once, at the end. What a
request asks of the engine, and how its answer is made, is a `Job`, which routes make without knowing who waits.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from service.codecs.body import Body, read_body
from service.codecs.outputs import LONG_OUTPUT, RequestedOutput
from service.errors import ClientGone, InvalidRequest, ServiceError, describe
from service.exchange import Headers
from service.model import ServedModel
from service.record import record
from service.serving import Serving
from service.tracing import RequestSpan, current
from service.workers.messages import BatchingMode, InferResult, LocalTensor, NamedTensors

_DEFAULT, _LOWEST = 50, 100  # priorities; 1 is the most urgent

# How long a request waits before its connection is watched: most are answered by then and never pay for it.
_WATCH_AFTER_S = 0.01

Outputs = dict[str, NDArray[Any]]
Done = Callable[[Outputs | ServiceError], None]


@record
class Answer:
    """A good answer: its body, and its headers but for the length."""

    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]


@record
class Job:
    """What a request asks of the engine, and the function that makes its answer of the outputs. `lengths` are the
    tokens of its rows. `independent` rows go to a model that is never batched one by one. `wanted` are the
    outputs in the forms that the client wants, where these can be long JSON, which a preprocessing thread writes."""

    inputs: NamedTensors
    outputs: tuple[str, ...]
    answer: Callable[[Outputs], Answer]
    lengths: tuple[int, ...] = ()
    independent: bool = False
    wanted: tuple[RequestedOutput, ...] = ()

    def is_long(self, outputs: Outputs) -> bool:
        """Whether a thread makes the answer."""
        for array in outputs.values():
            if array.size > LONG_OUTPUT:
                return not all(output.binary for output in self.wanted)
        return False


@record
class Preparation:
    """What is to be computed on the preprocessing threads first, and the function that makes the job of it."""

    calls: tuple[Callable[[], Any], ...]
    job: Callable[[list[Any]], Job]


@dataclass(slots=True)
class InferenceRequest:
    """A request for `model`. Times are seconds; `started` and `deadline` are of `time.monotonic()`."""

    serving: Serving
    model: ServedModel
    deadline: float
    priority: int
    started: float
    queue_s: float = 0.0
    preprocess_s: float = 0.0
    compute_s: float = 0.0
    _received: float = 0.0
    _returned: float = 0.0
    _calls: list[int] = field(default_factory=list)

    def begin(self) -> None:
        """It holds its model from now on; `end` has to follow."""
        self.model.use()

    def end(self, error: BaseException | None) -> None:
        """It has its answer, or `error` became of it."""
        now = time.monotonic()
        seconds, metrics = now - self.started, self.model.metrics
        span = current.get()
        if error is not None:
            metrics.failed(describe(error).outcome, seconds, span.trace if span is not None else "")
        else:
            after = now - self._returned if self._returned else 0.0
            metrics.answers.add((seconds, self.queue_s, self.preprocess_s, self.compute_s, after))
            if span is not None:
                self._trace(span, seconds, after)
        self.model.end_use()

    def _trace(self, span: RequestSpan, seconds: float, after: float) -> None:
        parts = {"preprocess": self.preprocess_s, "queue": self.queue_s, "compute": self.compute_s}
        span.inferred(self.model.key.name, self.model.key.version, {**parts, "postprocess": after})
        if span.trace:
            times = (seconds, self.queue_s, self.preprocess_s, self.compute_s)
            self.model.metrics.exemplify(span.trace, *times)

    def __enter__(self) -> "InferenceRequest":
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(error)

    def limit_time(self, seconds: float) -> None:
        """The answer is worthless after `seconds`; the server's own limit stays."""
        self.deadline = min(self.deadline, self.started + seconds)

    def set_priority(self, priority: int) -> None:
        """1 is the most urgent; 0 is the default, the middle."""
        self.priority = priority or _DEFAULT

    async def body(self, request: Request) -> Body:
        """The request's body; preprocessing begins here. Raises the errors of codecs.body."""
        data = await read_body(request, self.serving.settings)
        self.received()
        return data

    def received(self) -> None:
        """The body is there: preprocessing begins."""
        self._received = time.monotonic()

    def start(self, job: Job, done: Done) -> None:
        """Run the engine; preprocessing ends here. `done` gets the outputs, or the error of service.errors that stands
        for them, unless `abandon` comes before."""
        self.preprocess_s = time.monotonic() - self._received
        rows = job.inputs[0][1].view().shape[0] if job.independent else 1
        if rows == 1 or self.model.specs.batching is not BatchingMode.NONE:
            self._call(job.inputs, job, job.lengths, partial(self._return, done))
            return
        results = _Rows(rows, partial(self._return_rows, job.outputs, done))
        for row, inputs in enumerate(_split(job, self.model)):
            self._call(inputs, job, (), partial(results.add, row))
            if results.failed:
                break

    def _call(
        self,
        inputs: NamedTensors,
        job: Job,
        lengths: tuple[int, ...],
        done: Callable[[InferResult | ServiceError], None],
    ) -> None:
        engine, key = self.serving.engine, self.model.key
        self._calls.append(engine.begin(key, inputs, job.outputs, lengths, self.deadline, self.priority, done))

    def _return(self, done: Done, result: InferResult | ServiceError) -> None:
        if isinstance(result, ServiceError):
            done(result)
            return
        self._returned = time.monotonic()
        self.queue_s, self.compute_s = result.queue_seconds, result.compute_seconds
        done({name: handle.view() for name, handle in result.outputs})

    def _return_rows(self, outputs: tuple[str, ...], done: Done, results: list[InferResult] | ServiceError) -> None:
        if isinstance(results, ServiceError):
            self.abandon()
            done(results)
            return
        self._returned = time.monotonic()
        self.queue_s = sum(result.queue_seconds for result in results)
        self.compute_s = sum(result.compute_seconds for result in results)
        done({name: _stack([dict(result.outputs)[name].view() for result in results]) for name in outputs})

    def abandon(self) -> None:
        """Nobody waits any more: what has no answer yet is dropped from the queue."""
        for number in self._calls:
            self.serving.engine.abandon(number)

    async def run(self, job: Job, request: Request) -> Outputs:
        """Like `start`; whatever ends the wait also drops the work. Raises the errors of service.errors."""
        future: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
        watch = _Watch(future, request)
        try:
            self.start(job, partial(_settle, future))
            return await future
        finally:
            watch.cancel()
            self.abandon()

    def answer(self, job: Job, outputs: Outputs) -> Answer:
        """The answer, with `Server-Timing` in milliseconds. Call it last: postprocessing ends here."""
        return self.timed(job.answer(outputs))

    def timed(self, answer: Answer) -> Answer:
        """The same with `Server-Timing`."""
        after = time.monotonic() - self._returned
        timing = b"queue;dur=%.3f, preprocess;dur=%.3f, compute;dur=%.3f, postprocess;dur=%.3f" % (
            self.queue_s * 1e3,
            self.preprocess_s * 1e3,
            self.compute_s * 1e3,
            after * 1e3,
        )
        return Answer(answer.body, (*answer.headers, (b"server-timing", timing)))


class _Rows:
    """The answers of rows that run one by one; `done` gets all of them, or the first error."""

    def __init__(self, count: int, done: Callable[[list[InferResult] | ServiceError], None]) -> None:
        self._results: dict[int, InferResult] = {}
        self._count = count
        self._done = done
        self.failed = False

    def add(self, row: int, result: InferResult | ServiceError) -> None:
        """One row is done."""
        if self.failed:
            return
        if isinstance(result, ServiceError):
            self.failed = True
            self._done(result)
            return
        self._results[row] = result
        if len(self._results) == self._count:
            self._done([self._results[row] for row in range(self._count)])


def _split(job: Job, model: ServedModel) -> list[NamedTensors]:
    """Each row alone, cut to its own length."""
    sequence = {spec.name: len(spec.shape) == 2 and isinstance(spec.shape[1], str) for spec in model.specs.inputs}
    parts = []
    for row in range(job.inputs[0][1].view().shape[0]):
        cut = slice(job.lengths[row]) if job.lengths else slice(None)
        views = ((name, handle.view()[row : row + 1]) for name, handle in job.inputs)
        parts.append(tuple((name, LocalTensor(view[:, cut] if sequence[name] else view)) for name, view in views))
    return parts


def _stack(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Rows of unequal extents as one array; what lies beyond a row's own extent is zero."""
    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    extents = np.max([part.shape[1:] for part in parts], axis=0)
    out = np.zeros((len(parts), *extents), parts[0].dtype)
    for row, part in enumerate(parts):
        out[row : row + 1][tuple(slice(extent) for extent in part.shape)] = part
    return out


def _settle(future: asyncio.Future[Outputs], result: Outputs | ServiceError) -> None:
    if future.done():
        return
    if isinstance(result, ServiceError):
        future.set_exception(result)
    else:
        future.set_result(result)


class _Watch:
    """Ends the wait of a task when its client goes. For all but the first milliseconds."""

    def __init__(self, future: asyncio.Future[Outputs], request: Request) -> None:
        self._future = future
        self._receive: Callable[[], Awaitable[Any]] = request.receive
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(_WATCH_AFTER_S, self._begin)
        self._task: asyncio.Task[None] | None = None

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        _settle(self._future, ClientGone("the client closed the connection"))

    def cancel(self) -> None:
        """Stop watching."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            self._task = None  # its traceback leads back here: a cycle would keep the answer until it is collected


def open_request(serving: Serving, model: ServedModel, headers: Headers) -> InferenceRequest:
    """Begin a request; its deadline and priority come from the headers `X-Timeout-Ms` and `X-Priority`.

    Raises InvalidRequest for a header that is no number or out of range.
    """
    started = time.monotonic()
    timeout, priority = headers.get(b"x-timeout-ms"), headers.get(b"x-priority")
    opened = InferenceRequest(serving, model, started + serving.settings.request_timeout, _DEFAULT, started)
    if timeout is not None:
        opened.limit_time(_number(timeout, "X-Timeout-Ms", 1, 86_400_000) / 1000)
    if priority is not None:
        opened.set_priority(_number(priority, "X-Priority", 0, _LOWEST))
    return opened


def _number(value: bytes, name: str, lowest: int, highest: int) -> int:
    if not value.isdigit() or len(value) > 9 or not lowest <= int(value) <= highest:
        raise InvalidRequest(f"header {name}: send an integer from {lowest} to {highest}")
    return int(value)
