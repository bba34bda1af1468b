"""``python -m engine profile``: time, FLOP/s, bytes/s and roofline fraction of every step."""

from __future__ import annotations

import argparse
import json

from engine.cli.common import add_feed_arguments, feeds, open_model, quantity, table

NAME = "profile"
HELP = "measure every step of a model against what the device allows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_feed_arguments(parser)
    parser.add_argument("--runs", type=int, default=50, help="runs to average over (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def main(arguments: argparse.Namespace) -> int:
    if arguments.runs < 1:
        raise ValueError(f"--runs must be at least 1, not {arguments.runs}")
    with open_model(arguments) as model:
        rows = model.profile(feeds(arguments, model), arguments.runs)
        device = model.device_info
    if arguments.json:
        print(
            json.dumps(
                {
                    "device": vars(device),
                    "steps": [
                        {
                            **vars(row),
                            "flops_per_second": row.flops_per_second,
                            "bytes_per_second": row.bytes_per_second,
                        }
                        for row in rows
                    ],
                },
                indent=1,
            )
        )
        return 0
    lines = [["step", "kernel", "µs", "FLOP/s", "B/s", "cached", "roofline"]]
    lines.extend(
        [
            row.step[-48:],
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
    flops = sum(row.flops for row in rows)
    print(f"\n{total * 1e3:.3f} ms in {len(rows)} steps, {quantity(flops / total if total else 0.0, 'FLOP/s')}")
    print(f"{device.name} ({device.arch}, {device.threads} threads): measured ceilings "
          f"{quantity(device.peak_flops, 'FLOP/s')}, {quantity(device.peak_bytes, 'B/s')} of memory, "
          f"{quantity(device.peak_cache_bytes, 'B/s')} of {device.cache_bytes >> 20} MiB of cache")  # fmt: skip
    return 0
