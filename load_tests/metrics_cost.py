"""Throughput with metrics against without: what they cost."""

from __future__ import annotations

import argparse
import asyncio
import statistics
from pathlib import Path

from load_tests.http_client import closed_loop
from load_tests.report import Report
from load_tests.servers import tilewave
from load_tests.workloads import identity_binary, identity_repository

MOST_LOSS = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=20, help="of both servers, one after the other")


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """Both servers are up and take turns; the ratio is the median over pairs of turns."""
    report = Report("What metrics cost", vars(options))
    root, arguments = identity_repository(folder), options.server_arguments.split()
    make = identity_binary()
    ratios: list[float] = []
    with (
        tilewave(root, folder, *arguments) as on,
        tilewave(root, folder, *arguments, module="load_tests.unmetered") as off,
    ):
        for server in (on, off):
            asyncio.run(closed_loop(server.port, make, options.connections, options.seconds))
        for turn in range(options.turns):
            order = (on, off) if turn % 2 else (off, on)
            rates = {}
            for server in order:
                results = asyncio.run(closed_loop(server.port, make, options.connections, options.seconds))
                rates[server.port] = results.rate
            ratios.append(rates[on.port] / rates[off.port])
            report.add(
                turn=turn, on=round(rates[on.port], 1), off=round(rates[off.port], 1), ratio=round(ratios[-1], 4)
            )
        counted = on.metric("inference_requests_total", outcome="success")
        uncounted = off.metric("inference_requests_total", outcome="success")
    median = statistics.median(ratios)
    report.check("one counts and the other does not", counted > 0 and uncounted == 0, f"{counted:.0f}, {uncounted:.0f}")
    report.check(f"metrics cost at most {MOST_LOSS:.0%}", median >= 1 - MOST_LOSS, f"{1 - median:.2%}")
    return report
