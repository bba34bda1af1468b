"""Work that gives way: what runs under `background` lets everybody else on first.

A server loads a model while it serves others. Both want the one thread pool and the one compiler of the process; with
`background` around the loading, those that serve wait for one task of a kernel, or one kernel that is being compiled,
and not for the whole. Used through `engine.background`; `Turns` is what the pool and the compiler are guarded with.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# A tenth of the time stays for the background however busy the others are, or a model would never be loaded under load.
_SLICE_S, _SLICE_EVERY_S = 0.005, 0.05

_in_background: ContextVar[bool] = ContextVar("tilewave_background", default=False)


@contextmanager
def background() -> Iterator[None]:
    """What this thread does inside gives way to what others do on the CPU: it gets the processor when nobody else wants
    it, and a tenth of the time otherwise. On a GPU, kernels of different models share the device as its own scheduler
    decides."""
    token = _in_background.set(True)
    try:
        yield
    finally:
        _in_background.reset(token)


def in_background() -> bool:
    """Whether the calling thread is inside `background`."""
    return _in_background.get()


class Turns:
    """A lock (a context manager, not reentrant) that no thread in the background gets while another one waits for it,
    but for a slice of time now and then.

    `on_wanted` is called with True when somebody waits who is to be let in first, and with False when nobody does any
    more: the holder, where it is in the background, can then cut its turn short.
    """

    def __init__(self, on_wanted: Callable[[bool], None] = lambda _: None) -> None:
        self._lock = threading.Lock()
        self._on_wanted = on_wanted
        self._counting = threading.Lock()
        self._waiting = 0
        self._calm = _set_event()  # nobody waits who is to be let in first
        self._open = _set_event()  # not so while the background claims its slice: who comes now waits outside
        self._claiming = threading.Lock()
        self._due = 0.0  # when the background may claim its next slice
        self._firm_until = 0.0  # the end of its slice
        self._ending = False  # somebody will tell the holder of that

    def __enter__(self) -> None:
        if in_background():
            self._enter_last()
            return
        if not self._open.is_set():
            self._open.wait()
        free = self._lock.acquire(blocking=False)
        if not free and not self._lock.acquire(timeout=max(0.0, self._firm_until - time.monotonic())):
            self._count(1)
            try:
                self._lock.acquire()
            finally:
                self._count(-1)

    def __exit__(self, *_: object) -> None:
        if in_background():
            self._due = time.monotonic() + _SLICE_EVERY_S
            self._firm_until = 0.0
        self._lock.release()

    @contextmanager
    def kept_from_background(self) -> Iterator[None]:
        """For work that does not need the lock, but the processors: who is in the background waits meanwhile, but for
        its slices, as for a holder; whoever is not does not."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _enter_last(self) -> None:
        while (left := self._due - time.monotonic()) > 0:
            if self._calm.wait(left) and self._lock.acquire(timeout=max(0.0, self._due - time.monotonic())):
                if self._calm.is_set():
                    return
                self._lock.release()
        with self._claiming:
            self._open.clear()
            try:
                self._lock.acquire()
            finally:
                self._open.set()
        self._firm_until = time.monotonic() + _SLICE_S
        if self._waiting:
            self._count(0)

    def _count(self, change: int) -> None:
        with self._counting:
            self._waiting += change
            if self._waiting:
                self._calm.clear()
            else:
                self._calm.set()
            left = self._firm_until - time.monotonic()
            self._on_wanted(self._waiting > 0 and left <= 0)
            if self._waiting and left > 0 and not self._ending:  # work that does without the lock looks at no clock
                self._ending = True
                end = threading.Timer(left, self._end_slice)
                end.daemon = True
                end.start()

    def _end_slice(self) -> None:
        self._ending = False
        self._count(0)


def _set_event() -> threading.Event:
    event = threading.Event()
    event.set()
    return event
