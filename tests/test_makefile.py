"""What `make` decides by itself. Nothing is installed: make only prints what it would do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder for the PATH: `nvidia-smi`, and a `python` for which the driver's library has what the test says."""
    _script(tmp_path / "nvidia-smi", "exit 0")
    return tmp_path


def _script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def make(machine: Path, *arguments: str, driver: bool) -> str:
    _script(machine / "python", f"exit {int(not driver)}")
    environment = {name: value for name, value in os.environ.items() if name not in ("EXTRAS", "MAKEFLAGS")}
    environment["PATH"] = f"{machine}:{environment['PATH']}"
    command = ["make", "-n", f"PYTHON={machine / 'python'}", f"VENV={machine / 'venv'}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("goal", ["serve", "setup"])
def test_a_machine_with_a_driver_gets_the_packages_for_the_gpu_and_is_told(machine: Path, goal: str) -> None:
    printed = make(machine, goal, driver=True)
    assert "installing the cuda packages" in printed
    assert "there is an NVIDIA driver" in printed and "EXTRAS=" in printed


@pytest.mark.parametrize(
    ("arguments", "driver"),
    [(["serve", "EXTRAS="], True), (["serve"], False), (["test"], True), (["lint"], True)],
    ids=["told not to", "no driver that works", "tests", "lint"],
)
def test_otherwise_it_does_not(machine: Path, arguments: list[str], driver: bool) -> None:
    printed = make(machine, *arguments, driver=driver)
    assert "installing the runtime packages" in printed
    assert "cuda" not in printed and "NVIDIA" not in printed


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="there is an NVIDIA driver")
def test_a_library_alone_is_no_driver(machine: Path) -> None:
    (machine / "nvidia-smi").unlink()
    assert "cuda" not in make(machine, "serve", driver=True)


def test_extras_that_are_named_are_installed(machine: Path) -> None:
    assert "installing the cuda packages" in make(machine, "serve", "EXTRAS=cuda", driver=False)
