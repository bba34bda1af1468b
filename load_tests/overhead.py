"""What the service costs without a model: requests/s and latencies of an identity, beside LitServe, mosec and a bare
route that echoes the body."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import ExitStack
from operator import methodcaller
from pathlib import Path

from load_tests import peers
from load_tests.http_client import Results, closed_loop
from load_tests.report import Report
from load_tests.servers import Server, running, tilewave
from load_tests.turns import in_turn, ratio_of_turns
from load_tests.workloads import (
    Make,
    echo,
    identity_binary,
    identity_json,
    identity_repository,
    peer_base64,
    peer_binary,
    peer_json,
)

Cases = dict[tuple[str, str], tuple[Server, Make]]
"""By server and form of the tensor: who is asked, and what."""

MOST_RATIO = 1.3
"""p50 and p99 against those of the bare route."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=3, help="of all servers, one after the other; medians count")
    parser.add_argument(
        "--peers", nargs="*", default=["echo", "litserve", "mosec"], choices=["echo", "litserve", "mosec"]
    )


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """All servers are up at once and take turns, so that what else the machine does hits all of them."""
    report = Report("Overhead without a model", vars(options))
    with ExitStack() as opened:
        ours = opened.enter_context(tilewave(identity_repository(folder), folder, *options.server_arguments.split()))
        cases: Cases = {
            ("tilewave", "JSON"): (ours, identity_json()),
            ("tilewave", "binary"): (ours, identity_binary()),
        }
        if "echo" in options.peers:
            server = opened.enter_context(running(peers.echo(folder)))
            for form, body in (("JSON", identity_json), ("binary", identity_binary)):
                request = body()(None).request  # type: ignore[arg-type]
                cases["bare echo", form] = (server, echo(request.partition(b"\r\n\r\n")[2]))
        if "litserve" in options.peers:
            server = opened.enter_context(running(peers.litserve("identity", folder)))
            cases["litserve", "JSON"] = (server, peer_json("/predict"))
            cases["litserve", "binary"] = (server, peer_base64("/predict"))
        if "mosec" in options.peers:
            for form, kind, make in (("JSON", "json", peer_json), ("binary", "binary", peer_binary)):
                server = opened.enter_context(running(peers.mosec(kind, folder)))
                cases["mosec", form] = (server, make("/inference"))
        for connections in options.connections:
            turns = _turns(cases, connections, options.seconds, options.turns)
            for (name, form), own in turns.items():
                total, cpu = Results(), 0.0
                for results, used in own:
                    total.extend(results)
                    cpu += used
                of_request = round(cpu / max(total.statuses.total(), 1) * 1e6)
                report.add(server=name, form=form, connections=connections, cpu_us=of_request, **total.row())
            _judge(report, {case: [results for results, _ in own] for case, own in turns.items()}, connections)
    return report


def _turns(
    cases: Cases, connections: int, seconds: float, turns: int
) -> dict[tuple[str, str], list[tuple[Results, float]]]:
    """Every turn of each case, with the CPU seconds of its server."""
    done: dict[tuple[str, str], list[tuple[Results, float]]] = {case: [] for case in cases}
    for case in in_turn(cases, turns):
        server, make = cases[case]
        before = server.cpu_seconds()
        results = asyncio.run(closed_loop(server.port, make, connections, seconds))
        done[case].append((results, server.cpu_seconds() - before))
    return done


def _judge(report: Report, turns: dict[tuple[str, str], list[Results]], connections: int) -> None:
    every = [results for own in turns.values() for results in own]
    wrong = sum(len(results.problems) for results in every)
    failed = sum(results.statuses.total() - results.statuses[200] for results in every)
    report.check(f"{connections} connections: every answer is 200 and right", wrong + failed == 0, wrong + failed)
    for form in ("JSON", "binary"):
        ours = turns["tilewave", form]
        if ("litserve", form) in turns:
            ratio = ratio_of_turns(ours, turns["litserve", form])
            report.check(f"{connections} connections, {form}: ahead of LitServe", ratio > 1, f"{ratio:.2f} times")
        if ("bare echo", form) in turns:
            for percent in (50, 99):
                ratio = ratio_of_turns(ours, turns["bare echo", form], methodcaller("percentile", percent))
                what = f"{connections} connections, {form}: p{percent} at most {MOST_RATIO} times the bare echo's"
                report.check(what, ratio <= MOST_RATIO, f"{ratio:.2f} times")
