"""/metrics: what is counted, the kernels' counters and speeds, bounded labels, Prometheus's own checker."""

from __future__ import annotations

import gc
import random
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from service.kernel_metrics import WINDOW_S, EngineCollector, LoadedModel
from service.metrics import Metrics
from service.numbers import Histograms, Rows
from service.workers.messages import BatchDone, Device, KernelCounters, ModelKey, ModelStats
from tests.deploy.prometheus import needs_prometheus, promtool
from tests.service.conftest import Running, Start, add_model, sample

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "metrics.md"
KEY = ModelKey("m", 1)
DEVICE = Device("cpu", "Test CPU", "x", 2, peak_flops=1e9, peak_bytes=1e8, peak_cache_bytes=4e8)

NAMES = """
inference_requests_total inference_request_duration_seconds inference_queue_duration_seconds
inference_preprocess_duration_seconds inference_compute_duration_seconds inference_batch_size inference_batch_tokens
inference_padding_tokens_total inference_queue_depth inference_inflight engine_kernel_launches_total
engine_kernel_seconds_total engine_kernel_flops_total engine_kernel_bytes_total engine_kernel_flops_per_second
engine_kernel_bytes_per_second engine_kernel_roofline_ratio engine_kernel_flops_floor_seconds_total
engine_kernel_bytes_floor_seconds_total engine_device_peak_flops_per_second engine_device_peak_bytes_per_second
engine_device_memory_bytes engine_model_load_seconds
engine_fallback_ops engine_info process_start_time_seconds
""".split()


def load(server: Running) -> None:
    for _ in range(3):
        assert server.identity([1, 2, 3, 4]).status_code == 200
    assert server.client.post("/v1/models/encoder/tokens", json={"ids": [[1, 2, 3], [4]]}).status_code == 200
    assert server.identity([1, 2, 3]).status_code == 400


def test_every_promised_metric_is_there_after_load(server: Running) -> None:
    load(server)
    text = server.client.get("/metrics").text
    declared = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert set(NAMES) <= declared
    rows = re.findall(r"^\| `((?:inference|engine|http)_\w+)` \| ([a-z]+)", DOCUMENT.read_text(), re.MULTILINE)
    of_client_library = {name for name in declared if name.startswith(("process_", "python_"))}
    assert sorted(name for name, _ in rows) == sorted(declared - of_client_library)
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)", text, re.MULTILINE))
    assert [name for name, kind in rows if types[name] != kind.replace("info", "gauge")] == []


def test_labels_are_those_of_the_documents(server: Running) -> None:
    """Of every sample: what a series is told apart by, and so how many there can be."""
    load(server)
    labels = {"engine_kernel": {"model", "version", "kernel", "op"}, "inference": {"model", "version"}}
    expected = {
        "inference_requests_total": {"model", "version", "outcome"},
        "http_responses_total": {"route", "status"},
        "engine_device_peak_flops_per_second": {"device"},
        "engine_device_peak_bytes_per_second": {"device", "level"},
        "engine_device_memory_bytes": {"device", "kind"},
        "engine_model_load_seconds": {"model", "version"},
        "engine_fallback_ops": {"model", "version"},
        "engine_process_restarts_total": set(),
        "engine_info": {"device", "name", "arch", "threads"},
    }
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for one in family.samples:
            if one.name.startswith(("process_", "python_")):
                continue
            prefix = next((prefix for prefix in labels if one.name.startswith(f"{prefix}_")), "")
            assert set(one.labels) - {"le"} == (expected.get(one.name) or labels.get(prefix, set())), one.name


