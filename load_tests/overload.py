"""Twice the load that the server can carry: what is refused, and how long the rest takes."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from load_tests.http_client import GIVEN_UP, HUNG, REFUSED, closed_loop, open_loop
from load_tests.report import Report
from load_tests.servers import tilewave
from load_tests.workloads import default_repository, texts

MODEL = "all-minilm-l6-v2"
ALLOWED = {200, 429, 503, 504}
_QUEUED_BATCHES, _MAX_TOKENS = 16, 1024  # the service's defaults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--times", type=float, default=2.0, help="the capacity")
    parser.add_argument("--connections", type=int, default=64, help="for finding the capacity")
    parser.add_argument("--capacity-seconds", type=float, default=15.0)


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """Closed loop for the capacity, then an open loop."""
    report = Report("Overload", vars(options))
    make = texts(f"/v1/models/{MODEL}/tokens", "text")
    with tilewave(default_repository(folder, MODEL), folder, *options.server_arguments.split()) as server:
        capacity = asyncio.run(closed_loop(server.port, make, options.connections, options.capacity_seconds))
        tokens = server.metric("inference_batch_tokens_sum", model=MODEL)
        mean = tokens / max(server.metric("inference_batch_size_sum", model=MODEL), 1)
        report.add(load="closed loop", offered_per_s=round(capacity.rate, 1), **capacity.row())
        rate = options.times * capacity.rate
        results = asyncio.run(open_loop(server.port, make, rate, options.seconds))
        report.add(load=f"{options.times:g} times", offered_per_s=round(rate, 1), **results.row())
        after = asyncio.run(closed_loop(server.port, make, options.connections, min(options.seconds, 5.0)))
        report.add(load="closed loop after it", offered_per_s=round(after.rate, 1), **after.row())
        left = server.metric("inference_inflight", model=MODEL)
    report.check("only 200, 429, 503, 504", set(results.statuses) <= ALLOWED, dict(results.statuses))
    names = {HUNG: "no answer in 60 s", GIVEN_UP: "connection ended", REFUSED: "connection refused"}
    unanswered = {name: results.statuses[status] for status, name in names.items()}
    report.check("every request is answered", not any(unanswered.values()) and left == 0, unanswered)
    report.check("no connection ends under a request", results.second_tries == 0, results.second_tries)
    report.check("answers are right", not results.problems, results.problems[:3])
    bound = 2 * (_QUEUED_BATCHES + 2) * _MAX_TOKENS / (mean * capacity.rate)
    p99 = results.percentile(99)
    report.check(
        "p99 of the accepted is at most twice what a full queue takes", p99 <= bound, f"{p99:.2f} of {bound:.2f} s"
    )
    share = results.rate / capacity.rate
    report.check("the server still does what it can", share >= 0.7, f"{share:.2f} of its capacity")
    return report
