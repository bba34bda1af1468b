"""The other front ends of a server, as one of them sees them: what an administrator changes here is changed there, and
what is counted there is added to what is counted here. Event loop only.
"""

import contextlib
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

from service.errors import Unavailable
from service.merging import Snapshot
from service.peer import Peer, PeerGone

_COLLECT_S = 3.0


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

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, document: dict[str, Any]) -> "Action":
        """From JSON."""
        return cls(**{**document, "change": Change(document["change"])})


class Siblings(Protocol):
    """The other front ends."""

    async def tell(self, action: Action) -> None:
        """Have an action done everywhere else; returns when it is."""
        ...

    async def collect(self, own: Snapshot) -> list[Snapshot]:
        """What was counted everywhere else, and by front ends that are gone; `own` is what was counted here. Raises
        Unavailable where nobody knows."""
        ...


class Alone:
    """There are none."""

    async def tell(self, action: Action) -> None:
        """Nothing to do."""

    async def collect(self, own: Snapshot) -> list[Snapshot]:
        """Nothing."""
        return []


class Others:
    """Those that the supervisor on the other side of `peer` knows."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

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
