"""System shared memory of clients: regions that an administrator registers, so that tensors of clients on this machine
need not go through HTTP.

Owned by `Serving`; event loop only, but for `read`, `write` and `check`, which any thread may call. A region is read
and written through its file descriptor, never mapped: a client that shortens its memory while it is read would else
end this process with a bus error. Only names that begin with an allowed prefix can be registered. The service's own
segments have no name (workers/shared_memory.py), so no prefix reaches them.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from service.errors import Forbidden, InvalidRequest, NotFound, Unsupported

_FOLDER = Path("/dev/shm")  # where Linux shows POSIX shared memory
_KEY = re.compile(r"/[A-Za-z0-9][A-Za-z0-9._+-]{0,253}")
_MOST_REGIONS = 1024
_SHOWN = 64


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a registered region, as a request names it; `offset` and `nbytes` are in bytes."""

    region: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Region:
    """A registered region: `nbytes` at `offset` of the segment `key`, which is open."""

    name: str
    key: str
    offset: int
    nbytes: int
    descriptor: int

    def document(self) -> dict[str, Any]:
        """The protocol's form."""
        return {"name": self.name, "key": self.key, "offset": self.offset, "byte_size": self.nbytes}


class ClientMemory:
    """The registered regions. Without `prefixes` there never is one."""

    def __init__(self, prefixes: Sequence[str], folder: Path = _FOLDER) -> None:
        self._prefixes = tuple(prefixes)
        self._folder = folder
        self._regions: dict[str, Region] = {}
        self._closing = Lock()  # so that no descriptor is closed, and its number another's, before it has been doubled

    @property
    def enabled(self) -> bool:
        """Whether regions can be registered."""
        return bool(self._prefixes)

    def register(self, name: str, key: str, offset: int, nbytes: int) -> None:
        """Open a segment under a name. Raises Unsupported, Forbidden, InvalidRequest, NotFound."""
        self._check_enabled()
        if name in self._regions:
            raise InvalidRequest(f"region '{name[:_SHOWN]}' is registered already; unregister it first")
        if len(self._regions) >= _MOST_REGIONS:
            raise InvalidRequest(f"there are {_MOST_REGIONS} regions already; unregister some")
        if not _KEY.fullmatch(key):
            raise InvalidRequest(f"key '{key[:_SHOWN]}' is no name of a shared-memory segment, like '/app_input'")
        if not key.startswith(self._prefixes):
            raise Forbidden(f"key '{key[:_SHOWN]}' begins with none of the prefixes in --shared-memory-prefixes")
        if nbytes < 1:
            raise InvalidRequest(f"'byte_size' is {nbytes}; a region has at least one byte")
        descriptor = self._open(key, offset + nbytes)
        self._regions[name] = Region(name, key, offset, nbytes, descriptor)

    def _open(self, key: str, end: int) -> int:
        """The descriptor of a segment that has `end` bytes at least."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe of that name shall not stop us
        try:
            descriptor = os.open(self._folder / key[1:], flags)
        except FileNotFoundError:
            raise NotFound(f"there is no shared-memory segment '{key[:_SHOWN]}' on this machine") from None
        except OSError as error:
            raise InvalidRequest(f"segment '{key[:_SHOWN]}' cannot be opened: {error.strerror}") from None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or end > status.st_size:
            os.close(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InvalidRequest(f"'{key[:_SHOWN]}' is no shared-memory segment")
            raise InvalidRequest(f"segment '{key[:_SHOWN]}' has {status.st_size} bytes; the region ends at {end}")
        return descriptor

    def unregister(self, name: str | None) -> None:
        """Close a region, or all of them. One that is not there is no error, as in the protocol."""
        self._check_enabled()
        for gone in list(self._regions) if name is None else [name]:
            region = self._regions.pop(gone, None)
            if region is not None:
                self._close(region)

    def regions(self, name: str | None) -> list[Region]:
        """One region, or all of them by name. Raises NotFound, Unsupported."""
        self._check_enabled()
        if name is None:
            return [self._regions[known] for known in sorted(self._regions)]
        return [self._find(name)]

    def read(self, place: Place) -> bytes:
        """The bytes at a place. Raises NotFound, InvalidRequest, Unsupported."""
        with self._open_at(place) as (region, descriptor, start):
            data = os.pread(descriptor, place.nbytes, start)
        if len(data) < place.nbytes:
            raise _shorter(region)
        return data

    def check(self, place: Place) -> None:
        """Raises NotFound, InvalidRequest or Unsupported for a place that cannot be written to."""
        self._at(place)

    def write(self, place: Place, data: bytes) -> None:
        """Put an output there. Raises NotFound, InvalidRequest, Unsupported."""
        with self._open_at(place) as (region, descriptor, start):
            if len(data) > place.nbytes:
                raise InvalidRequest(
                    f"the output has {len(data)} bytes, but {place.nbytes} were given for it in region "
                    f"'{place.region[:_SHOWN]}'"
                )
            is_whole = os.fstat(descriptor).st_size >= start + len(data)
            if not is_whole or os.pwrite(descriptor, data, start) < len(data):
                raise _shorter(region)

    @contextmanager
    def _open_at(self, place: Place) -> Iterator[tuple[Region, int, int]]:
        """The region of a place, a descriptor of its segment that nobody else closes, and where the place starts."""
        with self._closing:
            region, start = self._at(place)
            descriptor = os.dup(region.descriptor)
        try:
            yield region, descriptor, start
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close every region."""
        regions = list(self._regions.values())
        self._regions.clear()
        for region in regions:
            self._close(region)

    def _close(self, region: Region) -> None:
        """A region that nobody can find any more."""
        with self._closing:
            os.close(region.descriptor)

    def _at(self, place: Place) -> tuple[Region, int]:
        """The region of a place and where the place starts in its segment."""
        self._check_enabled()
        region = self._find(place.region)
        if place.offset + place.nbytes > region.nbytes:
            raise InvalidRequest(
                f"region '{region.name[:_SHOWN]}' has {region.nbytes} bytes; {place.nbytes} at {place.offset} are not "
                "within it"
            )
        return region, region.offset + place.offset

    def _find(self, name: str) -> Region:
        if name not in self._regions:
            raise NotFound(f"there is no shared-memory region '{name[:_SHOWN]}'; register it first")
        return self._regions[name]

    def _check_enabled(self) -> None:
        if not self._prefixes:
            raise Unsupported("shared memory is off; an administrator allows it with --shared-memory-prefixes")


def _shorter(region: Region) -> InvalidRequest:
    return InvalidRequest(f"region '{region.name[:_SHOWN]}' has become shorter than it was registered")
