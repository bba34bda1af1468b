"""What the CPU target asks of the operating system about memory and caches. Called by `target.py`."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

_PROCESSORS = Path("/sys/devices/system/cpu")
_UNITS = {"K": 1 << 10, "M": 1 << 20}


def cache_bytes(threads: int) -> int:
    """Bytes of the last-level caches that so many threads reach: at most one for each thread. 0 where the system does
    not say."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    found: dict[str, int] = {}  # by the processors that share it
    for number in usable:
        levels = {}
        for index in _PROCESSORS.glob(f"cpu{number}/cache/index*"):
            try:
                level, kind, size, shared = (
                    (index / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
                )
                if kind != "Instruction":
                    levels[int(level)] = shared, int(size[:-1]) * _UNITS[size[-1]]
            except (OSError, ValueError, KeyError, IndexError):
                continue
        if levels:
            shared, nbytes = levels[max(levels)]
            found[shared] = nbytes
    return sum(sorted(found.values())[-threads:])


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
