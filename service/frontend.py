"""`python -m service.frontend`: one of several HTTP processes before one engine process. Started by supervisor.py,
which gives it its listening socket, a socket to talk through, and one that brings its connections to the engine.
"""

import asyncio
import logging
import socket
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from service.access import Access
from service.app import create_app
from service.handover import describe, hand_over
from service.logs import configure
from service.model import ModelState
from service.peer import Peer
from service.server import run_server, spare_the_collector
from service.serving import Serving
from service.settings import Authentication, Settings
from service.siblings import Action, Others, Siblings
from service.workers.guest import GuestTransport
from service.workers.messages import ModelKey
from service.workers.transport import Transport

log = logging.getLogger("service")

# What others serve is in the engine, and ready here within milliseconds. Connections do not wait for longer than this
# where it is not: the engine has just been started again, or what was loaded cannot be had from anybody.
_LATEST_S = 10.0


@dataclass(frozen=True, slots=True)
class FrontEndArguments:
    """The command line: descriptors it inherits, its number, the settings as JSON."""

    listener: int
    peer: int
    connections: int
    number: int
    settings: str

    def to_list(self) -> list[str]:
        """As command-line arguments."""
        return [*map(str, (self.listener, self.peer, self.connections, self.number)), self.settings]

    @classmethod
    def from_list(cls, arguments: Sequence[str]) -> "FrontEndArguments":
        """From command-line arguments."""
        *numbers, settings = arguments
        listener, peer, connections, number = map(int, numbers)
        return cls(listener, peer, connections, number, settings)


class FrontEnd:
    """This process's place among the others. Event loop only, once it has joined."""

    def __init__(self, number: int, access: Access, end: socket.socket, connections: socket.socket) -> None:
        self.number = number
        self.access = access
        self.transport: Transport = GuestTransport(connections, self._reconnect)
        self._end = end
        self._peer = Peer(self._answer)
        self.siblings: Siblings = Others(self._peer)
        self._serving: Serving | None = None
        self._talking: asyncio.Task[None] | None = None
        self._started = asyncio.Event()

    async def join(self, serving: Serving) -> None:
        """Start serving as the others do: with what administrators have changed meanwhile, with the models that they
        serve, and not before those are ready here, too; connections wait. Raises PeerGone where the supervisor is gone
        already."""
        self._serving = serving
        await self._peer.connect(self._end)
        self._talking = asyncio.get_running_loop().create_task(self._talk())
        state = await self._peer.ask("hello")
        self.access.take(state["keys"])
        served = [ModelKey(*key) for key in state["served"]]
        changed = serving.models.changed(served)
        documents = await self._peer.ask("describe", changed) if changed else []
        serving.start(frozenset(state["unloaded"]), hand_over(documents))
        for region in state["regions"]:
            await serving.apply(Action.of(region))
        self._started.set()
        await serving.models.wait_for(served, _LATEST_S)

    def _reconnect(self, connection: int) -> None:
        """A connection to the engine process has ended."""
        self._peer.tell("reconnect", connection)

    def settled(self) -> None:
        """No model is loading any more, or one is gone: what is served now is what a front end to come waits for."""
        spare_the_collector()
        assert self._serving is not None
        self._peer.tell("served", [astuple(key) for key in self._serving.models.served()])

    async def _talk(self) -> None:
        """Until the supervisor is gone: then this process goes, too."""
        await self._peer.run()
        assert self._serving is not None
        if not self._serving.draining:
            log.error("the supervisor is gone")
            self._serving.end_server()

    async def _answer(self, kind: str, content: Any) -> Any:
        """What the supervisor asks."""
        if kind == "ping":
            return None
        await self._started.wait()
        assert self._serving is not None
        if kind == "snapshot":
            return self._serving.snapshot()
        if kind == "describe":
            models = [model for model in self._serving.models.all_models() if model.key.name in content]
            return [describe(model) for model in models if model.state is not ModelState.LOADING]
        if kind == "act":
            await self._serving.apply(Action.of(content))
            return None
        raise ValueError(f"unknown question {kind!r}")


def main() -> None:
    """Serve until SIGTERM, or until the supervisor is gone."""
    arguments = FrontEndArguments.from_list(sys.argv[1:])
    settings = Settings.model_validate_json(arguments.settings)
    configure(settings.log_level, settings.log_format)
    peer, connections, listener = (
        socket.socket(fileno=descriptor) for descriptor in (arguments.peer, arguments.connections, arguments.listener)
    )
    keys = settings.api_keys if settings.authentication is not Authentication.OFF else None
    front_end = FrontEnd(arguments.number, Access.awaiting(keys), peer, connections)
    app = create_app(settings, on_settled=front_end.settled, front_end=front_end)
    run_server(app, settings, listener)


if __name__ == "__main__":
    main()
