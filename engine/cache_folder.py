"""Where the engine keeps what it would otherwise make again at every start: compiled kernels, ceilings, verdicts.

Called by whoever has such a cache; each makes its folder when it first writes, and does without where that fails.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

CACHE_VARIABLE = "TILEWAVE_CACHE_DIR"


def cache_folder(kind: str) -> Path | None:
    """``$TILEWAVE_CACHE_DIR/<kind>``, else `kind` under ``$XDG_CACHE_HOME/tilewave`` or ``~/.cache/tilewave``.

    A user without a home (no HOME and no entry in the user database, as in a container that runs under a bare number)
    gets ``tilewave-<uid>`` in the folder for temporary files, made with mode 0700; where that name is not this user's
    alone, None: nothing is kept, and the log says so.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen) / kind
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "tilewave" / kind
    try:
        return Path.home() / ".cache" / "tilewave" / kind
    except RuntimeError:  # what pathlib raises where there is no home
        return _temporary(kind)


def _temporary(kind: str) -> Path | None:
    try:
        folder = Path(tempfile.gettempdir()) / f"tilewave-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        # Anyone can make a name in the folder for temporary files first, a link to elsewhere, too.
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise PermissionError(f"{folder} is not this user's alone")
    except OSError as error:
        log.warning("this user has no home folder, and %s; set %s to keep %s", error, CACHE_VARIABLE, kind)
        return None
    return folder / kind
