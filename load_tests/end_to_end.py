"""Whole models through HTTP beside LitServe and mosec with ONNX Runtime, and against the engine alone.

A photo costs its decoding, which shares the processors with the engine wherever it is done, and which the engine alone
does not do. So photos are held to the engine with the same decoding, and the same model is measured with tensors, which
are held to the engine alone; the ratio of photos to the engine alone is in the table. Servers and baselines take turns,
every other time in reverse order; a ratio is the median of those of the turns, so that a drift of the machine does not
decide. The engine alone gets runs of the very sizes that the server's had in the turn before, of rows as long as those
that are sent: attention takes longer for rows of 5 and 97 tokens than for two of 51. CPU milliseconds a request are the
server's and the client's: on one machine the load costs the server its share. `engine_share_of_cpu` is what the engine
alone takes of them: the ratio that a machine without idle processors would show.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from load_tests import peers
from load_tests.baselines import Alone, Sizes, Turn
from load_tests.http_client import Results, closed_loop
from load_tests.model_cases import ALONE, CASES, DECODING, Case
from load_tests.report import Report
from load_tests.servers import Server, running, tilewave
from load_tests.turns import in_turn, ratio_of_turns
from load_tests.workloads import Make, default_repository

LEAST_OF_ENGINE = 0.9
OURS = "tilewave"
PEERS = {"litserve": peers.litserve, "mosec": peers.mosec}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each turn")
    parser.add_argument("--warm-up", type=float, default=20.0, help="seconds of load before the first turn")
    parser.add_argument("--turns", type=int, default=5, help="of all servers and baselines, one after the other")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """The cases one after the other."""
    report = Report("Models through HTTP", vars(options))
    for name in options.cases:
        _measure(name, CASES[name], options, folder, report)
    return report


class _Served:
    """Turns of a server under load."""

    def __init__(self, server: Server, make: Make, connections: int) -> None:
        self.results = Results()
        self._server, self._make, self._connections = server, make, connections

    def load(self, seconds: float) -> Results:
        """Requests that are not counted."""
        return asyncio.run(closed_loop(self._server.port, self._make, self._connections, seconds))

    def turn(self, seconds: float) -> Turn:
        """Requests that are."""
        server, client = self._server.cpu_seconds(), time.process_time()
        results = self.load(seconds)
        client = time.process_time() - client
        self.results.extend(results)
        return Turn(len(results.latencies), results.seconds, self._server.cpu_seconds() - server, client)


class _Ours(_Served):
    """Our server. `shapes` are the sizes of its runs since the last look, and how many had them."""

    def __init__(self, server: Server, make: Make, connections: int, model: str) -> None:
        super().__init__(server, make, connections)
        self._path = f"/v2/models/{model}/profile"
        self._before: Counter[Sizes] = Counter()
        self.shapes: Counter[Sizes] = Counter()

    def load(self, seconds: float) -> Results:
        """Requests; their batches make the shapes."""
        results = super().load(seconds)
        plans = self._server.document(self._path)["plans"]
        runs = Counter({tuple(plan["sizes"].items()): plan["runs"] for plan in plans})
        self.shapes, self._before = runs - self._before, runs
        return results

    @property
    def batch(self) -> float:
        """Rows of a run on average: the first of its sizes."""
        return sum(sizes[0][1] * runs for sizes, runs in self.shapes.items()) / self.shapes.total()


def _measure(name: str, case: Case, options: argparse.Namespace, folder: Path, report: Report) -> None:
    root = default_repository(folder, case.model)
    with ExitStack() as opened:
        server = opened.enter_context(tilewave(root, folder, *options.server_arguments.split()))
        ours = _Ours(server, case.ours(), options.connections, case.model)
        served: dict[str, _Served] = {OURS: ours}
        for peer, make in case.peers.items():
            started = opened.enter_context(running(PEERS[peer](case.kind, folder, root / case.model)))
            served[peer] = _Served(started, make(), options.connections)
        alone = opened.enter_context(closing(Alone(root / case.model, case.lengths())))
        for one in served.values():  # our engine makes a plan for each shape of a batch it meets
            one.load(options.warm_up)
        contenders: dict[str, Callable[[float], Turn]] = {key: one.turn for key, one in served.items()}
        contenders[ALONE] = lambda seconds: alone.engine_rows(seconds, ours.shapes)
        if case.goal == DECODING:
            contenders[DECODING] = lambda seconds: alone.decoded_photos(seconds, round(ours.batch))
        turns: dict[str, list[Turn]] = {key: [] for key in contenders}
        for key in in_turn(contenders, options.turns):
            turns[key].append(contenders[key](options.seconds))
    _report(name, case, turns, {key: one.results for key, one in served.items()}, ours.batch, report)


def _report(
    name: str,
    case: Case,
    turns: dict[str, list[Turn]],
    results: dict[str, Results],
    batch: float,
    report: Report,
) -> None:
    ratios = {key: ratio_of_turns(turns[OURS], of) for key, of in turns.items() if key != OURS}
    for key, own in turns.items():
        row: dict[str, Any] = {"case": name, "by": key, **totals(own)}
        if key == OURS:
            row |= {"batch": round(batch, 1), "of_engine_alone": round(ratios[ALONE], 3)}
            row["engine_share_of_cpu"] = round(cpu_of_request(turns[ALONE]) / cpu_of_request(own), 3)
            if DECODING in ratios:
                row["of_engine_with_decoding"] = round(ratios[DECODING], 3)
        if key in results:
            row |= {k: value for k, value in results[key].row().items() if k not in row}
        report.add(**row)
    for key, result in results.items():
        wrong = len(result.problems) + result.statuses.total() - result.statuses[200]
        report.check(f"{name}, {key}: every answer is 200 and right", not wrong, wrong)
    for peer in case.peers:
        report.check(f"{name}: throughput above {peer}'s", ratios[peer] > 1, f"{ratios[peer]:.2f} times")
    ratio = ratios[case.goal]
    report.check(f"{name}: at least {LEAST_OF_ENGINE} of the {case.goal}", ratio >= LEAST_OF_ENGINE, f"{ratio:.2f}")


def cpu_of_request(turns: list[Turn]) -> float:
    """CPU seconds of both sides for a request: unlike a rate, hardly touched by what else the machine does."""
    return sum(turn.server_cpu + turn.client_cpu for turn in turns) / sum(turn.requests for turn in turns)


def totals(turns: list[Turn]) -> dict[str, float]:
    """Requests a second and CPU milliseconds a request of all turns together; the client's only where there is one."""
    requests = sum(turn.requests for turn in turns)
    row = {"requests_per_s": round(requests / sum(turn.seconds for turn in turns), 1)}
    for side in ("server_cpu", "client_cpu"):
        seconds: float = sum(getattr(turn, side) for turn in turns)
        if seconds:
            row[f"{side}_ms"] = round(seconds / requests * 1e3, 2)
    return row
