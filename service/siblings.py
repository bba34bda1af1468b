"""The other front ends of a server, as one of them sees them: what an administrator changes here is changed there, and
what is counted there is added to what is counted here. Event loop only.
"""

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

from service.errors import Overloaded, Unavailable
from service.merging import Snapshot
from service.peer import Peer, PeerGone

_COLLECT_S = 3.0
_REGIONS = "/regions"  # no model is called so


class Change(StrEnum):
    """What an administrator did."""

    LOAD = "load"
    UNLOAD = "unload"
    REGISTER = "register"
    UNREGISTER = "unregister"


@dataclass(frozen=True, slots=True)
class Action:
    """One change: `name` is that of a model or a region (None: all regions), the rest is of a region."""

    change: Change
    name: str | None
    key: str = ""
    offset: int = 0
    nbytes: int = 0

    @property
    def subject(self) -> str:
        """What it is a change of: a model, or shared memory, whichever region."""
        return str(self.name) if self.change in (Change.LOAD, Change.UNLOAD) else _REGIONS

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, document: dict[str, Any]) -> "Action":
        """From JSON."""
        return cls(**{**document, "change": Change(document["change"])})


class Siblings(Protocol):
    """The other front ends."""

    def turn(self, action: Action) -> contextlib.AbstractAsyncContextManager[None]:
        """No other front end begins a change of the same model meanwhile: all of them see changes in one order, and are
        alike after them. Raises Overloaded where too many wait, Unavailable where nobody keeps the order any more."""
        ...

    async def tell(self, action: Action) -> None:
        """Have an action done everywhere else; returns when it is."""
        ...

    async def collect(self, own: Snapshot) -> list[Snapshot]:
        """What was counted everywhere else, and by front ends that are gone; `own` is what was counted here. Raises
        Unavailable where nobody knows."""
        ...


class Alone:
    """There are none."""

    @asynccontextmanager
    async def turn(self, action: Action) -> AsyncIterator[None]:
        """The catalogue has its own order."""
        yield

    async def tell(self, action: Action) -> None:
        """Nothing to do."""

    async def collect(self, own: Snapshot) -> list[Snapshot]:
        """Nothing."""
        return []


class Others:
    """Those that the supervisor on the other side of `peer` knows."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    @asynccontextmanager
    async def turn(self, action: Action) -> AsyncIterator[None]:
        """This front end's turn among all. Raises Overloaded, Unavailable."""
        try:
            refusal = await self._peer.ask("turn", action.subject)
        except PeerGone:  # this process ends then
            raise Unavailable("the other front ends cannot be told now") from None
        if refusal:
            raise Overloaded(refusal)
        try:
            yield
        finally:
            self._peer.tell("done", action.subject)

    async def tell(self, action: Action) -> None:
        """Have an action done everywhere else."""
        with contextlib.suppress(PeerGone):  # this process ends then
            await self._peer.ask("tell", action.document())

    async def collect(self, own: Snapshot) -> list[Snapshot]:
        """What was counted everywhere else. Raises Unavailable where the supervisor does not answer: sums without the
        others would be less than those before."""
        try:
            found: list[Snapshot] = await self._peer.ask("collect", own, timeout=_COLLECT_S)
        except (PeerGone, TimeoutError):
            raise Unavailable("the other front ends cannot be asked now") from None
        return found
