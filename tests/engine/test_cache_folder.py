"""Where caches lie, most of all for a user who has no home."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine.cache_folder import CACHE_VARIABLE, cache_folder


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user without a home; the folder for temporary files."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("cpu") == tmp_path / "own" / "cpu"
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_folder("cpu") == tmp_path / "xdg" / "tilewave" / "cpu"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("cpu") == tmp_path / "home" / ".cache" / "tilewave" / "cpu"


def test_a_user_without_a_home_has_a_private_folder_among_temporary_files(temporary: Path) -> None:
    for _ in range(2):
        assert cache_folder("kernels") == temporary / f"tilewave-{os.getuid()}" / "kernels"
    assert stat.S_IMODE((temporary / f"tilewave-{os.getuid()}").stat().st_mode) == 0o700


@pytest.mark.parametrize("made", ["open to others", "a link", "a file", "another user's"])
def test_a_folder_that_someone_else_may_have_made_is_not_used(
    temporary: Path, made: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = temporary / f"tilewave-{os.getuid()}"
    if made == "open to others":
        name.mkdir()
        name.chmod(0o750)
    elif made == "a link":
        (temporary / "elsewhere").mkdir(mode=0o700)
        name.symlink_to(temporary / "elsewhere")
    elif made == "a file":
        name.write_text("")
    else:
        name.mkdir(mode=0o700)
        name = name.rename(temporary / f"tilewave-{os.getuid() + 1}")
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
    with caplog.at_level(logging.WARNING):
        assert cache_folder("kernels") is None
    assert "no home folder" in caplog.text and CACHE_VARIABLE in caplog.text


def test_nothing_needs_a_home(tmp_path: Path) -> None:
    """The CPU target compiles and measures its ceilings where there is neither a home nor a folder for its cache."""
    program = (
        "import pathlib, tempfile\n"
        "def no_home(): raise RuntimeError('Could not determine home directory.')\n"
        "pathlib.Path.home = no_home\n"
        "import numpy as np, onnx, engine\n"
        "graph = onnx.parser.parse_graph('g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }')\n"
        "with engine.load(onnx.helper.make_model(graph).SerializeToString(), device='cpu') as model:\n"
        "    assert model.run({'x': np.ones((1, 4), np.float32)})['y'].sum() == 4\n"
        "    assert model.device_info.peak_flops > 0\n"
    )
    cleared = {CACHE_VARIABLE, "XDG_CACHE_HOME", "HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in cleared}
    root = Path(__file__).parents[2]
    for name, mode in (("usable", 0o700), ("taken", 0o777)):
        folder = tmp_path / name
        folder.mkdir()
        own = folder / f"tilewave-{os.getuid()}"
        own.mkdir()
        own.chmod(mode)
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=root,
            env={**environment, "TMPDIR": str(folder)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert bool(list(own.rglob("*.o"))) == (name == "usable")
