"""The dashboard of models: throughput, batches, padding and latency of each."""

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import units

from deploy.grafana.panels import OF_MODEL, RATE, histogram, lines, make, rows

_EACH = "{{model}}/{{version}}"


def _rate(metric: str) -> str:
    return f"sum by (model, version) (rate({metric}{{{OF_MODEL}}}{RATE}))"


def _quantile(q: float, metric: str) -> str:
    buckets = f"sum by (model, version, le) (rate({metric}_bucket{{{OF_MODEL}}}{RATE}))"
    return f"histogram_quantile({q}, {buckets})"


def models() -> dashboard.Dashboard:
    """The whole of it."""
    board = make("Models", "tilewave-models", "Throughput, batches and latency of each model.", by_model=True)
    board.with_row(dashboard.Row("Throughput"))
    for panel in (
        lines("Rows", "Computed a second: images, texts.", [(_rate("inference_batch_size_sum"), _EACH)],
              units.RequestsPerSecond),
        lines("Rows of a batch", "The mean. What waits while the engine is busy shares the next run.",
              [(f"{_rate('inference_batch_size_sum')} / {_rate('inference_batch_size_count')}", _EACH)], units.Short),
        lines("Tokens", "Computed a second, padding left out; models for tokens only.",
              [(_rate("inference_batch_tokens_sum"), _EACH)], units.Short),
        lines("Padding", "Share of the computed tokens that are no row's own.",
              [(f"{_rate('inference_padding_tokens_total')} / "
                f"({_rate('inference_padding_tokens_total')} + {_rate('inference_batch_tokens_sum')})", _EACH)],
              units.PercentUnit, most=1),
        lines("Requests", "By how they ended.",
              [(f"sum by (model, version, outcome) (rate(inference_requests_total{{{OF_MODEL}}}{RATE})) > 0",
                f"{_EACH} {{{{outcome}}}}")], units.RequestsPerSecond),
        lines("Dropped", "Before they cost compute: the client had gone, or the deadline had passed.",
              [(_rate("inference_dropped_requests_total"), _EACH)], units.RequestsPerSecond),
    ):  # fmt: skip
        board.with_panel(panel)
    board.with_row(dashboard.Row("Latency"))
    for panel in (
        lines("Requests, p50 and p99", "From arrival to answer.",
              [(_quantile(0.5, "inference_request_duration_seconds"), f"{_EACH} p50"),
               (_quantile(0.99, "inference_request_duration_seconds"), f"{_EACH} p99")], units.Seconds, exemplars=True),
        lines("Waiting, p50 and p99", "On the engine's side, while none of the request's rows ran.",
              [(_quantile(0.5, "inference_queue_duration_seconds"), f"{_EACH} p50"),
               (_quantile(0.99, "inference_queue_duration_seconds"), f"{_EACH} p99")], units.Seconds),
        lines("Computing, p50 and p99", "The engine's runs that the request was part of.",
              [(_quantile(0.5, "inference_compute_duration_seconds"), f"{_EACH} p50"),
               (_quantile(0.99, "inference_compute_duration_seconds"), f"{_EACH} p99")], units.Seconds),
    ):  # fmt: skip
        board.with_panel(panel)
    buckets = "sum by (le) (rate({}_bucket{{{}}}{}))"
    board.with_panel(
        histogram("Latency", "How many requests a second took how long.",
                  buckets.format("inference_request_duration_seconds", OF_MODEL, RATE), units.Seconds, exemplars=True)
    )  # fmt: skip
    board.with_panel(
        histogram("Batches", "How many batches a second had how many rows.",
                  buckets.format("inference_batch_size", OF_MODEL, RATE), units.Short)
    )  # fmt: skip
    board.with_row(dashboard.Row("Loaded"))
    board.with_panel(
        rows("Models", "Time to load and warm up; operations that run without a kernel of the engine.",
             [(f"max by (instance, model, version) (engine_model_load_seconds{{{OF_MODEL}}})", ""),
              (f"max by (instance, model, version) (engine_fallback_ops{{{OF_MODEL}}})", "")],
             [("Loaded in", units.Seconds), ("Operations without a kernel", units.Short)], height=8)
    )  # fmt: skip
    return board
