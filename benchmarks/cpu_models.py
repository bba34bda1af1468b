"""``python -m benchmarks.cpu_models``: whole models on the CPU beside ONNX Runtime, in one interleaved run.

Checks before it times: a case counts only if our outputs and the peer's agree. Rounds alternate between the two, with a
pause so that the one's spinning threads do not slow the other. Each figure is the median over rounds of a round's
median.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime

import engine
from engine.cli.check import relative_error

TOLERANCE = 1e-5
PAUSE_SECONDS = 0.08


@dataclass(frozen=True)
class Case:
    """A model file with the sizes of its symbols."""

    model: str
    sizes: Mapping[str, int]

    @property
    def name(self) -> str:
        return f"{self.model} {' '.join(f'{key}={value}' for key, value in self.sizes.items())}"


CASES = (
    Case("efficientnet-lite0", {"batch": 1}),
    Case("efficientnet-lite0", {"batch": 8}),
    Case("all-minilm-l6-v2", {"batch": 1, "sequence": 64}),
    Case("all-minilm-l6-v2", {"batch": 8, "sequence": 64}),
    Case("all-minilm-l6-v2", {"batch": 1, "sequence": 16}),
    Case("all-minilm-l6-v2", {"batch": 1, "sequence": 128}),
    Case("all-minilm-l6-v2", {"batch": 1, "sequence": 256}),
)


@dataclass(frozen=True)
class Row:
    """One case: milliseconds of ours and of the peer, their ratio (above 1: ours is faster), the relative L2 error."""

    case: str
    threads: int
    ours_ms: float
    onnxruntime_ms: float
    ratio: float
    rel_err: float


def measure(case: Case, models: Path, threads: int, rounds: int) -> Row:
    """Run one case. Raises RuntimeError where the outputs disagree."""
    path = models / case.model / "1" / "model.onnx"
    with engine.load(path, device="cpu", threads=threads) as model:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds = model.sample_feeds(case.sizes)
        ours = model.run(feeds)
        expected = dict(zip(ours, session.run(list(ours), feeds), strict=True))
        error = max(relative_error(array, expected[name]) for name, array in ours.items())
        if error > TOLERANCE:
            raise RuntimeError(f"{case.name}: relative L2 error {error:.1e} against ONNX Runtime; not timed")
        ours_ms, peer_ms = _alternate(lambda: model.run(feeds), lambda: session.run(None, feeds), rounds)
    return Row(case.name, threads, ours_ms, peer_ms, peer_ms / ours_ms, error)


def _alternate(a: Callable[[], object], b: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Milliseconds per call of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, collected in zip((a, b), times, strict=True):
            time.sleep(PAUSE_SECONDS)
            collected.append(_round(function))
    return median(times[0]) * 1e3, median(times[1]) * 1e3


def _round(function: Callable[[], object], budget: float = 0.4) -> float:
    """Median seconds per call over calls that fill `budget` seconds, at least five."""
    for _ in range(2):
        function()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times)


def environment() -> dict[str, object]:
    """What the figures depend on, for the results file."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "processor": _processor(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_models", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, default=Path("models"), help="model repository (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds per case (default: %(default)s)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    rows = []
    print(f"{'case':44} {'ours ms':>9} {'ORT ms':>9} {'ratio':>6}  error")
    for case in CASES:
        if arguments.only in case.name:
            row = measure(case, arguments.models, arguments.threads, arguments.rounds)
            rows.append(row)
            print(f"{row.case:44} {row.ours_ms:9.3f} {row.onnxruntime_ms:9.3f} {row.ratio:6.2f}  {row.rel_err:.1e}")
    if arguments.output:
        content = {**environment(), "threads": arguments.threads, "rows": [asdict(row) for row in rows]}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
