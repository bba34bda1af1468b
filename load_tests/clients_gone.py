"""Clients that are killed while their requests wait: their work is dropped, and nobody else notices."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import struct
import time
from pathlib import Path

from load_tests.http_client import closed_loop, post
from load_tests.report import Report
from load_tests.servers import Server, tilewave
from load_tests.workloads import default_repository, same_vectors, vector_alone

MODEL = "all-minilm-l6-v2"
PATH = f"/v1/models/{MODEL}/tokens"
_SETTLE_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=24, help="clients that wait to be killed")
    parser.add_argument("--survivors", type=int, default=8, help="clients that are not killed")
    parser.add_argument("--tokens", type=int, default=250, help="of each request")
    parser.add_argument("--patience", type=float, default=1.0, help="a client is killed within so many seconds")


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """Killed clients beside others, whose vectors must be those of a quiet server."""
    report = Report("Clients killed in flight", vars(options))
    source = random.Random(0)
    rows = [[source.randrange(1000, 29000) for _ in range(options.tokens)] for _ in range(16)]
    requests = [post(PATH, json.dumps({"ids": [row]}).encode()) for row in rows]
    with tilewave(default_repository(folder, MODEL), folder, *options.server_arguments.split()) as server:
        expected = [asyncio.run(vector_alone(server.port, request)) for request in requests]
        before = _counts(server)
        killed, answered = 0, 0

        async def killer() -> None:
            nonlocal killed, answered
            left = options.kills

            async def victims(seed: int) -> None:
                nonlocal left, killed, answered
                draw = random.Random(seed)
                while left > 0:
                    left -= 1
                    seconds = draw.uniform(0, options.patience)
                    if await _kill(server.port, draw.choice(requests), seconds):
                        killed += 1
                    else:
                        answered += 1
                        left += 1

            await asyncio.gather(*(victims(seed) for seed in range(options.at_once)))

        make = same_vectors(requests, expected)
        results = asyncio.run(closed_loop(server.port, make, options.survivors, meanwhile=killer))
        end = time.monotonic() + _SETTLE_S
        while server.metric("inference_inflight", model=MODEL) and time.monotonic() < end:
            time.sleep(0.1)
        after = _counts(server)
        got = {name: after[name] - before[name] for name in after}
    report.add(killed=killed, answered_before=answered, **results.row(), **got)
    computed_for_nobody = got["cancelled"] - got["dropped"]
    report.check(f"{options.kills} clients were killed", killed == options.kills, killed)
    report.check(
        "each killed client is a cancelled request, or one that was answered or refused just before",
        0 <= killed - got["cancelled"] <= got["success"] + got["overloaded"] - answered,
        f"{got['cancelled']} cancelled",
    )
    report.check(
        "what was queued when its client went was never computed: rows run = answers + those running then",
        got["rows"] == got["success"] + computed_for_nobody,
        f"{got['rows']} = {got['success']} + {computed_for_nobody}",
    )
    report.check("work was dropped", got["dropped"] > 0, got["dropped"])
    report.check("nothing is in flight at the end", after["inflight"] == 0, after["inflight"])
    wrong = len(results.problems) + sum(count for status, count in results.statuses.items() if status not in (200, 429))
    report.check(
        "the others' answers are right", wrong == 0 and results.statuses[200] > 0, results.problems[:3] or wrong
    )
    return report


def _counts(server: Server) -> dict[str, float]:
    outcomes = ("success", "cancelled", "overloaded")
    counts = {outcome: server.metric("inference_requests_total", model=MODEL, outcome=outcome) for outcome in outcomes}
    counts["dropped"] = server.metric("inference_dropped_requests_total", model=MODEL)
    counts["rows"] = server.metric("inference_batch_size_sum", model=MODEL)
    counts["inflight"] = server.metric("inference_inflight", model=MODEL)
    return counts


async def _kill(port: int, request: bytes, seconds: float) -> bool:
    """Send a request and vanish; whether the answer had not come by then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        async with asyncio.timeout(seconds):
            await reader.readuntil(b"\r\n\r\n")
            return False
    except TimeoutError:
        return True
    except (asyncio.IncompleteReadError, OSError):
        return False
    finally:
        # No linger: the system sends a reset, as it does for a process that was killed with data unread.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
