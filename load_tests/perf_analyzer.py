"""The public `perf_analyzer` sweeps concurrencies against the unmodified protocol."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
from pathlib import Path

from load_tests import peers
from load_tests.report import Report
from load_tests.servers import tilewave
from load_tests.workloads import IDENTITY, identity_repository


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--concurrencies", default="1:16:5", help="first:last:step")
    parser.add_argument("--interval-ms", type=int, default=2000)
    parser.add_argument("--shared-memory", action="store_true", help="tensors through system shared memory, too")


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """Both forms of tensors the tool knows over HTTP, and shared memory where asked for."""
    report = Report("perf_analyzer", vars(options))
    tool, environment = peers.perf_analyzer()
    arguments = [*options.server_arguments.split(), "--shared-memory-prefixes", "/input,/output"]
    forms: dict[str, list[str]] = {
        "binary": [],
        "JSON": ["--input-tensor-format", "json", "--output-tensor-format", "json"],
    }
    if options.shared_memory:
        forms["shared memory"] = ["--shared-memory", "system", "--output-shared-memory-size", "4096"]
    first, last, step = map(int, options.concurrencies.split(":"))
    with tilewave(identity_repository(folder), folder, *arguments) as server:
        for form, further in forms.items():
            table = folder / f"perf-{form.replace(' ', '-')}.csv"
            command = [
                str(tool), "-m", IDENTITY, "-u", f"127.0.0.1:{server.port}", "-i", "http", "-f", str(table),
                "--concurrency-range", options.concurrencies, "-p", str(options.interval_ms),
                "--stability-percentage", "50", "--max-threads", "16", *further,
            ]  # fmt: skip
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=1800, env={**os.environ, **environment}
            )
            rows = list(csv.DictReader(table.open())) if table.exists() else []
            for row in rows:
                report.add(
                    form=form,
                    concurrency=int(row["Concurrency"]),
                    requests_per_s=float(row["Inferences/Second"]),
                    p99_us=float(row.get("p99 latency") or "nan"),
                    server_queue_us=float(row.get("Server Queue") or "nan"),
                )
            expected = len(range(first, last + 1, step))
            complete = ended.returncode == 0 and len(rows) == expected
            found = f"exit status {ended.returncode}, {len(rows)} of {expected} rows"
            report.check(
                f"{form}: the sweep is complete",
                complete,
                found if complete else f"{found}: {ended.stdout[-500:]} {ended.stderr[-500:]}",
            )
    return report
