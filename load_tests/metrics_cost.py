"""Requests a CPU second with metrics against without: what they cost."""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import signal
import statistics
import time
from pathlib import Path

from load_tests.http_client import closed_loop
from load_tests.report import Report
from load_tests.servers import Server, tilewave
from load_tests.workloads import identity_binary, identity_repository

MOST_LOSS = 0.01
CLOSE = 0.003
"""Half of the confidence interval at which the loss is known well enough."""
_FEWEST_PAIRS, _SCRAPE_EVERY_S, _SCRAPES = 15, 15.0, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2000, help="of each turn")
    parser.add_argument("--pairs", type=int, default=400, help="of turns with and without, at most")
    parser.add_argument("--seconds", type=float, default=400.0, help="of all turns, at most")
    parser.add_argument(
        "--statistics",
        action="store_true",
        help="without metrics the statistics of the protocol are not counted either, for which the same rows are kept",
    )


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """One server counts in one turn and not in the next. Compared is its CPU time a request, which other work on the
    machine hardly changes; the loss is the median over pairs of turns, its interval one of 95 % by the bootstrap."""
    report = Report("What metrics cost", vars(options))
    arguments = options.server_arguments.split()
    toggle = signal.SIGUSR2 if options.statistics else signal.SIGUSR1
    with tilewave(identity_repository(folder), folder, *arguments, module="load_tests.unmetered") as server:
        _turn(server, options)
        _counted(server)  # every metric has been used now, every cache filled
        losses: list[float] = []
        spent: dict[bool, list[float]] = {True: [], False: []}
        counting = True
        low = high = math.nan
        end = time.monotonic() + options.seconds
        for pair in range(options.pairs):
            if time.monotonic() > end:
                break
            turns = {}
            for counts in (True, False) if pair % 2 == 0 else (False, True):
                if counts != counting:
                    server.signal(toggle)
                    counting = counts
                before = _counted(server)
                turns[counts] = _turn(server, options)
                counted = _counted(server) - before
                if counted != (options.requests if counts else 0):
                    raise RuntimeError(
                        f"{counted:.0f} requests were counted in a turn {'with' if counts else 'without'}"
                    )
                spent[counts].append(turns[counts])
            losses.append(1 - turns[False] / turns[True])
            if len(losses) >= _FEWEST_PAIRS:
                low, high = _interval(losses)
                if (high - low) / 2 <= CLOSE:
                    break
        if not counting:
            server.signal(toggle)
        scrape = _scrape(server)
    loss = statistics.median(losses)
    on, off = (statistics.median(spent[counts]) for counts in (True, False))
    report.add(
        off="metrics and statistics" if options.statistics else "metrics",
        pairs=len(losses),
        cpu_us_a_request_on=round(on * 1e6, 1),
        cpu_us_a_request_off=round(off * 1e6, 1),
        loss=f"{loss:.2%}",
        interval=f"{low:.2%} to {high:.2%}",
        cpu_ms_a_scrape=round(scrape * 1e3, 2),
    )
    report.check(f"the loss is known within {CLOSE:.1%}", (high - low) / 2 <= CLOSE, f"{low:.2%} to {high:.2%}")
    share = scrape / _SCRAPE_EVERY_S
    report.check(
        f"metrics cost at most {MOST_LOSS:.0%}, a scrape every {_SCRAPE_EVERY_S:g} s included",
        loss + share <= MOST_LOSS,
        f"{loss:.2%} + {share:.2%}",
    )
    return report


def _turn(server: Server, options: argparse.Namespace) -> float:
    """The server's CPU seconds a request."""
    before = server.cpu_seconds()
    results = asyncio.run(closed_loop(server.port, identity_binary(), options.connections, count=options.requests))
    spent = server.cpu_seconds() - before
    if results.statuses != {200: options.requests} or results.problems:
        raise RuntimeError(f"answers that are not right: {dict(results.statuses)}, {results.problems[:3]}")
    return float(spent / options.requests)


def _counted(server: Server) -> float:
    return server.metric("inference_requests_total", outcome="success")


def _scrape(server: Server) -> float:
    """The server's CPU seconds for one scrape."""
    before = server.cpu_seconds()
    for _ in range(_SCRAPES):
        _counted(server)
    return (server.cpu_seconds() - before) / _SCRAPES


def _interval(values: list[float]) -> tuple[float, float]:
    """Between which the median lies in 95 % of resamples."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(values, k=len(values))) for _ in range(1000))
    return medians[25], medians[974]
