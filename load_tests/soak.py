"""Many requests of every kind: what memory and files the server has more at the end."""

from __future__ import annotations

import argparse
import asyncio
import random
from pathlib import Path

from load_tests.http_client import Exchange, closed_loop, get, post
from load_tests.report import Report
from load_tests.servers import tilewave
from load_tests.workloads import identity_binary, identity_json, identity_repository

MOST_MB = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--requests", type=int, default=300_000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--warm-up", type=int, default=20_000, help="requests before the first look at the memory")
    parser.add_argument("--looks", type=int, default=10)


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """JSON and binary requests, errors, scrapes."""
    report = Report("Soak", vars(options))
    kinds = (identity_json(), identity_binary())
    bad = Exchange(post("/v2/models/identity/infer", b'{"inputs": [{"name": "nobody"}]}'), lambda _: None)
    scrape = Exchange(get("/metrics"), lambda _: None)
    unknown = Exchange(get("/v2/models/nobody"), lambda _: None)

    def make(source: random.Random) -> Exchange:
        draw = source.random()
        if draw < 0.9:
            return source.choice(kinds)(source)
        return scrape if draw < 0.9005 else bad if draw < 0.95 else unknown

    with tilewave(identity_repository(folder), folder, *options.server_arguments.split()) as server:
        asyncio.run(closed_loop(server.port, make, options.connections, count=options.warm_up))
        memory, files = [server.memory_mb()], server.open_files()
        report.add(requests=0, memory_mb=round(memory[0], 1), rss_mb=round(server.rss_mb(), 1), files=files)
        wrong, statuses = 0, set()
        for look in range(options.looks):
            results = asyncio.run(
                closed_loop(server.port, make, options.connections, count=options.requests // options.looks)
            )
            wrong += len(results.problems)
            statuses |= set(results.statuses)
            done = (look + 1) * (options.requests // options.looks)
            memory.append(server.memory_mb())
            rss = round(server.rss_mb(), 1)
            report.add(requests=done, memory_mb=round(memory[-1], 1), rss_mb=rss, files=server.open_files())
        grown = memory[-1] - min(memory)  # what loading leaves is given back some time later, and would hide a growth
        report.check(f"memory grows by at most {MOST_MB:g} MB over its lowest", grown <= MOST_MB, f"{grown:.1f} MB")
        report.check("no file is left open", server.open_files() <= files + 2, f"{files} → {server.open_files()}")
        report.check("only 200, 400 and 404", statuses <= {200, 400, 404}, sorted(statuses))
        report.check("every answer is right", wrong == 0, wrong)
    return report
