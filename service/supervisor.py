"""`--frontends N`: the process that starts N HTTP processes and the engine process behind them, and starts again what
ends. It serves nothing itself.

Every front end has a connection to the engine of its own, which this process hands to both; tensors never pass here.
What administrators change through one front end is passed on to the others, and what front ends counted that are gone
is kept, so that metrics are sums over all that ever ran. An engine process that ends is started again by
`ProcessTransport`, and every front end gets a connection to the new one.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from service.access import Access
from service.errors import Overloaded
from service.frontend import FrontEndArguments
from service.merging import Snapshot, lasting, merge
from service.peer import Peer, PeerGone
from service.settings import Settings
from service.siblings import Action, Change
from service.turns import Turns
from service.workers.messages import Report, Stop, Stopped, WorkerLost
from service.workers.process import ProcessOptions, ProcessTransport, said, search_path
from service.workers.shared_memory import create_region

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 30.0
_HEALTHY_S = 60.0
_PING_EVERY_S, _SILENCE_S = 5.0, 30.0
_SNAPSHOT_S = 2.0
_AFTER_DRAIN_S = 3.0
_ENGINE_TRANSFER = 1 << 20  # of this process, which sends no tensors


@dataclass(slots=True)
class _Slot:
    """One front end: its listening socket stays, its process may be another one after a crash."""

    listener: socket.socket
    number: int = 0
    process: subprocess.Popen[bytes] | None = None
    peer: Peer | None = None
    connections: socket.socket | None = None
    connected_to: socket.socket | None = None
    connection: int = 0
    turns: list[str] = field(default_factory=list)  # what it is changing
    has_served: bool = False
    last: Snapshot | None = None


@dataclass(slots=True)
class _Changes:
    """What administrators have changed since the start."""

    unloaded: set[str] = field(default_factory=set)
    regions: dict[str, Action] = field(default_factory=dict)

    def note(self, action: Action) -> None:
        """Remember it for front ends to come."""
        match action.change:
            case Change.LOAD:
                self.unloaded.discard(str(action.name))
            case Change.UNLOAD:
                self.unloaded.add(str(action.name))
            case Change.REGISTER:
                self.regions[str(action.name)] = action
            case Change.UNREGISTER if action.name is None:
                self.regions.clear()
            case Change.UNREGISTER:
                self.regions.pop(str(action.name), None)


class Supervisor:
    """All processes of one server. Event loop only."""

    def __init__(self, settings: Settings, access: Access, engine: str, listeners: list[socket.socket]) -> None:
        self._settings = settings
        self._access = access  # what front ends to come ask for, as those do that are there
        self._slots = [_Slot(listener) for listener in listeners]
        self._numbers = itertools.count(1)
        self._changes = _Changes()
        self._turns = Turns()
        self._served: list[list[Any]] = []  # the keys of the models that front ends were last known to serve
        self._retired: list[Snapshot] = []
        self._waiting = ThreadPoolExecutor(len(listeners), "wait")  # each waits for its front end all the time
        self._attach: socket.socket | None = None
        self._engine = ProcessTransport(
            ProcessOptions(engine, _ENGINE_TRANSFER, settings.light_run_us), self._engine_started
        )
        self._engine_stopped = asyncio.Event()
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Until SIGTERM or SIGINT; every front end has drained then."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        self._engine.start(self._hear)
        tasks = [loop.create_task(self._keep(slot)) for slot in self._slots]
        await asyncio.wait(tasks)
        self._engine.send(Stop())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_AFTER_DRAIN_S):
                await self._engine_stopped.wait()
        self._engine.close()
        for task in tasks:
            task.result()

    # ---- signals

    def _stop(self, number: signal.Signals) -> None:
        """Have every front end drain; a second signal ends them at once."""
        log.info("%s: finishing accepted requests", number.name)
        if self._stopping.is_set():
            self._forward(signal.SIGKILL)
            return
        self._stopping.set()
        for slot in self._slots:
            slot.listener.close()
        self._forward(signal.SIGTERM)

    def _reload(self) -> None:
        self._access.reload()
        self._forward(signal.SIGHUP)

    def _forward(self, number: signal.Signals) -> None:
        for slot in self._slots:
            if slot.process is not None and slot.process.poll() is None:
                slot.process.send_signal(number)

    # ---- the engine

    def _hear(self, report: Report) -> None:
        match report:
            case Stopped():
                self._engine_stopped.set()
            case WorkerLost():
                self._attach = None
                self._served = []
                log.error("%s%s", report.reason, "; it is started again" if report.restarting else "")

    def _engine_started(self, attach: socket.socket) -> None:
        self._attach = attach
        for slot in self._slots:
            self._connect(slot)

    def _connect(self, slot: _Slot) -> None:
        """Give a front end and the engine the two ends of a connection."""
        if self._attach is None or slot.connections is None or slot.connected_to is self._attach:
            return
        slot.connected_to = self._attach
        slot.connection += 1
        near, far = socket.socketpair()
        regions = [create_region(self._settings.transfer_bytes) for _ in range(2)]
        try:
            socket.send_fds(self._attach, [b"%d" % slot.number], [far.fileno(), *regions])
            socket.send_fds(slot.connections, [b"%d" % slot.connection], [near.fileno(), *regions])
        except OSError as error:  # one of both has just ended, and its successor will be connected
            log.info("front end %d is not connected: %s", slot.number, error)
        finally:
            near.close()
            far.close()
            for region in regions:
                os.close(region)

    # ---- front ends

    async def _keep(self, slot: _Slot) -> None:
        """One front end after the other."""
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            status = await self._live(slot)
            if self._stopping.is_set():
                return
            log.error("front end %d ended unexpectedly: %s; it is started again", slot.number, said(status))
            healthy = slot.has_served or time.monotonic() - began > _HEALTHY_S
            failures = 1 if healthy else failures + 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_FIRST_PAUSE_S * 2 ** (failures - 1), _LONGEST_PAUSE_S)):
                    await self._stopping.wait()

    async def _live(self, slot: _Slot) -> int:
        """One front end from its start to its end; its exit status."""
        loop = asyncio.get_running_loop()
        near, far = socket.socketpair()
        slot.connections, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        slot.number, slot.last, slot.connected_to, slot.has_served = next(self._numbers), None, None, False
        with far, theirs:
            descriptors = (slot.listener.fileno(), far.fileno(), theirs.fileno())
            arguments = FrontEndArguments(*descriptors, slot.number, self._settings.model_dump_json())
            slot.process = await loop.run_in_executor(None, _spawn, arguments)
        log.info("front end %d is process %d", slot.number, slot.process.pid)
        slot.peer = Peer(lambda kind, content: self._answer(slot, kind, content))
        await slot.peer.connect(near)
        talking = loop.create_task(slot.peer.run())
        watching = loop.create_task(self._watch(slot))
        self._connect(slot)
        if self._stopping.is_set():
            slot.process.terminate()
        try:
            return await loop.run_in_executor(self._waiting, slot.process.wait)
        finally:
            for task in (talking, watching):
                task.cancel()
            slot.peer.close()
            slot.connections.close()
            slot.peer = slot.connections = None
            while slot.turns:
                self._turns.give_back(slot.turns.pop())
            if slot.last is not None:
                self._retired = [merge([*self._retired, lasting(slot.last)])]
                slot.last = None

    async def _watch(self, slot: _Slot) -> None:
        """End a front end that answers nothing any more: its event loop stands still. While it drains, and long after,
        it is given its time."""
        while True:
            await asyncio.sleep(_PING_EVERY_S)
            try:
                if slot.peer is not None:
                    await slot.peer.ask("ping", timeout=_SILENCE_S)
            except PeerGone:
                continue
            except TimeoutError:
                log.error("front end %d has said nothing for %g s and is ended", slot.number, _SILENCE_S)
                if slot.process is not None:
                    slot.process.kill()
                return

    async def _answer(self, slot: _Slot, kind: str, content: Any) -> Any:
        """What a front end asks."""
        if kind == "hello":
            regions = [action.document() for action in self._changes.regions.values()]
            unloaded, keys = sorted(self._changes.unloaded), self._access.give()
            return {"unloaded": unloaded, "regions": regions, "served": self._served, "keys": keys}
        if kind == "served":
            self._served, slot.has_served = content, True
            return None
        if kind == "reconnect":
            if content == slot.connection:  # else there is a later one already
                slot.connected_to = None
                self._connect(slot)
            return None
        if kind == "turn":
            return await self._grant(slot, content)
        if kind == "done":
            slot.turns.remove(content)
            self._turns.give_back(content)
            return None
        others = [other for other in self._slots if other is not slot and other.peer is not None]
        if kind == "describe":
            return await self._describe([other for other in others if other.has_served], content)
        if kind == "tell":
            self._changes.note(Action.of(content))
            await asyncio.gather(*(self._act(other, content) for other in others))
            return None
        if kind == "collect":
            slot.last = content
            await asyncio.gather(*(self._take(other) for other in others))
            return [*self._retired, *(other.last for other in others if other.last is not None)]
        raise ValueError(f"unknown question {kind!r}")

    async def _grant(self, slot: _Slot, subject: str) -> str:
        """A front end's turn to change something, which it has until it is done or gone; else why not."""
        peer = slot.peer
        try:
            await self._turns.take(subject)
        except Overloaded as error:
            return str(error)
        if slot.peer is peer:
            slot.turns.append(subject)
        else:  # it ended while it waited
            self._turns.give_back(subject)
        return ""

    async def _describe(self, slots: list[_Slot], names: list[str]) -> list[Any]:
        """What a front end that serves models of these names has of them; nothing where none answers."""
        for slot in slots:
            with contextlib.suppress(PeerGone, TimeoutError, RuntimeError):
                if slot.peer is not None:
                    found: list[Any] = await slot.peer.ask("describe", names, timeout=_SNAPSHOT_S)
                    return found
        return []

    async def _act(self, slot: _Slot, action: dict[str, Any]) -> None:
        """Have a front end do what another one has been told; where it cannot, it says so in the log."""
        try:
            if slot.peer is not None:
                await slot.peer.ask("act", action)
        except PeerGone:
            pass  # its successor will be told
        except RuntimeError as error:
            log.warning("front end %d: %s", slot.number, error)

    async def _take(self, slot: _Slot) -> None:
        """What a front end has counted; what it had when it was last asked, if it does not answer."""
        with contextlib.suppress(PeerGone, TimeoutError, RuntimeError):
            if slot.peer is not None:
                slot.last = await slot.peer.ask("snapshot", timeout=_SNAPSHOT_S)


def _spawn(arguments: FrontEndArguments) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "service.frontend", *arguments.to_list()],
        env={**os.environ, "PYTHONPATH": search_path()},
        stdin=subprocess.DEVNULL,
        pass_fds=(arguments.listener, arguments.peer, arguments.connections),
        start_new_session=True,  # signals for the whole group are for the supervisor
    )


def supervise(settings: Settings, access: Access, engine: str, listeners: list[socket.socket]) -> int:
    """Run all processes until SIGTERM or SIGINT; the exit status."""
    for listener in listeners:
        listener.listen(2048)  # what comes before a front end is ready waits
    asyncio.run(Supervisor(settings, access, engine, listeners).run())
    return 0
