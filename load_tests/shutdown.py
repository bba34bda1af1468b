"""SIGTERM under load: everything accepted is answered."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from collections import Counter
from pathlib import Path

from load_tests.http_client import GIVEN_UP, HUNG, REFUSED, closed_loop
from load_tests.report import Report
from load_tests.servers import Server, tilewave
from load_tests.workloads import default_repository, texts

MODEL = "all-minilm-l6-v2"
PATH = f"/v1/models/{MODEL}/tokens"
MOST_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0, help="of load before the signal")
    parser.add_argument("--times", type=int, default=5)


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """What the server's access log says it answered must have reached the clients."""
    report = Report("SIGTERM under load", vars(options))
    make = texts(PATH, "text")
    root = default_repository(folder, MODEL)
    for turn in range(options.times):
        arguments = ("--access-log", "--log-format", "json", *options.server_arguments.split())
        with tilewave(root, folder, *arguments) as server:
            found: dict[str, float] = {}

            async def terminate(server: Server = server, found: dict[str, float] = found) -> None:
                await asyncio.sleep(options.seconds)
                began = time.monotonic()
                server.signal(signal.SIGTERM)
                found["exit"] = await asyncio.get_running_loop().run_in_executor(None, server.wait, 2 * MOST_S)
                found["seconds"] = time.monotonic() - began

            results = asyncio.run(closed_loop(server.port, make, options.connections, meanwhile=terminate))
            said = _logged(server.log)
        unanswered = (GIVEN_UP, HUNG, REFUSED)
        answered = {status: count for status, count in results.statuses.items() if status not in unanswered}
        lost = {status: said[status] - answered.get(status, 0) for status in said}
        report.add(turn=turn, seconds=round(found["seconds"], 2), **results.row())
        report.check(f"{turn}: every accepted request got its answer", not any(lost.values()), lost)
        report.check(f"{turn}: no kept connection ends under a request", not results.second_tries, results.second_tries)
        report.check(f"{turn}: nothing but 200 and 503", set(answered) <= {200, 503}, sorted(answered))
        report.check(f"{turn}: exit status 0 in {MOST_S:g} s", found["exit"] == 0 and found["seconds"] <= MOST_S, found)
        report.check(f"{turn}: answers are right", not results.problems, results.problems[:3])
    return report


def _logged(log: Path) -> Counter[int]:
    """Statuses of the requests that the server says it had."""
    statuses: Counter[int] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        if '"service.access"' in line and PATH in line:
            statuses[int(json.loads(line)["message"].split()[2])] += 1
    return statuses
