"""Debian's Prometheus, with the rules of deploy/, beside a server under load: every rule is evaluated, every query of
every dashboard has data, and a kernel that becomes slow fires its alert.

Time in the rules and the queries runs 200 times faster: five minutes are a second and a half.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn

from engine.model import Model
from service.app import create_app
from service.serving import Serving
from service.settings import Settings
from service.tracing import Tracer
from service.workers.transport import LocalTransport
from tests.deploy import traffic
from tests.deploy.prometheus import (
    TIMES,
    Prometheus,
    empty_queries,
    needs_prometheus,
    promtool,
    running,
    wait,
)
from tests.deploy.slow_kernel import slow_kernel

pytestmark = needs_prometheus

DESIGN = """
inference_requests_total inference_request_duration_seconds_bucket inference_queue_duration_seconds_bucket
inference_preprocess_duration_seconds_bucket inference_compute_duration_seconds_bucket inference_batch_size_bucket
inference_batch_tokens_bucket inference_padding_tokens_total inference_queue_depth inference_inflight
engine_kernel_launches_total engine_kernel_seconds_total engine_kernel_flops_total engine_kernel_bytes_total
engine_kernel_flops_per_second engine_kernel_bytes_per_second engine_kernel_roofline_ratio engine_device_memory_bytes
engine_model_load_seconds engine_fallback_ops engine_info
""".split()


@dataclass(frozen=True)
class Loaded:
    """A server under load, and the Prometheus that scrapes it."""

    prometheus: Prometheus
    serving: Serving
    url: str

    def model(self, name: str) -> Model:
        """A model of the engine in this process."""
        transport = self.serving.engine._transport
        assert isinstance(transport, LocalTransport)
        (model,) = (model for key, model in transport._worker._models.items() if key.name == name)
        assert isinstance(model, Model)
        return model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    repository = traffic.repository(tmp_path_factory.mktemp("models"))
    exporter = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    app = create_app(Settings(models=repository, device="cpu", threads=2), tracer=Tracer("", exporter))
    listener = socket.create_server(("127.0.0.1", 0))
    place = f"127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait(lambda: httpx.get(f"http://{place}/v2/health/ready").status_code == 200, "the models are loaded", 60)
        with (
            traffic.flowing(f"http://{place}"),
            running(tmp_path_factory.mktemp("prometheus"), place, TIMES) as prometheus,
        ):
            yield Loaded(prometheus, app.state.serving, f"http://{place}")
    finally:
        server.should_exit = True
        thread.join(20)


def test_prometheus_scrapes_and_evaluates_every_rule(loaded: Loaded) -> None:
    prometheus = loaded.prometheus
    wait(lambda: prometheus.query('up{job="tilewave"} == 1'), "the server is scraped", 20)
    rules = prometheus.rules()
    assert len(rules) > 20

    def evaluated() -> bool:
        return all(rule["health"] == "ok" for rule in prometheus.rules())

    wait(evaluated, "every rule is evaluated", 20)
    assert [rule["lastError"] for rule in prometheus.rules() if rule.get("lastError")] == []
    for rule in rules:
        if rule["type"] == "recording":
            prometheus.value(rule["name"])


def test_every_metric_of_the_design_has_data(loaded: Loaded) -> None:
    for name in DESIGN:
        loaded.prometheus.value(name)


def test_exemplars_lead_to_traces(loaded: Loaded) -> None:
    def exemplars() -> Any:
        now = time.time()
        query = "inference_request_duration_seconds_bucket"
        return loaded.prometheus.get("query_exemplars", query=query, start=f"{now - 60}", end=f"{now}")

    wait(exemplars, "there are exemplars", 20)
    found = {exemplar["labels"]["trace_id"] for series in exemplars() for exemplar in series["exemplars"]}
    assert found and all(re.fullmatch(r"[0-9a-f]{32}", trace) for trace in found)


def test_promtool_finds_nothing_in_the_metrics_of_a_loaded_server(loaded: Loaded) -> None:
    text = httpx.get(f"{loaded.url}/metrics").text
    done = promtool("check", "metrics", text=text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_slow_kernel_shows_fires_its_alert_and_no_query_of_a_dashboard_is_empty(loaded: Loaded) -> None:
    """Attention becomes a thousand times slower: its share of the roofline falls, others' stays, and the alert names
    it. The dashboards are asked then, when there are alerts, too."""
    prometheus = loaded.prometheus
    level = "job_instance_model_version_kernel_op:engine_kernel"
    attention = '{model="bert", op="Attention"}'
    wait(lambda: prometheus.query(f"{level}_speed:ratio_of_baseline{attention}"), "there is a baseline", 30)
    before = prometheus.value(f"{level}_roofline:ratio_rate5m{attention}")
    gauge = prometheus.value(f"engine_kernel_roofline_ratio{attention}")
    others = '{model="convnet", op="Conv", kernel="gemm"}'
    others_before = prometheus.value(f"{level}_roofline:ratio_rate5m{others}")
    assert before > 0 and gauge > 0 and others_before > 0
    wait(lambda: not _names(prometheus.alerts("TilewaveKernelSlow"), "Attention"), "no alert fires before", 20)
    with slow_kernel(loaded.model("bert"), "Attention", 2e-3):
        wait(lambda: _names(prometheus.alerts("TilewaveKernelSlow"), "Attention"), "the alert fires", 40)
        (alert,) = [a for a in prometheus.alerts("TilewaveKernelSlow") if a["labels"]["op"] == "Attention"]
        assert {key: alert["labels"][key] for key in ("model", "version", "kernel", "severity")} == {
            "model": "bert",
            "version": "1",
            "kernel": "attention",
            "severity": "ticket",
        }
        assert float(alert["value"]) < 0.1
        assert "kernel attention (Attention) of bert/1" in alert["annotations"]["summary"]
        left = prometheus.value(f"{level}_roofline:ratio_rate5m{attention}") / before
        assert left < 0.1
        # Beside the fall of attention: this machine may have become slower for everyone meanwhile.
        assert prometheus.value(f"{level}_roofline:ratio_rate5m{others}") / others_before > 3 * left
        wait(lambda: prometheus.value(f"engine_kernel_roofline_ratio{attention}") < gauge / 2, "the gauge falls", 20)
        assert empty_queries(prometheus) == []
    wait(lambda: not _names(prometheus.alerts("TilewaveKernelSlow"), "Attention"), "the alert ends", 40)


def _names(alerts: list[dict[str, Any]], op: str) -> bool:
    return any(alert["labels"]["op"] == op for alert in alerts)
