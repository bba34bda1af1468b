"""What the CPU target asks of the operating system about memory. Called by `target.py`."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache


@cache
def physical_memory_bytes() -> int:
    """Bytes of memory in this machine; the largest address where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize


def return_free_memory() -> None:
    """Have the C library give freed memory back to the system, where it can (glibc keeps it otherwise)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
