"""``python -m engine profile``: time, FLOP/s, bytes/s and roofline fraction of every step; as table, JSON or trace."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import engine
from engine.cli.common import add_feed_arguments, feeds, open_model, quantity, step_text, table
from engine.cli.trace import chrome_trace

NAME = "profile"
HELP = "measure every step of a model against what the device allows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_feed_arguments(parser)
    parser.add_argument("--runs", type=int, default=50, help="runs to average over (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write the mean run as a trace for Perfetto or chrome://tracing, too"
    )


def main(arguments: argparse.Namespace) -> int:
    if arguments.runs < 1:
        raise ValueError(f"--runs must be at least 1, not {arguments.runs}")
    with open_model(arguments) as model:
        arrays = feeds(arguments, model)
        rows = model.profile(arrays, arguments.runs)
        run_seconds = _run_seconds(model, arrays, arguments.runs)
        sizes = model.plan_profiles()[-1].sizes
        device = model.device_info
    if arguments.trace is not None:
        title = f"{arguments.model}, {_sizes(sizes)}"
        arguments.trace.write_text(json.dumps(chrome_trace(title, device, rows, run_seconds)))
    if arguments.json:
        print(json.dumps(_document(device, sizes, rows, run_seconds), indent=1))
    else:
        _print(device, sizes, rows, run_seconds)
    return 0


def _run_seconds(model: engine.Model, arrays: Mapping[str, np.ndarray], runs: int) -> float:
    """How long a run takes as its caller sees it, on average: steps, copies and what the engine does around them."""
    started = time.perf_counter()
    for _ in range(runs):
        model.run(arrays)
    return (time.perf_counter() - started) / runs


def _document(
    device: engine.DeviceInfo, sizes: Mapping[str, int], rows: Sequence[engine.ProfileRow], run_seconds: float
) -> dict[str, Any]:
    """The fields of the service's ``/v2/models/{model}/profile``."""
    steps = [
        {**vars(row), "flops_per_second": row.flops_per_second, "bytes_per_second": row.bytes_per_second}
        for row in rows
    ]
    return {"device": vars(device), "sizes": dict(sizes), "run_seconds": run_seconds, "steps": steps}


def _print(
    device: engine.DeviceInfo, sizes: Mapping[str, int], rows: Sequence[engine.ProfileRow], run_seconds: float
) -> None:
    lines = [["step", "kernel", "µs", "FLOP/s", "B/s", "cached", "roofline"]]
    lines.extend(
        [
            step_text(row.step),
            row.kernel,
            f"{row.seconds * 1e6:.1f}",
            quantity(row.flops_per_second, ""),
            quantity(row.bytes_per_second, ""),
            f"{row.cached_bytes / row.bytes:.0%}" if row.bytes else "–",
            f"{row.roofline:.0%}",
        ]
        for row in rows
    )
    print(table(lines, frozenset({2, 3, 4, 5, 6})))
    total = sum(row.seconds for row in rows)
    print(f"\n{_by_kernel(rows, total)}")
    flops = sum(row.flops for row in rows)
    print(
        f"\n{total * 1e3:.3f} ms in {len(rows)} steps, {quantity(flops / total if total else 0.0, 'FLOP/s')}; "
        f"{run_seconds * 1e3:.3f} ms from call to return ({_sizes(sizes)})"
    )
    threads = f", {device.threads} threads" if device.threads else ""  # a GPU has none to count
    print(f"{device.name} ({device.arch}{threads}): measured ceilings "
          f"{quantity(device.peak_flops, 'FLOP/s')}, {quantity(device.peak_bytes, 'B/s')} of memory, "
          f"{quantity(device.peak_cache_bytes, 'B/s')} of {device.cache_bytes >> 20} MiB of cache")  # fmt: skip


def _by_kernel(rows: Sequence[engine.ProfileRow], total: float) -> str:
    """Kernel and operator as the metrics have them, the one with the most time first."""
    steps: Counter[tuple[str, str]] = Counter((row.kernel, row.op) for row in rows)
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    least: defaultdict[tuple[str, str], float] = defaultdict(float)
    for row in rows:
        seconds[row.kernel, row.op] += row.seconds
        least[row.kernel, row.op] += row.seconds * row.roofline
    lines = [["kernel", "op", "steps", "µs", "share", "roofline"]]
    for key in sorted(seconds, key=lambda key: -seconds[key]):
        share = f"{seconds[key] / total:.0%}" if total else "–"
        fraction = f"{least[key] / seconds[key]:.0%}" if seconds[key] else "–"
        lines.append([*key, str(steps[key]), f"{seconds[key] * 1e6:.1f}", share, fraction])
    return table(lines, frozenset({2, 3, 4, 5}))


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "fixed sizes"
