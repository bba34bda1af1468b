"""`kill -9` of the engine's process under load: how long until it serves again, and no wrong answer."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from pathlib import Path

from load_tests.http_client import closed_loop, post
from load_tests.payloads import SENTENCES
from load_tests.report import Report
from load_tests.servers import tilewave
from load_tests.workloads import default_repository, same_vectors, vector_alone

MODEL = "all-minilm-l6-v2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of load before each kill")


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """Every vector is compared with that of a quiet server."""
    report = Report("kill -9 of the engine process under load", vars(options))
    requests = [post(f"/v1/models/{MODEL}/tokens", json.dumps({"text": text}).encode()) for text in SENTENCES]
    arguments = ("--engine-process", "always", *options.server_arguments.split())
    with tilewave(default_repository(folder, MODEL), folder, *arguments) as server:
        expected = [asyncio.run(vector_alone(server.port, request)) for request in requests]
        recoveries: list[float] = []

        async def kill() -> None:
            for _ in range(options.kills):
                await asyncio.sleep(options.seconds)
                restarts = await asyncio.to_thread(server.metric, "engine_process_restarts_total")
                os.kill(server.engine_process(), signal.SIGKILL)
                began = time.monotonic()
                while await asyncio.to_thread(server.metric, "engine_process_restarts_total") == restarts:
                    await asyncio.sleep(0.01)  # it may say that it is ready until it has noticed
                while not await asyncio.to_thread(server.is_ready):
                    await asyncio.sleep(0.02)
                recoveries.append(time.monotonic() - began)

        make = same_vectors(requests, expected)
        results = asyncio.run(closed_loop(server.port, make, options.connections, meanwhile=kill))
        restarts = server.metric("engine_process_restarts_total")
    for number, seconds in enumerate(recoveries):
        report.add(kill=number, seconds_to_healthy=round(seconds, 2))
    report.add(**results.row())
    report.check("it serves again after each kill", len(recoveries) == options.kills, restarts)
    report.check("no wrong answer", not results.problems, results.problems[:3])
    report.check("nothing but 200 and 503", set(results.statuses) <= {200, 503}, dict(results.statuses))
    return report
