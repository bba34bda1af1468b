"""One inference request from the HTTP side: when it started, its deadline, where its time went, how it is counted.

Every route that infers opens `InferenceRequest` as a context manager around its work and calls `run`; metrics and
statistics are stamped once, when the context ends.
"""

import asyncio
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from service.codecs.body import read_body
from service.errors import InvalidRequest, describe
from service.model import ServedModel
from service.serving import Serving
from service.tracing import current
from service.workers.messages import BatchingMode, InferResult, LocalTensor, NamedTensors

_DEFAULT, _LOWEST = 50, 100  # priorities; 1 is the most urgent


@dataclass(slots=True)
class InferenceRequest:
    """A request for `model`. Times are seconds; `started` and `deadline` are of `time.monotonic()`."""

    serving: Serving
    model: ServedModel
    deadline: float
    priority: int
    request: Request
    started: float
    queue_s: float = 0.0
    preprocess_s: float = 0.0
    compute_s: float = 0.0
    _received: float = 0.0
    _returned: float = 0.0

    def __enter__(self) -> "InferenceRequest":
        self.model.use()
        self.model.metrics.inflight.inc()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        now = time.monotonic()
        seconds = now - self.started
        self.model.metrics.inflight.dec()
        self.model.end_use()
        span = current.get()
        trace = span.trace if span is not None else ""
        if error is not None:
            self.model.metrics.failed(describe(error).outcome, seconds, trace)
            self.model.statistics.failed(seconds)
            return
        after = now - self._returned if self._returned else 0.0
        if span is not None:
            span.inferred(self.model.key.name, self.model.key.version, self._stages(after))
        self.model.metrics.answered(seconds, self.queue_s, self.preprocess_s, self.compute_s, trace)
        self.model.statistics.answered(seconds, self.queue_s, self.preprocess_s, self.compute_s, after)

    def _stages(self, postprocess: float) -> dict[str, float]:
        parts = {"preprocess": self.preprocess_s, "queue": self.queue_s, "compute": self.compute_s}
        return {**parts, "postprocess": postprocess}

    def limit_time(self, seconds: float) -> None:
        """The answer is worthless after `seconds`; the server's own limit stays."""
        self.deadline = min(self.deadline, self.started + seconds)

    def set_priority(self, priority: int) -> None:
        """1 is the most urgent; 0 is the default, the middle."""
        self.priority = priority or _DEFAULT

    async def body(self) -> bytes:
        """The request's body; preprocessing begins here. Raises the errors of codecs.body."""
        data = await read_body(self.request, self.serving.settings)
        self.received()
        return data

    def received(self) -> None:
        """The body is there: preprocessing begins."""
        self._received = time.monotonic()

    async def run(
        self, inputs: NamedTensors, outputs: tuple[str, ...], lengths: tuple[int, ...] = ()
    ) -> dict[str, NDArray[Any]]:
        """Run the engine on tensors of this request; preprocessing ends here. Raises the errors of service.errors."""
        self.preprocess_s = time.monotonic() - self._received
        result = await self._infer(inputs, outputs, lengths)
        self._returned = time.monotonic()
        self.queue_s, self.compute_s = result.queue_seconds, result.compute_seconds
        return {name: handle.view() for name, handle in result.outputs}

    async def run_rows(
        self, inputs: NamedTensors, outputs: tuple[str, ...], lengths: tuple[int, ...] = ()
    ) -> dict[str, NDArray[Any]]:
        """Like `run` for independent rows; a model that is never batched gets them one by one, without padding."""
        rows = inputs[0][1].view().shape[0]
        if self.model.specs.batching is not BatchingMode.NONE or rows == 1:
            return await self.run(inputs, outputs, lengths)
        sequence = {
            spec.name: len(spec.shape) == 2 and isinstance(spec.shape[1], str) for spec in self.model.specs.inputs
        }
        self.preprocess_s = time.monotonic() - self._received
        calls = []
        for row in range(rows):
            cut = slice(lengths[row]) if lengths else slice(None)
            views = ((name, handle.view()[row : row + 1]) for name, handle in inputs)
            alone = tuple((name, LocalTensor(view[:, cut] if sequence[name] else view)) for name, view in views)
            calls.append(self._infer(alone, outputs, ()))
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        self._returned = time.monotonic()
        self.queue_s = sum(result.queue_seconds for result in results)
        self.compute_s = sum(result.compute_seconds for result in results)
        return {name: _stack([dict(result.outputs)[name].view() for result in results]) for name in outputs}

    async def _infer(self, inputs: NamedTensors, outputs: tuple[str, ...], lengths: tuple[int, ...]) -> InferResult:
        return await self.serving.engine.infer(
            self.model.key, inputs, outputs, lengths, self.deadline, self.priority, self._disconnected
        )

    async def _disconnected(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def headers(self) -> dict[str, str]:
        """`Server-Timing` of the answer, in milliseconds. Call it last: postprocessing ends here."""
        after = time.monotonic() - self._returned
        timing = (
            f"queue;dur={self.queue_s * 1e3:.3f}, preprocess;dur={self.preprocess_s * 1e3:.3f}, "
            f"compute;dur={self.compute_s * 1e3:.3f}, postprocess;dur={after * 1e3:.3f}"
        )
        return {"server-timing": timing}


def _stack(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Rows of unequal extents as one array; what lies beyond a row's own extent is zero."""
    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    extents = np.max([part.shape[1:] for part in parts], axis=0)
    out = np.zeros((len(parts), *extents), parts[0].dtype)
    for row, part in enumerate(parts):
        out[row : row + 1][tuple(slice(extent) for extent in part.shape)] = part
    return out


def open_request(serving: Serving, model: ServedModel, request: Request) -> InferenceRequest:
    """Begin a request; its deadline and priority come from the headers `X-Timeout-Ms` and `X-Priority`.

    Raises InvalidRequest for a header that is no number or out of range.
    """
    started = time.monotonic()
    timeout, priority = request.headers.get("x-timeout-ms"), request.headers.get("x-priority")
    opened = InferenceRequest(serving, model, started + serving.settings.request_timeout, _DEFAULT, request, started)
    if timeout is not None:
        opened.limit_time(_number(timeout, "X-Timeout-Ms", 1, 86_400_000) / 1000)
    if priority is not None:
        opened.set_priority(_number(priority, "X-Priority", 0, _LOWEST))
    return opened


def _number(text: str, name: str, lowest: int, highest: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not lowest <= int(text) <= highest:
        raise InvalidRequest(f"header {name}: send an integer from {lowest} to {highest}")
    return int(text)
