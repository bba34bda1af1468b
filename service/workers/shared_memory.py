"""Memory that the HTTP process and an engine process both see, and who may use which part of it.

Each direction has one region. Its writer hands out blocks (`Blocks`); its reader gets arrays over them (`Leases`) and
learns when the last view of a block has died, so that the writer can have it back. The memory has no name: nothing is
left behind by a crash, and no size of /dev/shm bounds it.
"""

import mmap
import os
import tempfile
import threading
import weakref
from bisect import bisect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 64
Bytes = NDArray[np.uint8]


class RegionFull(Exception):
    """The block cannot be had now; `never` says that it could not be had from an empty region either."""

    def __init__(self, nbytes: int, never: bool) -> None:
        super().__init__(f"{nbytes} bytes of shared memory are not to be had")
        self.nbytes = nbytes
        self.never = never


def create_region(nbytes: int) -> int:
    """A file descriptor of new memory without a name. Pages take memory once they are written to."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("tilewave")
    else:
        with tempfile.TemporaryFile() as file:  # deleted already; the descriptor keeps the content
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, nbytes)
    return descriptor


def map_region(descriptor: int) -> Bytes:
    """The whole region as bytes. Unmapped when the last view of it dies; the descriptor may be closed at once."""
    return np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)


class Blocks:
    """The writer's side: first fit, so that a region is used from its beginning and little of it takes memory."""

    def __init__(self, region: Bytes) -> None:
        self._region = region
        self._freed = threading.Condition()
        self._free = [(0, region.nbytes)]  # (start, size), ascending, never adjacent
        self._taken: dict[int, int] = {}

    def take(self, nbytes: int, wait: float = 0.0) -> tuple[int, Bytes]:
        """The start and the bytes of a new block. Raises RegionFull where none gets free within `wait` seconds."""
        size = -(-max(nbytes, 1) // _ALIGNMENT) * _ALIGNMENT
        if size > self._region.nbytes:
            raise RegionFull(nbytes, never=True)
        with self._freed:
            found = self._freed.wait_for(lambda: self._fitting(size) is not None, wait)
            index = self._fitting(size)
            if not found or index is None:
                raise RegionFull(nbytes, never=False)
            start, room = self._free.pop(index)
            if room > size:
                self._free.insert(index, (start + size, room - size))
            self._taken[start] = size
        return start, self._region[start : start + nbytes]

    def _fitting(self, size: int) -> int | None:
        return next((index for index, (_, room) in enumerate(self._free) if room >= size), None)

    def give_back(self, start: int) -> None:
        """Free the block that begins at `start`; unknown ones are ignored."""
        with self._freed:
            size = self._taken.pop(start, None)
            if size is None:
                return
            index = bisect(self._free, (start, 0))
            if index < len(self._free) and self._free[index][0] == start + size:
                size += self._free.pop(index)[1]
            if index and sum(self._free[index - 1]) == start:
                index -= 1
                start, before = self._free.pop(index)
                size += before
            self._free.insert(index, (start, size))
            self._freed.notify_all()

    @property
    def used(self) -> int:
        """Bytes in blocks that are not given back."""
        with self._freed:
            return sum(self._taken.values())


class Leases:
    """The reader's side. `on_end` is called with the start of a block when its last view has died: on any thread, and
    possibly within any other code, so it may only do what is safe there."""

    def __init__(self, region: Bytes, on_end: Callable[[int], None]) -> None:
        self._region = region
        self._on_end = on_end
        self._open: dict[int, tuple[weakref.ref[Any], int]] = {}  # by the id of the reference: arrays have no hash

    def view(self, start: int, nbytes: int) -> Bytes:
        """The bytes of a block. Raises ValueError for one outside the region."""
        if start < 0 or nbytes < 0 or start + nbytes > self._region.nbytes:
            raise ValueError(f"a block of {nbytes} bytes at {start} is not within the region")
        # Over a memoryview, so that views of these bytes keep this very array alive, not the region's.
        array: Bytes = np.frombuffer(self._region.data[start : start + nbytes], np.uint8)
        array.flags.writeable = False
        reference = weakref.ref(array, self._end)
        self._open[id(reference)] = reference, start
        return array

    def _end(self, reference: "weakref.ref[Any]") -> None:
        _, start = self._open.pop(id(reference))
        self._on_end(start)
