"""Traces through OpenTelemetry, where `--traces-endpoint` says where they go: a span for each request, in the trace
that its `traceparent` header names, and under it one for each stage of an inference.

The packages are an extra (`otel`) and are imported only then. The middleware begins and ends a request's span; the
inference inside finds it by `current`, as everything else here does without knowing of the other.
"""

import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from service.settings import SettingsError

_SERVICE = "tilewave"
_NS = 1_000_000_000

current: ContextVar["RequestSpan | None"] = ContextVar("current", default=None)


class Tracer:
    """Makes spans. `exporter` takes the place of the one that sends to `endpoint`."""

    def __init__(self, endpoint: str, exporter: Any = None) -> None:
        """Raises SettingsError where the packages are missing."""
        try:
            from opentelemetry.propagate import extract
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(endpoint=endpoint)
        except ImportError as error:
            raise SettingsError(
                f"--traces-endpoint: the package {error.name} is not installed; install the extra 'otel'"
            ) from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": _SERVICE}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(_SERVICE)
        self._extract: Callable[[Mapping[str, str]], Any] = extract
        self._in_context = set_span_in_context
        self._kind = SpanKind.SERVER
        self._error = Status(StatusCode.ERROR)

    def begin(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> "RequestSpan":
        """A request begins."""
        carrier = {
            name: headers[name.encode()].decode("latin-1")
            for name in ("traceparent", "tracestate")
            if name.encode() in headers
        }
        span = self._tracer.start_span(method, context=self._extract(carrier), kind=self._kind)
        span.set_attribute("http.request.method", method)
        span.set_attribute("url.path", path)
        return RequestSpan(self, span)

    def finish(self, span: Any, method: str, route: str, status: int) -> None:
        """A request has its answer."""
        span.update_name(f"{method} {route}")
        span.set_attribute("http.route", route)
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(self._error)
        span.end()

    def stage(self, parent: Any, name: str, start_ns: int, end_ns: int) -> None:
        """A stage of a request."""
        self._tracer.start_span(name, context=self._in_context(parent), start_time=start_ns).end(end_ns)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class RequestSpan:
    """One request."""

    def __init__(self, tracer: Tracer, span: Any) -> None:
        self._tracer = tracer
        self._span = span
        context = span.get_span_context()
        self.trace = f"{context.trace_id:032x}" if context.trace_flags.sampled else ""
        """The id of the trace; empty where the trace is not recorded."""

    def finish(self, method: str, route: str, status: int) -> None:
        """It has its answer."""
        self._tracer.finish(self._span, method, route, status)

    def inferred(self, model: str, version: int, stages: Mapping[str, float]) -> None:
        """It was an inference, which is over now; `stages` are seconds, one after the other."""
        self._span.set_attribute("tilewave.model", model)
        self._span.set_attribute("tilewave.version", version)
        end = time.time_ns()
        start = end - round(sum(stages.values()) * _NS)
        for name, seconds in stages.items():
            until = start + round(seconds * _NS)
            self._tracer.stage(self._span, name, start, until)
            start = until
