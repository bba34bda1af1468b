"""The service's own Prometheus metrics: every name, help text and bucket in one place (docs/metrics.md is its reader's
side).

`Metrics` belongs to one app and has its own registry; its numbers are plain ones (`numbers.py`). Requests stamp them
once, at their end, and batches at theirs: one call each, of which all else follows when it is read, the statistics of
the protocol too. Models hold bound children, so no label is looked up on the way. Unknown model names never become
label values.
"""

import time
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from service.errors import Outcome
from service.kernel_metrics import EngineCollector
from service.merging import Merged, Snapshot
from service.numbers import Counters, Gauges, Histograms, Registry, Rows
from service.statistics import ModelStatistics
from service.workers.messages import BatchDone, ModelKey

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_MODEL = ("model", "version")

# `_created` series double the size of a scrape, and promtool objects to their names.
disable_created_metrics()  # type: ignore[no-untyped-call]


class ModelMetrics:
    """The children of one model version, from its loading to its unloading, when `settle` is called at the latest.

    `inflight` are the requests that use it now. `answers` gets a row for each that was answered: the seconds from its
    beginning to its end, then those of queue, preprocessing, computing and postprocessing.
    """

    def __init__(self, metrics: "Metrics", key: ModelKey) -> None:
        labels = (key.name, str(key.version))
        self._requests = {outcome: metrics.requests.labels(*labels, outcome.value) for outcome in Outcome}
        self._successes = self._requests[Outcome.SUCCESS]
        self._duration = metrics.duration.labels(*labels)
        stages = (metrics.queue.labels(*labels), metrics.preprocess.labels(*labels), metrics.compute.labels(*labels))
        self._times = (self._duration, *stages)
        self._batch_size = metrics.batch_size.labels(*labels)
        self._batch_tokens = metrics.batch_tokens.labels(*labels)
        self._padding = metrics.padding.labels(*labels)
        self.inflight_number = metrics.inflight.labels(*labels)
        self.inflight = 0
        self.answers = Rows(5, self._count_answers)
        self._batches = Rows(5, self._count_batches)
        self._statistics = ModelStatistics()

    def exemplify(self, trace: str, *seconds: float) -> None:
        """A request that is answered, with these times, belongs to the trace with this id: OpenMetrics shows it as the
        exemplar of its buckets."""
        for distribution, value in zip(self._times, seconds, strict=True):
            distribution.exemplify(value, trace)

    def failed(self, outcome: Outcome, seconds: float, trace: str) -> None:
        """One request was refused, failed or dropped; `trace` is empty where it has none."""
        self._requests[outcome].inc()
        self._duration.observe(seconds)
        if trace:
            self._duration.exemplify(seconds, trace)
        self._statistics.failed(seconds)

    def ran(self, batch: BatchDone) -> None:
        """One batch was computed."""
        self._batches.add((batch.rows, batch.tokens, batch.padding, batch.compute_seconds, time.time()))

    @property
    def statistics(self) -> ModelStatistics:
        """The protocol's view of it."""
        self.settle()
        return self._statistics

    def settle(self) -> None:
        """Count what was told of requests and batches."""
        self.answers.settle()
        self._batches.settle()

    def _count_answers(self, columns: NDArray[np.float64]) -> None:
        self._successes.inc(columns.shape[1])
        for distribution, values in zip(self._times, columns[:-1], strict=True):
            distribution.observe_all(values)
        self._statistics.answered(columns)

    def _count_batches(self, columns: NDArray[np.float64]) -> None:
        rows, tokens, padding, seconds, ended = columns
        self._batch_size.observe_all(rows)
        if tokens.any():
            self._batch_tokens.observe_all(tokens[tokens > 0])
            self._padding.inc(int(padding.sum()))
        self._statistics.ran(rows, seconds, ended[-1])


class Metrics:
    """All metrics of one server process."""

    def __init__(self) -> None:
        registry = self.registry = Registry(self._settle)
        self._models: WeakSet[ModelMetrics] = WeakSet()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.engine = EngineCollector()
        registry.register(self.engine)
        self.requests = Counters(
            "inference_requests_total", "Inference requests by how they ended.", (*_MODEL, "outcome"), registry
        )
        self.duration = self._histogram(
            "inference_request_duration_seconds", "From the first byte read to the answer.", _SECONDS
        )
        self.queue = self._histogram(
            "inference_queue_duration_seconds", "Waiting for the engine, before and between the runs.", _SECONDS
        )
        self.preprocess = self._histogram("inference_preprocess_duration_seconds", "Decoding and tokenizing.", _SECONDS)
        self.compute = self._histogram(
            "inference_compute_duration_seconds", "Runs of the engine a request was part of.", _SECONDS
        )
        self.batch_size = self._histogram("inference_batch_size", "Rows of a batch.", _ROWS)
        self.batch_tokens = self._histogram("inference_batch_tokens", "Tokens of a batch, padding left out.", _TOKENS)
        self.padding = Counters(
            "inference_padding_tokens_total", "Tokens computed that are no row's own.", _MODEL, registry
        )
        self.inflight = Gauges("inference_inflight", "Requests accepted and not answered yet.", _MODEL, registry)
        self.restarts = Counters(
            "engine_process_restarts_total",
            "Times the engine's process was lost; it is started again unless the server is shutting down.",
            (),
            registry,
        ).labels()
        self.responses = Counters(
            "http_responses_total", "HTTP answers by route and status.", ("route", "status"), registry
        )

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histograms:
        return Histograms(name, text, _MODEL, bounds, self.registry)

    def model(self, key: ModelKey) -> ModelMetrics:
        """The children of a model version; made once per load, so that its series exist from the start."""
        model = ModelMetrics(self, key)
        self._models.add(model)
        return model

    def _settle(self) -> None:
        """Count everything that was told. A version that is loaded again is two models for a while."""
        for number in self.inflight.children():
            number.value = 0
        for model in self._models:
            model.settle()
            model.inflight_number.value += model.inflight

    def render(self, accept: str, totals: Snapshot | None = None) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics where `accept` asks for it, else the text format. `totals`
        stand for what this process alone has counted."""
        encode, content_type = choose_encoder(accept)
        if totals is None:
            return encode(self.registry), content_type
        registry = CollectorRegistry(auto_describe=False)
        registry.register(Merged(totals))
        registry.register(self.engine)
        return encode(registry), content_type
