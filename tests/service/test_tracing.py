"""Traces: a span for each request in the trace of its client, and its stages under it."""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.settings import Settings, SettingsError
from service.tracing import Tracer
from tests.service.fakes import FakeEngine

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


@pytest.fixture
def spans() -> Any:
    return pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()


@pytest.fixture
def tracer(spans: Any) -> Iterator[Tracer]:
    made = Tracer("", spans)
    yield made
    made.close()


async def _ask(app: FastAPI, *requests: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            while (await client.get("/v2/health/ready")).status_code != 200:
                await asyncio.sleep(0.01)
            return [await client.request(method, path, **options) for method, path, options in requests]


def test_spans_of_a_request(repository: Path, spans: Any, tracer: Tracer) -> None:
    engine = FakeEngine()
    app = create_app(Settings(models=repository, engine_process="never"), lambda: engine, tracer=tracer)
    tensor = {"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    scrape = ("GET", "/metrics", {"headers": {"accept": "application/openmetrics-text; version=1.0.0"}})
    answers = asyncio.run(
        _ask(
            app,
            (
                "POST",
                "/v2/models/identity/infer",
                {"json": {"inputs": [tensor]}, "headers": {"traceparent": f"00-{TRACE}-{PARENT}-01"}},
            ),
            scrape,
            ("POST", "/v2/models/identity/infer", {"content": b"{"}),
            ("GET", "/nope", {}),
            scrape,
            ("GET", "/metrics", {}),
        )
    )
    assert [answer.status_code for answer in answers] == [200, 200, 400, 404, 200, 200]
    found = spans.get_finished_spans()
    requests = [
        s for s in found if s.attributes.get("http.request.method") and s.attributes["url.path"] != "/v2/health/ready"
    ]
    inference, _, bad, unknown, *_ = requests
    bucket = r'^(inference_\w+)_bucket{.*model="identity".*} \S+ # {trace_id="(\w+)"}'
    first, second = (set(re.findall(bucket, answers[place].text, re.MULTILINE)) for place in (1, 4))
    stages = ("request", "queue", "preprocess", "compute")
    assert first == {(f"inference_{stage}_duration_seconds", TRACE) for stage in stages}
    # A bucket has the exemplar of its latest request: the bad one may have taken the place of the good one.
    latest = ("inference_request_duration_seconds", f"{bad.context.trace_id:032x}")
    assert {latest, *first} - {("inference_request_duration_seconds", TRACE)} <= second <= {latest, *first}
    assert "trace_id" not in answers[5].text
    assert f"{inference.context.trace_id:032x}" == TRACE and f"{inference.parent.span_id:016x}" == PARENT
    assert inference.name == "POST /v2/models/{model}/infer"
    assert inference.attributes["http.response.status_code"] == 200
    assert (inference.attributes["tilewave.model"], inference.attributes["tilewave.version"]) == ("identity", 1)
    parts = [s for s in found if s.parent is not None and s.parent.span_id == inference.context.span_id]
    assert [part.name for part in parts] == ["preprocess", "queue", "compute", "postprocess"]
    assert all(part.context.trace_id == inference.context.trace_id for part in parts)
    assert all(a.end_time == b.start_time for a, b in itertools.pairwise(parts))
    assert inference.start_time - 1_000_000 <= parts[0].start_time and parts[-1].end_time <= inference.end_time
    assert bad.attributes["http.response.status_code"] == 400 and "tilewave.model" not in bad.attributes
    assert unknown.name == "GET unmatched" and unknown.attributes["http.route"] == "unmatched"


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.propagate", None)
    with pytest.raises(SettingsError, match="--traces-endpoint: .* install the extra 'otel'"):
        create_app(Settings(models=tmp_path, traces_endpoint="http://127.0.0.1:1/v1/traces"), FakeEngine)
