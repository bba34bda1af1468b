"""One change of a model at a time: who comes later waits, and too many who wait are refused. Used by `catalog.py` for
its process and by `supervisor.py` for all of them; event loop only.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.errors import Overloaded

_MOST_WAITING = 8  # changes of one model, the one under way included


class Turns:
    """The turns of each name."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._waiting: dict[str, int] = defaultdict(int)

    @asynccontextmanager
    async def turn(self, name: str, bounded: bool = True) -> AsyncIterator[None]:
        """A turn of this name. Raises Overloaded where too many wait, if their number is `bounded`."""
        await self.take(name, bounded)
        try:
            yield
        finally:
            self.give_back(name)

    async def take(self, name: str, bounded: bool = True) -> None:
        """Wait for a turn, which `give_back` ends. Raises Overloaded as `turn` does."""
        if bounded and self._waiting.get(name, 0) >= _MOST_WAITING:
            raise Overloaded(f"{_MOST_WAITING} changes of model '{name}' are under way already")
        self._waiting[name] += 1
        try:
            await self._locks[name].acquire()
        except asyncio.CancelledError:
            self._leave(name)
            raise

    def give_back(self, name: str) -> None:
        """The next one's turn."""
        self._locks[name].release()
        self._leave(name)

    def _leave(self, name: str) -> None:
        self._waiting[name] -= 1
        if not self._waiting[name]:  # names are what clients send
            del self._waiting[name], self._locks[name]
