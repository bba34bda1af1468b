"""The dashboard of the service: is it well, what do users see, how much headroom is left."""

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import units

from deploy.grafana.panels import OF_SERVER, RATE, lines, make, number, rows


def service() -> dashboard.Dashboard:
    """The whole of it."""
    board = make("Service", "tilewave-service", "Requests, latency, errors and headroom.", by_model=False)
    board.with_row(dashboard.Row("Now"))
    _now(board)
    board.with_row(dashboard.Row("What users see"))
    _users(board)
    board.with_row(dashboard.Row("Headroom"))
    _headroom(board)
    return board


def _now(board: dashboard.Dashboard) -> None:
    rate5m = f"job_model_version:inference_requests:rate5m{{{OF_SERVER}}}"
    errors = f"job_model_version:inference_errors:ratio_rate5m{{{OF_SERVER}}}"
    p99 = f"job_model_version:inference_request_duration_seconds:p99_rate5m{{{OF_SERVER}}}"
    panels = [
        number("Servers", "That answer Prometheus.", f"sum(up{{{OF_SERVER}}})", units.Short),
        number("Requests", "Of all models, over five minutes.", f"sum({rate5m})", units.RequestsPerSecond),
        number("Failed", "The server's fault, overload aside; the worst model.", f"max({errors})", units.PercentUnit,
               limits=(0.001, 0.01)),
        number("p99", "The slowest model.", f"max({p99})", units.Seconds),
        number("Engine busy", "Time in kernels, of all time; the busiest server.",
               f"max(job_instance:engine_busy:ratio_rate5m{{{OF_SERVER}}})", units.PercentUnit, limits=(0.7, 0.9)),
        number("Waiting", "Requests that wait for the engine.", f"sum(inference_queue_depth{{{OF_SERVER}}})",
               units.Short),
    ]  # fmt: skip
    for panel in panels:
        board.with_panel(panel)


def _users(board: dashboard.Dashboard) -> None:
    bucket = f"sum by (le) (rate(inference_request_duration_seconds_bucket{{{OF_SERVER}}}{RATE}))"
    parts = [
        (f"sum(rate(inference_{part}_duration_seconds_sum{{{OF_SERVER}}}{RATE})) / "
         f"sum(rate(inference_{part}_duration_seconds_count{{{OF_SERVER}}}{RATE}))", part)
        for part in ("preprocess", "queue", "compute")
    ]  # fmt: skip
    board.with_panel(
        lines("Requests", "By how they ended (docs/metrics.md).",
              [(f"sum by (outcome) (rate(inference_requests_total{{{OF_SERVER}}}{RATE}))", "{{outcome}}")],
              units.RequestsPerSecond, stacked=True)
    )  # fmt: skip
    board.with_panel(
        lines("Latency", "From a request's arrival to its answer, all models; the dots are requests with a trace.",
              [*((f"histogram_quantile({q}, {bucket})", f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)),
               ("tilewave:objective_p99:seconds", "objective for p99")], units.Seconds, exemplars=True)
    )  # fmt: skip
    board.with_panel(
        lines("Where the time goes", "Mean of a request.", parts, units.Seconds, stacked=True)
    )  # fmt: skip
    board.with_panel(
        lines("Failed and refused", "Of each model's requests: the server's errors, and 429 at full queues.",
              [(f"job_model_version:inference_errors:ratio_rate5m{{{OF_SERVER}}}", "{{model}}/{{version}} failed"),
               (f"job_model_version:inference_overloaded:ratio_rate5m{{{OF_SERVER}}}", "{{model}}/{{version}} refused"),
               ("tilewave:objective_errors:ratio", "objective")], units.PercentUnit)
    )  # fmt: skip
    board.with_panel(
        lines("Answers by status", "Every route.",
              [(f"sum by (status) (rate(http_responses_total{{{OF_SERVER}}}{RATE}))", "{{status}}")],
              units.RequestsPerSecond, stacked=True)
    )  # fmt: skip
    board.with_panel(
        rows("Alerts", "Pending and firing.", [('ALERTS{alertname=~"Tilewave.+"}', "")], [("State", "bool_on_off")],
             hidden=("__name__", "job"), span=8, height=8)
    )  # fmt: skip


def _headroom(board: dashboard.Dashboard) -> None:
    board.with_panel(
        lines("Engine busy", "Time in kernels by model, of all time. Beyond the line no headroom is left.",
              [(f"sum by (model, version) (job_instance_model_version:engine_busy:ratio_rate5m{{{OF_SERVER}}}) / "
                f"scalar(count(job_instance:engine_busy:ratio_rate5m{{{OF_SERVER}}}))", "{{model}}/{{version}}")],
              units.PercentUnit, stacked=True, most=1)
    )  # fmt: skip
    board.with_panel(
        lines("Under way", "Requests accepted and not answered; of them those that wait for the engine.",
              [(f"sum by (instance) (inference_inflight{{{OF_SERVER}}})", "{{instance}} in flight"),
               (f"sum by (instance) (inference_queue_depth{{{OF_SERVER}}})", "{{instance}} waiting")], units.Short)
    )  # fmt: skip
    board.with_panel(
        lines("Memory of the engine", "By device and kind.",
              [(f"sum by (instance, device, kind) (engine_device_memory_bytes{{{OF_SERVER}}})",
                "{{instance}} {{device}} {{kind}}")], units.BytesIEC, stacked=True)
    )  # fmt: skip
    board.with_panel(
        lines("CPU of the HTTP processes", "Cores in use; with the engine where it runs in the same process.",
              [(f"rate(process_cpu_seconds_total{{{OF_SERVER}}}{RATE})", "{{instance}}")], units.Short)
    )  # fmt: skip
    board.with_panel(
        lines("Resident memory of the HTTP processes", "Of the operating system.",
              [(f"process_resident_memory_bytes{{{OF_SERVER}}}", "{{instance}}")], units.BytesIEC)
    )  # fmt: skip
    board.with_panel(
        lines("Restarts of the engine process", "Within an hour.",
              [(f"increase(engine_process_restarts_total{{{OF_SERVER}}}[1h])", "{{instance}}")], units.Short)
    )  # fmt: skip
