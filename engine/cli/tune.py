"""``python -m engine tune``: the products and convolutions of a model timed in several tiles on the device, or what the
cost models say of them."""

from __future__ import annotations

import argparse
import math

from engine.cli.common import open_model, sizes, step_text, table

NAME = "tune"
HELP = "time the tiles of a model's products and convolutions on the GPU and keep the fastest, or explain the choice"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--explain", action="store_true", help="time nothing: show what the cost model estimates")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin to time nothing later than this (default: no limit)"
    )


def main(arguments: argparse.Namespace) -> int:
    with open_model(arguments) as model:
        rows = [["", "step", "product or convolution", "tile", "estimate µs", "bound by", "measured µs"]]
        before = ""
        for trial in model.tune(sizes(arguments, model), timed=not arguments.explain, seconds=arguments.seconds):
            first = trial.product != before
            before = trial.product
            measured = "" if trial.measured_us is None else f"{trial.measured_us:.2f}"
            rows.append(
                [
                    "*" if trial.chosen else "", step_text(trial.step, 40) if first else "",
                    trial.product if first else "", trial.tile, f"{trial.estimate_us:.2f}", trial.bound, measured,
                ]
            )  # fmt: skip
        print(table(rows, frozenset({4, 6})))
        print(
            "\n* taken by models that are loaded from now on"
            if len(rows) > 1
            else "nothing to choose: no products or convolutions on matrix units"
        )
    return 0
