"""Files that are whole or absent: scratch folders, atomic writes, checksums. Called by ``fetch`` and ``store``."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SCRATCH_PREFIX = "partial-"
_SCRATCH_MAX_AGE_SECONDS = 24 * 3600.0


def sha256_of(path: Path) -> str:
    """Lower-case hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def scratch_folder(cache: Path) -> Iterator[Path]:
    """A new folder in ``cache``, removed at the end; also removes those that killed processes left a day ago."""
    cache.mkdir(parents=True, exist_ok=True)
    for folder in cache.glob(f"{_SCRATCH_PREFIX}*"):
        if _age_seconds(folder) > _SCRATCH_MAX_AGE_SECONDS:  # a running process may be using a younger one
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=_SCRATCH_PREFIX) as scratch:
        yield Path(scratch)


def write_atomically(path: Path, content: bytes, scratch: Path) -> None:
    """Write ``path`` so that a reader sees the old content or the new, never a part.

    ``scratch`` is a folder on the same file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = scratch / path.name
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _age_seconds(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
