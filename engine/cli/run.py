"""``python -m engine run``: run a model once and show, or save, its outputs."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from engine.cli.common import add_feed_arguments, feeds, open_model, shape_text

NAME = "run"
HELP = "run a model once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_feed_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="save every output as FOLDER/NAME.npy")


def main(arguments: argparse.Namespace) -> int:
    with open_model(arguments) as model:
        outputs = model.run(feeds(arguments, model))
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
    for name, array in outputs.items():
        head = np.array2string(array.reshape(-1)[:6], precision=5, separator=", ")
        print(f"{name}: {array.dtype}{shape_text(array.shape)} {head[:-1]}{', …' if array.size > 6 else ''}]")
        if arguments.output is not None:
            np.save(
                arguments.output / f"{name.replace('/', '_')}.npy",
                array.astype(str) if array.dtype == object else array,
            )
    return 0
