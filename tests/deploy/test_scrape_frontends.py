"""Debian's Prometheus beside a server of several processes: whichever front end it scrapes, the numbers are those of
all, they never go back, and rules and dashboards have what they need."""

from __future__ import annotations

from pathlib import Path

from load_tests.servers import tilewave
from tests.deploy import traffic
from tests.deploy.prometheus import TIMES, empty_queries, needs_prometheus, running, wait

pytestmark = needs_prometheus


def test_numbers_of_several_front_ends_are_one_server_s(tmp_path: Path) -> None:
    for name in ("models", "prometheus"):
        (tmp_path / name).mkdir()
    models = traffic.repository(tmp_path / "models")
    with (
        tilewave(models, tmp_path, "--device", "cpu", "--threads", "2", "--frontends", "2") as server,
        running(tmp_path / "prometheus", f"127.0.0.1:{server.port}", TIMES) as prometheus,
    ):
        with traffic.flowing(f"http://127.0.0.1:{server.port}") as good:
            wait(lambda: prometheus.query("job_instance:engine_busy:ratio_rate5m > 0"), "rules have data", 30)
            assert empty_queries(prometheus, ignored="ALERTS") == []
            assert [rule for rule in prometheus.rules() if rule["health"] != "ok"] == []
        for model, answered in good.items():
            counted = f'inference_requests_total{{model="{model}", outcome="success"}}'
            assert answered > 20
            wait(lambda c=counted, n=answered: prometheus.value(c) == n, f"{model} has {answered}", 20)  # type: ignore[misc]
        for name in (
            "inference_requests_total",
            "engine_kernel_seconds_total",
            "inference_request_duration_seconds_count",
        ):
            assert prometheus.value(f"max(resets({name}[1d]))") == 0
        assert prometheus.value("sum(inference_inflight)") == prometheus.value("sum(inference_queue_depth)") == 0
