"""What the CPU target asks of the operating system about memory. Called by `target.py`."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache


@cache
def usable_memory_bytes() -> int:
    """Bytes that one run may take: half of the machine's memory. The largest address where the system does not say.

    The system promises more than it has, and ends the process that uses it: a small file can name sizes that fill
    any machine, and the other half is for what else runs there.
    """
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return sys.maxsize


def return_free_memory() -> None:
    """Have the C library give freed memory back to the system, where it can (glibc keeps it otherwise)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
