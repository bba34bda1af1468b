"""The plans that stay ready to run: least recently used first out, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Sized)


class LeastRecentlyUsed(Generic[K, V]):
    """A mapping whose values together take at most `limit` bytes (the newest one always stays).

    `evicted` is called with every value that has to go. Not thread-safe: the owner holds its lock.
    """

    def __init__(self, limit: int, evicted: Callable[[V], None]) -> None:
        self._limit = limit
        self._evicted = evicted
        self._items: OrderedDict[K, V] = OrderedDict()
        self.nbytes = 0

    def get(self, key: K) -> V | None:
        value = self._items.get(key)
        if value is not None:
            self._items.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        self._items[key] = value
        self.nbytes += value.nbytes
        while self.nbytes > self._limit and len(self._items) > 1:
            _, oldest = self._items.popitem(last=False)
            self._drop(oldest)

    def clear(self) -> None:
        while self._items:
            self._drop(self._items.popitem()[1])

    def values(self) -> list[V]:
        return list(self._items.values())

    def __len__(self) -> int:
        return len(self._items)

    def _drop(self, value: V) -> None:
        self.nbytes -= value.nbytes
        self._evicted(value)
