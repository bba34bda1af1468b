"""A model that is loaded and unloaded again and again, every tenth time a broken one: what stays of it."""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from pathlib import Path

from load_tests.report import Report
from load_tests.servers import Server, tilewave
from load_tests.workloads import default_repository

MODEL = "all-minilm-l6-v2"
MOST_MB = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=20, help="cycles before the first look at the memory")
    parser.add_argument("--broken-every", type=int, default=10)


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """Load, one request, unload."""
    report = Report("Load and unload", vars(options))
    root = default_repository(folder, MODEL)
    file = root / MODEL / "1" / "model.onnx"
    good = file.read_bytes()
    broken = good[: len(good) // 2]
    failures: list[str] = []

    def cycle(server: Server, number: int) -> None:
        is_broken = number % options.broken_every == options.broken_every - 1
        file.write_bytes(broken if is_broken else good)
        status, text = ask(server, f"/v2/repository/models/{MODEL}/load", {})
        if status != (400 if is_broken else 200):
            failures.append(f"load {number}: {status} {text}")
        if not is_broken:
            status, text = ask(server, f"/v1/models/{MODEL}/tokens", {"text": "A man is eating food."})
            if status != 200:
                failures.append(f"request {number}: {status} {text}")
        status, text = ask(server, f"/v2/repository/models/{MODEL}/unload", {})
        if status != 200:
            failures.append(f"unload {number}: {status} {text}")

    with tilewave(root, folder, *options.server_arguments.split()) as server:
        for number in range(options.warm_up):
            cycle(server, number)
        memory, files = [server.memory_mb()], server.open_files()
        report.add(cycles=0, memory_mb=round(memory[0], 1), rss_mb=round(server.rss_mb(), 1), files=files)
        for number in range(options.cycles):
            cycle(server, number)
            if (number + 1) % max(options.cycles // 10, 1) == 0:
                memory.append(server.memory_mb())
                rss = round(server.rss_mb(), 1)
                report.add(cycles=number + 1, memory_mb=round(memory[-1], 1), rss_mb=rss, files=server.open_files())
        grown = memory[-1] - memory[0]
        report.check(f"memory is back within {MOST_MB:g} MB", grown <= MOST_MB, f"{grown:.1f} MB")
        report.check("files are back", server.open_files() <= files, f"{files} → {server.open_files()}")
        report.check("every call does what it should", not failures, failures[:3])
    return report


def ask(server: Server, path: str, document: object) -> tuple[int, str]:
    """Status and text of a POST."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}", json.dumps(document).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read(300).decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read(300).decode(errors="replace")
