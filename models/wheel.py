"""Reading one member of a wheel (a zip archive) without trusting the archive. Called by the builders."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from models.errors import FormatError


def read_member(path: Path, member: str, max_bytes: int) -> bytes:
    """Return the content of ``member``, at most ``max_bytes`` long.

    Raises:
        FormatError: the file is not a zip archive, is damaged, lacks the member, or the member is larger.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(member)
            if info.file_size > max_bytes:
                raise FormatError(f"{path.name}: {member} claims {info.file_size} bytes, more than {max_bytes}")
            return archive.read(info)
    except KeyError:
        raise FormatError(f"{path.name} has no member {member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise FormatError(f"{path.name}: {member} cannot be read: {error}") from error
