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
    answers = asyncio.run(
        _ask(
            app,
            (
                "POST",
                "/v2/models/identity/infer",
                {"json": {"inputs": [tensor]}, "headers": {"traceparent": f"00-{TRACE}-{PARENT}-01"}},
            ),
            ("POST", "/v2/models/identity/infer", {"content": b"{"}),
            ("GET", "/nope", {}),
            ("GET", "/metrics", {"headers": {"accept": "application/openmetrics-text; version=1.0.0"}}),
            ("GET", "/metrics", {}),
        )
    )
    assert [answer.status_code for answer in answers] == [200, 400, 404, 200, 200]
    found = spans.get_finished_spans()
    requests = [
        s for s in found if s.attributes.get("http.request.method") and s.attributes["url.path"] != "/v2/health/ready"
    ]
    inference, bad, unknown, *_ = requests
    bucket = r'^(inference_\w+)_bucket{.*model="identity".*} \S+ # {trace_id="(\w+)"}'
    exemplars = set(re.findall(bucket, answers[3].text, re.MULTILINE))
    assert exemplars == {
        *((f"inference_{stage}_duration_seconds", TRACE) for stage in ("queue", "preprocess", "compute")),
        ("inference_request_duration_seconds", TRACE),
        ("inference_request_duration_seconds", f"{bad.context.trace_id:032x}"),
    }
    assert "trace_id" not in answers[4].text
    assert f"{inference.context.trace_id:032x}" == TRACE and f"{inference.parent.span_id:016x}" == PARENT
    assert inference.name == "POST /v2/models/{model}/infer"
    assert inference.attributes["http.response.status_code"] == 200
    assert (inference.attributes["tilewave.model"], inference.attributes["tilewave.version"]) == ("identity", 1)
    stages = [s for s in found if s.parent is not None and s.parent.span_id == inference.context.span_id]
    assert [stage.name for stage in stages] == ["preprocess", "queue", "compute", "postprocess"]
    assert all(stage.context.trace_id == inference.context.trace_id for stage in stages)
    assert all(a.end_time == b.start_time for a, b in itertools.pairwise(stages))
    assert inference.start_time - 1_000_000 <= stages[0].start_time and stages[-1].end_time <= inference.end_time
    assert bad.attributes["http.response.status_code"] == 400 and "tilewave.model" not in bad.attributes
    assert unknown.name == "GET unmatched" and unknown.attributes["http.route"] == "unmatched"


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.propagate", None)
    with pytest.raises(SettingsError, match="--traces-endpoint: .* install the extra 'otel'"):
        create_app(Settings(models=tmp_path, traces_endpoint="http://127.0.0.1:1/v1/traces"), FakeEngine)