@needs_prometheus
def test_promtool_has_no_complaint(server: Running) -> None:
    load(server)
    text = server.client.get("/metrics").text
    done = promtool("check", "metrics", text=text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_requests_are_counted_by_outcome(server: Running) -> None:
    load(server)
    text = server.client.get("/metrics").text
    assert sample(text, "inference_requests_total", model="identity", version="1", outcome="success") == 3
    assert sample(text, "inference_requests_total", model="identity", version="1", outcome="invalid") == 1
    assert sample(text, "inference_request_duration_seconds_count", model="identity") == 4
    assert sample(text, "inference_compute_duration_seconds_count", model="identity") == 3
    assert sample(text, "inference_batch_size_count", model="identity") == 3
    assert sample(text, "inference_batch_tokens_sum", model="encoder") == 4
    assert sample(text, "inference_padding_tokens_total", model="encoder") == 12  # two rows of 8
    assert sample(text, "http_responses_total", route="/v2/models/{model}/infer", status="200") == 3


def test_every_outcome_exists_before_it_happens(shared: Running) -> None:
    text = shared.client.get("/metrics").text
    assert 'inference_requests_total{model="identity",outcome="overloaded",version="1"} 0.0' in text


def test_strange_names_make_no_series(server: Running) -> None:
    before = len(server.client.get("/metrics").text.splitlines())
    for i in range(30):
        server.client.post(f"/v2/models/strange{i}/infer", json={})
        server.client.get(f"/strange{i}")
        server.client.post("/v1/embeddings", json={"model": f"strange{i}", "input": "a"})
    text = server.client.get("/metrics").text
    assert "strange" not in text
    assert len(text.splitlines()) <= before + 6


def test_kernels_are_the_engines_own_counters(server: Running) -> None:
    load(server)
    model = next(model for model in server.engine.models if model.kind == "identity")
    text = server.client.get("/metrics").text
    for stat in model.kernel_stats():
        labels = {"model": "identity", "version": "1", "kernel": stat.kernel, "op": stat.op}
        for field in ("launches", "seconds", "flops", "bytes", "cached_bytes"):
            assert sample(text, f"engine_kernel_{field}_total", **labels) == pytest.approx(getattr(stat, field))
        device = model.device_info
        floor = stat.flops / device.peak_flops
        assert sample(text, "engine_kernel_flops_floor_seconds_total", **labels) == pytest.approx(floor)
        floor = (stat.bytes - stat.cached_bytes) / device.peak_bytes + stat.cached_bytes / device.peak_cache_bytes
        assert sample(text, "engine_kernel_bytes_floor_seconds_total", **labels) == pytest.approx(floor)
    assert sample(text, "engine_device_peak_flops_per_second", device="cpu") == model.device_info.peak_flops
    for level, peak in (("memory", model.device_info.peak_bytes), ("cache", model.device_info.peak_cache_bytes)):
        assert sample(text, "engine_device_peak_bytes_per_second", device="cpu", level=level) == peak
    assert sample(text, "engine_device_memory_bytes", device="cpu", kind="weights") == 3000


def test_openmetrics_where_asked_for(shared: Running) -> None:
    response = shared.client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


def stats(
    launches: int, seconds: float, flops: float, moved: float, kernel: str = "k", cached: float = 0.0
) -> tuple[ModelStats, ...]:
    floors = DEVICE.floors(flops, moved, cached)
    counters = (KernelCounters(kernel, "Gemm", launches, seconds, flops, moved, cached, *floors),)
    return (ModelStats(KEY, counters, (("weights", 7),), 0, 0),)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def speeds(collector: EngineCollector) -> dict[str, list[float]]:
    families = {family.name: family for family in collector.collect()}
    names = ("engine_kernel_flops_per_second", "engine_kernel_bytes_per_second", "engine_kernel_roofline_ratio")
    return {name: [sample.value for sample in families[name].samples] for name in names}


def test_speeds_are_over_running_time_in_the_window() -> None:
    clock = Clock()
    collector = EngineCollector(clock)
    collector.loaded(KEY, LoadedModel(DEVICE, 0.1, 0))
    collector.update(stats(10, 1.0, 1e8, 1e6))
    clock.now += WINDOW_S / 2
    collector.update(stats(20, 3.0, 9e8, 3e6))
    found = speeds(collector)
    assert found["engine_kernel_flops_per_second"] == pytest.approx([4e8])
    assert found["engine_kernel_bytes_per_second"] == pytest.approx([1e6])
    assert found["engine_kernel_roofline_ratio"] == pytest.approx([0.4])
    for _ in range(3):
        clock.now += WINDOW_S
        collector.update(stats(20, 3.0, 9e8, 3e6))
    assert speeds(collector) == {name: [] for name in found}


def test_bytes_that_fit_the_cache_are_held_against_the_cache() -> None:
    """A kernel that moves 3e8 bytes/s from the cache is at three quarters of it, not at three times the memory's."""
    clock = Clock()
    collector = EngineCollector(clock)
    collector.loaded(KEY, LoadedModel(DEVICE, 0.1, 0))
    collector.update(stats(0, 0.0, 0.0, 0.0))
    clock.now += WINDOW_S / 2
    for cached, ratio in ((3e8, 0.75), (2e8, 0.5 + 1.0)):
        collector.update(stats(10, 1.0, 1e6, 3e8, cached=cached))
        assert speeds(collector)["engine_kernel_roofline_ratio"] == pytest.approx([ratio])


def test_the_window_slides() -> None:
    clock = Clock()
    collector = EngineCollector(clock)
    collector.loaded(KEY, LoadedModel(DEVICE, 0.1, 0))
    for step in range(30):
        collector.update(stats(step, step * 1.0, min(step, 20) * 1e8, 0.0))
        clock.now += 10.0
    assert speeds(collector)["engine_kernel_flops_per_second"] == [0.0]
    assert len(collector._history) <= WINDOW_S / 10 + 2


def test_a_reloaded_model_starts_again() -> None:
    clock = Clock()
    collector = EngineCollector(clock)
    collector.loaded(KEY, LoadedModel(DEVICE, 0.1, 0))
    collector.update(stats(100, 10.0, 1e10, 1e6))
    clock.now += 10
    collector.loaded(KEY, LoadedModel(DEVICE, 0.1, 0))
    collector.update(stats(1, 0.5, 1e8, 1e6))
    assert speeds(collector)["engine_kernel_flops_per_second"] == pytest.approx([2e8])


def test_a_device_without_known_peaks_has_no_roofline() -> None:
    collector = EngineCollector()
    unknown = Device("cpu", "c", "x", 1, 0.0, 0.0, 0.0)
    collector.loaded(KEY, LoadedModel(unknown, 0.1, 0))
    counters = (KernelCounters("k", "Gemm", 1, 0.5, 1e8, 1e6, 0.0, *unknown.floors(1e8, 1e6, 0.0)),)
    collector.update((ModelStats(KEY, counters, (), 0, 0),))
    assert speeds(collector)["engine_kernel_roofline_ratio"] == []


def test_fallback_ops_and_load_time_of_each_model(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "identity", "identity")
    text = start(tmp_path).client.get("/metrics").text
    assert 'engine_fallback_ops{model="identity",version="1"} 0.0' in text
    assert 0 < sample(text, "engine_model_load_seconds", model="identity") < 10
    assert 'name="Fake CPU"' in text


def test_rows_count_as_each_value_alone() -> None:
    registry = CollectorRegistry(auto_describe=False)
    bounds = ((0.1, 1.0, 10.0), (1.0, 2.0))
    together = [Histograms(f"together_{i}", "", ("m",), edges, registry).labels("a") for i, edges in enumerate(bounds)]
    alone = [Histograms(f"alone_{i}", "", ("m",), edges, registry).labels("a") for i, edges in enumerate(bounds)]

    def count(columns: NDArray[np.float64]) -> None:
        for distribution, values in zip(together, columns, strict=True):
            distribution.observe_all(values)

    rows = Rows(2, count)
    draw = random.Random(0)
    for _ in range(2500):  # more than are kept
        values = draw.choice((0.1, 1.0, 10.0, draw.expovariate(1.0))), draw.uniform(0.0, 3.0)
        rows.add(values)
        for distribution, value in zip(alone, values, strict=True):
            distribution.observe(value)
    together[0].observe(5.0)
    alone[0].observe(5.0)
    rows.settle()
    for one, other in zip(together, alone, strict=True):
        (counts, _, total), (expected, _, sum_) = one.read(), other.read()
        assert counts == expected and sum(counts) >= 2500
        assert total == pytest.approx(sum_, rel=1e-12)


def test_a_version_that_is_loaded_again_counts_on_while_the_one_before_drains() -> None:
    metrics = Metrics()
    labels = {"model": KEY.name, "version": str(KEY.version)}
    before, after = metrics.model(KEY), metrics.model(ModelKey(KEY.name, KEY.version, 2))
    before.inflight, after.inflight = 2, 1
    for model, seconds in ((before, 0.2), (before, 0.3), (after, 0.4)):
        model.answers.add((seconds, 0.1, 0.01, 0.05, 0.02))
        model.ran(BatchDone(KEY, 3, 7, 2, 0.05, 1))

    def read(name: str, **more: str) -> float | None:
        return metrics.registry.get_sample_value(name, {**labels, **more})

    assert read("inference_inflight") == 3
    before.answers.add((0.5, 0.1, 0.01, 0.05, 0.02))
    before.settle()  # as at its unloading
    before.inflight = 0
    del before, model
    gc.collect()
    for _ in range(2):  # nothing is counted twice
        assert read("inference_requests_total", outcome="success") == 4
        assert read("inference_request_duration_seconds_count") == 4
        assert read("inference_request_duration_seconds_sum") == pytest.approx(1.4, rel=1e-12)
        assert read("inference_request_duration_seconds_bucket", le="0.25") == 1
        assert read("inference_batch_size_sum") == 9
        assert read("inference_batch_tokens_count") == 3
        assert read("inference_padding_tokens_total") == 6
        assert read("inference_inflight") == 1


def test_statistics_are_those_of_one_load() -> None:
    metrics = Metrics()
    models = [metrics.model(ModelKey("m", 1, generation)) for generation in range(2)]
    for rows in (1, 4, 4):
        models[0].ran(BatchDone(KEY, rows, 0, 0, 0.25 * rows, 1))
    for _ in range(3000):  # more than are kept
        models[0].answers.add((0.5, 0.125, 0.0625, 0.25, 0.03125))
    models[1].answers.add((0.5, 0.0, 0.0, 0.5, 0.0))
    document = models[0].statistics.document("m", 1)
    assert (document["inference_count"], document["execution_count"]) == (9, 3)
    assert {entry["batch_size"]: entry["compute_infer"] for entry in document["batch_stats"]} == {
        1: {"count": 1, "ns": 250_000_000},
        4: {"count": 2, "ns": 2_000_000_000},
    }
    stages = {"success": 1500, "queue": 375, "compute_input": 187.5, "compute_infer": 750, "compute_output": 93.75}
    for name, seconds in stages.items():
        assert document["inference_stats"][name] == {"count": 3000, "ns": round(seconds * 1e9)}, name
    assert models[1].statistics.document("m", 1)["inference_stats"]["success"]["count"] == 1
