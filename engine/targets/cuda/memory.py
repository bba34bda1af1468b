"""Memory that the plans of a target share: pieces that grow, and the staging slots of the runs that are under way.

Owned by `target.py`. Two runs may be under way: while one computes, the feeds of the next are copied to the device and
the results of the one before are copied back. So what a run's copies touch exists once per slot (pinned memory, and
device memory of the same layout for inputs, status words, outputs and stamps); what only the computing run touches,
the arena of intermediates, exists once, because plans compute one after the other on one stream. EfficientNet-Lite0 at
batch 32 has 19 MB a slot beside an arena of 96 MB, MiniLM at 32×128 6 MB beside 19. The second slot gets memory when
two runs first meet; a caller who runs one at a time never pays for it.

A kernel's addresses are part of its captured graph, so a plan has a graph for every slot that it has run on. The other
way, one graph over a fixed area with a copy from and to the slots, would read and write every input and output once
more per run, and need a third area.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

import cupy
import numpy as np

from engine.errors import EngineError

SLOTS = 2
"""Runs under way at once: one computes while the copies of the other are made. A third would wait for the first."""

T = TypeVar("T")


class Growing(Generic[T]):
    """A piece of memory that only grows. `allocate` makes one of so many bytes, `give_back` frees what pools keep."""

    def __init__(self, allocate: Callable[[int], T], give_back: Callable[[], object]) -> None:
        self._allocate = allocate
        self._give_back = give_back
        self._memory: T | None = None
        self.nbytes = 0
        self.generation = 0
        """Counts the moves: an address taken before one is stale."""

    @property
    def memory(self) -> T:
        """What `allocate` made."""
        assert self._memory is not None, "nothing is reserved yet"
        return self._memory

    def reserve(self, nbytes: int) -> None:
        """Make it at least this large, while nothing uses it. The old piece is freed first, so that both need not fit;
        where the new one does not fit, one of the old size takes its place. Raises what `allocate` raises."""
        if nbytes <= self.nbytes and self._memory is not None:
            return
        old = self.nbytes
        self.free()
        try:
            self._set(nbytes)
        except Exception:
            if old:
                with suppress(Exception):  # taken by another process meanwhile: the next run reserves what it needs
                    self._set(old)
            raise

    def _set(self, nbytes: int) -> None:
        self._memory = self._allocate(max(nbytes, 1))
        self.nbytes = nbytes

    def free(self) -> None:
        """Give the memory back to the driver, for whoever asks next: graphs and other processes do not ask the pool."""
        if self._memory is None:
            return
        self._memory = None
        self.nbytes = 0
        self.generation += 1
        self._give_back()


def device_memory() -> Growing[cupy.cuda.MemoryPointer]:
    """A growing piece of device memory."""
    return Growing(cupy.cuda.alloc, cupy.get_default_memory_pool().free_all_blocks)


def pinned_memory() -> Growing[np.ndarray]:
    """A growing piece of pinned host memory, as bytes."""
    return Growing(pinned_bytes, cupy.get_default_pinned_memory_pool().free_all_blocks)


def pinned_bytes(nbytes: int) -> np.ndarray:
    """Pinned host memory."""
    return np.frombuffer(cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)


class Slot:
    """What one run's copies need. Belongs to the thread that acquired it; `index` 0 is the one taken first."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._host = pinned_memory()
        self._device = device_memory()
        self.host_address = 0
        self.copied_in = cupy.cuda.Event(disable_timing=True)
        self.computed = cupy.cuda.Event(disable_timing=True)
        self.copied_out = cupy.cuda.Event(block=True, disable_timing=True)  # a thread that waits for it sleeps

    @property
    def nbytes(self) -> int:
        return min(self._host.nbytes, self._device.nbytes)

    @property
    def device_bytes(self) -> int:
        return self._device.nbytes

    @property
    def generation(self) -> int:
        """Counts the moves of the device memory."""
        return self._device.generation

    @property
    def host(self) -> np.ndarray:
        """The pinned memory, as bytes."""
        return self._host.memory

    @property
    def device(self) -> int:
        """The address of the device memory."""
        return int(self._device.memory.ptr)

    def reserve(self, nbytes: int) -> None:
        """Make both pieces at least this large, while no copy is under way."""
        self._device.reserve(nbytes)
        try:
            self._host.reserve(nbytes)
        finally:
            self.host_address = int(self._host.memory.ctypes.data) if self._host.nbytes else 0

    def free(self) -> None:
        self._device.free()
        self._host.free()


class AnySlot(Protocol):
    """As far as handing out goes."""

    @property
    def index(self) -> int: ...


S = TypeVar("S", bound=AnySlot)


class Slots(Generic[S]):
    """Hands slots to the threads that run. The lowest free one first, so that lone runs keep to one."""

    def __init__(self, slots: tuple[S, ...]) -> None:
        self.all = slots
        self._free = list(slots)
        self._changed = threading.Condition()
        self._closed = False

    def acquire(self, only: int | None = None) -> S:
        """A slot for this thread, waiting until one is free; `only`: that one. Raises EngineError once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._candidate(only) is not None)
            slot = self._candidate(only)
            if self._closed or slot is None:
                raise EngineError("the model is closed")
            self._free.remove(slot)
            return slot

    def _candidate(self, only: int | None) -> S | None:
        free = [slot for slot in self._free if only is None or slot.index == only]
        return min(free, key=lambda slot: slot.index, default=None)

    def release(self, slot: S) -> None:
        """Hand a slot back, once nothing that was queued uses it."""
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def close(self) -> None:
        """Hand out no more, and wait until all are back."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._free) == len(self.all))
