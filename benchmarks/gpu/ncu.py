"""The time of every kernel as NVIDIA's profiler Nsight Compute (``ncu``) sees it.

ncu runs a small program (profiled.py) that launches the kernels of a plan one after the other, in windows of its own
(`--profile-from-start off`). It leaves clocks and caches as they are, asks for nothing that would take a kernel more
than one pass, and writes a line of CSV for each in the order in which they were launched: matched by that, and by grid
and block (deviation.py).
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

METRIC = "gpu__time_duration.sum"
_US = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}
"""Units of ncu, older and newer names, in µs."""
_TIMEOUT_SECONDS = 240.0
_ERROR = "==ERROR== "
_PASSES = re.compile(r"^==PROF== .* - ([2-9]|[1-9]\d+) passes", re.MULTILINE)

Shape = tuple[tuple[int, int, int], int]
"""The grid of a launch, and the threads of its blocks."""


class NcuError(Exception):
    """ncu is not there, failed, or saw something else than was launched."""


@dataclass(frozen=True)
class Timed:
    """A kernel that ncu saw."""

    shape: Shape
    us: float


def find(name: str) -> str:
    """The path of ncu. Raises ValueError that says what to do."""
    path = shutil.which(name)
    if path is None:
        raise ValueError(
            f"no {name}: install Nsight Compute and put it on the PATH, or name it with --ncu; "
            "--no-ncu measures the rest"
        )
    return path


def command(ncu: str, program: Sequence[str], log: Path) -> list[str]:
    """What profiles a program, and writes to `log`."""
    return [
        ncu, "--csv", "--log-file", str(log), "--metrics", METRIC, "--print-units", "base",
        "--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off", *program,
    ]  # fmt: skip


def profile(ncu: str, program: Sequence[str]) -> list[Timed]:
    """The kernels that a program launches between the calls that start and stop profilers. Raises NcuError."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        try:
            done = subprocess.run(
                command(ncu, program, log), capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NcuError(str(error)) from error
        written = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    errors = [line.removeprefix(_ERROR) for line in written.splitlines() if line.startswith(_ERROR)]
    if errors or done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise NcuError("; ".join([*errors[:2], *last]) or f"exit status {done.returncode}")
    if passes := _PASSES.search(written + "\n" + done.stdout):
        raise NcuError(f"a kernel ran {passes[1]} times over: its stamp is not of what was timed")
    return parse(written)


def parse(text: str) -> list[Timed]:
    """The kernels in ncu's CSV, a line for each; lines of ncu itself (``==PROF== …``) stand around it. Raises
    NcuError."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        raise NcuError("no kernel was profiled")
    rows = csv.DictReader(line for line in lines[start:] if line.startswith('"'))
    try:
        return [
            Timed(
                (_three(row["Grid Size"]), _three(row["Block Size"])[0]),
                float(row["Metric Value"].replace(",", "")) * _US[row["Metric Unit"]],
            )
            for row in rows
            if row["Metric Name"] == METRIC
        ]
    except (KeyError, ValueError) as error:
        raise NcuError(f"its CSV is not what is known of it: {error}") from error


def _three(text: str) -> tuple[int, int, int]:
    """``(8, 4, 1)`` as numbers."""
    x, y, z = (int(part) for part in text.strip("() ").split(","))
    return x, y, z


def matched(launched: Sequence[Sequence[Shape]], timed: Sequence[Timed]) -> list[list[float]]:
    """The µs of the launches of every step, in order. Raises NcuError where something else was launched."""
    shapes = [shape for step in launched for shape in step]
    if len(shapes) != len(timed):
        raise NcuError(f"{len(timed)} kernels were profiled, {len(shapes)} are launched")
    for number, (shape, one) in enumerate(zip(shapes, timed, strict=True)):
        if shape != one.shape:
            raise NcuError(f"kernel {number} has grid and threads {one.shape}, not {shape}")
    times = iter(timed)
    return [[next(times).us for _ in step] for step in launched]
