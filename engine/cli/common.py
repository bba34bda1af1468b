"""What the commands share: opening the model, the sizes asked for, input files, and number formats."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import engine


def open_model(arguments: argparse.Namespace) -> engine.Model:
    """The model named on the command line, loaded as the options say."""
    return engine.load(
        arguments.model,
        device=arguments.device,
        precision=arguments.precision,
        strict=arguments.strict,
        threads=arguments.threads,
        packed=arguments.packed,
    )


def sizes(arguments: argparse.Namespace, model: engine.Model, packed: bool = False) -> dict[str, int]:
    """The size of every symbol: what ``--size`` says, else 1; where `packed`, that of packed tokens too, if it is said.
    Raises ValueError for a malformed or unknown one."""
    names = dict.fromkeys(dim for spec in model.inputs for dim in spec.shape if isinstance(dim, str))
    result = dict.fromkeys(names, 1)
    extra = model.packed_size if packed else None
    for item in arguments.size:
        name, separator, number = item.partition("=")
        if not separator or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"--size {item}: write NAME=N with N at least 1")
        if name not in result and name != extra:
            raise ValueError(f"--size {item}: the model has no size {name!r}; it has {', '.join(result) or 'none'}")
        result[name] = int(number)
    return result


def add_feed_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", action="append", default=[], metavar="NAME=FILE.npy", help="an input (default: random data)"
    )
    parser.add_argument("--seed", type=_natural, default=0, help="seed of the random inputs (default: %(default)s)")


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 0")
    return int(text)


def bound(text: str) -> float:
    """The type of an option that bounds an error: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number of at least 0")
    return value


def feeds(arguments: argparse.Namespace, model: engine.Model) -> dict[str, np.ndarray]:
    """The inputs: files where given, random data the model accepts elsewhere. Raises ValueError for a malformed option
    and a file of another kind, OSError for one that cannot be read."""
    result = model.sample_feeds(sizes(arguments, model), arguments.seed)
    for item in arguments.input:
        name, separator, path = item.partition("=")
        if not separator or name not in result:
            raise ValueError(f"--input {item}: write NAME=FILE.npy with one of {', '.join(result)}")
        array = _read_npy(Path(path), item)
        # .npy has strings of a fixed width only, the engine has Python's.
        result[name] = array.astype(object) if result[name].dtype == object and array.dtype.kind == "U" else array
    return result


def _read_npy(path: Path, item: str) -> np.ndarray:
    with path.open("rb") as file:
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"--input {item}: {path} is not read, an .npy file is expected ({error})") from None


def table(rows: Sequence[Sequence[str]], right: frozenset[int]) -> str:
    """Rows of text in aligned columns; the columns in `right` are right-aligned. The first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def quantity(value: float, unit: str) -> str:
    """`value` with a decimal prefix, e.g. ``3.97 GFLOP``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def step_text(name: str, width: int = 48) -> str:
    """A step's name in a column: its first node, by which steps differ, and as many of those fused into it as fit."""
    return name if len(name) <= width else f"{name[: width - 1]}…"


def shape_text(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
