"""What the profiled process (profiled.py) has launched and what its stamps say, as a file for the one that started it.

A window is what lies between two calls that start and stop profilers: the launches of a plan, or those of kernels that
do nothing but write their stamp.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu.ncu import Shape

EMPTY = ""
"""In place of a case's name: kernels that only write their stamp."""


@dataclass(frozen=True)
class Launched:
    """A step as it was launched: its kernels' shapes, and the µs of its stamp (0: none was written)."""

    name: str
    shapes: tuple[Shape, ...]
    stamp_us: float


@dataclass(frozen=True)
class Window:
    """One pass over the steps of a case, or over the kernels that only write their stamp, in the order of launching."""

    case: str
    steps: tuple[Launched, ...]


def write(path: Path, windows: Sequence[Window]) -> None:
    path.write_text(json.dumps([asdict(window) for window in windows]), encoding="utf-8")


def read(path: Path) -> list[Window]:
    """What `write` wrote. Raises OSError, ValueError or KeyError for anything else."""
    return [
        Window(window["case"], tuple(_launched(step) for step in window["steps"]))
        for window in json.loads(path.read_text(encoding="utf-8"))
    ]


def _launched(step: dict[str, object]) -> Launched:
    shapes = step["shapes"]
    if not isinstance(shapes, list):
        raise ValueError(f"shapes are no list: {shapes}")
    return Launched(
        str(step["name"]),
        tuple(((int(x), int(y), int(z)), int(threads)) for (x, y, z), threads in shapes),
        float(str(step["stamp_us"])),
    )
