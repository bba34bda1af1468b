"""Rows of mixed lengths in shared batches give what each gives alone."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from pathlib import Path

import numpy as np

from load_tests.http_client import Answer, Exchange, Results, closed_loop, post
from load_tests.report import Report
from load_tests.servers import tilewave
from load_tests.workloads import default_repository

MODEL = "all-minilm-l6-v2"
TOLERANCE = 1e-5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--longest", type=int, default=256, help="tokens")


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """The same requests one after the other, then many at a time."""
    report = Report("Mixed lengths, batched and alone", vars(options))
    source = random.Random(0)
    rows = [
        [source.randrange(1000, 29000) for _ in range(source.randint(1, options.longest))]
        for _ in range(options.requests)
    ]
    with tilewave(default_repository(folder, MODEL), folder, *options.server_arguments.split()) as server:
        alone, _ = _run(server.port, rows, 1)
        runs = server.metric("inference_batch_size_count", model=MODEL)
        report.check("alone, each row has a run of its own", runs == len(rows), runs)
        batched, results = _run(server.port, rows, options.connections)
        runs = server.metric("inference_batch_size_count", model=MODEL) - runs
    report.add(connections=options.connections, rows_per_run=round(len(rows) / max(runs, 1), 2), **results.row())
    missing = [index for index in range(len(rows)) if index not in alone or index not in batched]
    report.check("every request is answered", not missing, f"{len(missing)} are not")
    worst = max(float(np.abs(alone[i] - batched[i]).max()) for i in range(len(rows)) if i not in missing)
    report.check(f"batched equals alone within {TOLERANCE:g}", worst <= TOLERANCE, f"{worst:.2e}")
    report.check("rows share runs", runs < len(rows), f"{len(rows) / max(runs, 1):.2f} rows a run")
    return report


def _run(port: int, rows: list[list[int]], connections: int) -> tuple[dict[int, np.ndarray], Results]:
    """The vector of each row, by its place."""
    vectors: dict[int, np.ndarray] = {}
    waiting = iter(range(len(rows)))

    def make(_: random.Random) -> Exchange:
        index = next(waiting)

        def keep(answer: Answer) -> str | None:
            vectors[index] = np.array(json.loads(answer.body)["embeddings"][0])
            return None

        return Exchange(post(f"/v1/models/{MODEL}/tokens", json.dumps({"ids": [rows[index]]}).encode()), keep)

    return vectors, asyncio.run(closed_loop(port, make, connections, count=len(rows)))
