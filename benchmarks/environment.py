"""What a row depends on beside the kernels: the commit, the driver, the versions of what is installed."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.results import Ceilings, Run

_DISTRIBUTIONS = {
    "cpu": ("llvmlite", "numpy", "onnx", "onnxruntime"),
    "gpu": (
        "cuda-bindings",
        "cupy-cuda13x",
        "numpy",
        "onnx",
        "onnxruntime",
        "timm",
        "torch",
        "torchvision",
        "transformers",
        "triton",
    ),
}


def new_run(kind: str, commit: str, ceilings: Ceilings | None, driver: str = "", **versions: str) -> Run:
    """A run that begins now. `kind` is ``cpu`` or ``gpu``; `versions` are those that no package tells."""
    now = datetime.now(UTC)
    every = {"python": platform.python_version(), **versions, **_installed(_DISTRIBUTIONS[kind])}
    return Run(now.isoformat(timespec="milliseconds"), commit, now.date().isoformat(), driver, every, ceilings)


def _installed(distributions: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in distributions:
        try:
            found[name.partition("-cuda13x")[0]] = version(name)
        except PackageNotFoundError:
            found[name.partition("-cuda13x")[0]] = "not installed"
    return found


def present_commit() -> str:
    """The checkout's commit, with ``-dirty`` where its sources differ from it; ``unknown`` outside a checkout."""
    commit = _git("rev-parse", "--short=7", "HEAD")
    if not commit:
        return "unknown"
    # What this program writes says nothing of what it measures.
    changed = _git("status", "--porcelain", "--", ":/engine", ":/models", ":/benchmarks", ":!/benchmarks/results")
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        )
    except OSError:
        return ""
    return done.stdout.strip()


def gpu_driver(index: int) -> str:
    """The NVIDIA driver's version, or ``unknown``."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={index}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "unknown"
