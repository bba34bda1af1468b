"""The running service: its models, the worker that runs them, readiness, draining.

Made by `app.py`, used by every route. All of it runs on the event loop; the engine is behind `EngineClient`, the models
are in the `Catalog`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from service.catalog import Catalog
from service.client_memory import ClientMemory
from service.codecs.tensors import Source
from service.errors import Unavailable
from service.handover import HandedOver
from service.merging import Snapshot, merge, take
from service.metrics import Metrics
from service.model import ModelState, ServedModel
from service.preprocess import PreprocessPool
from service.repository import check_name
from service.settings import Settings
from service.siblings import Action, Alone, Change, Siblings
from service.workers.client import EngineClient
from service.workers.clients import first_id
from service.workers.messages import BatchDone, LoadFailed, ModelReady, Report, Unloaded, WorkerLost, WorkerSilent
from service.workers.transport import Transport

log = logging.getLogger(__name__)

_SHUTTING_DOWN = "the server is shutting down"
_STATISTICS_TIMEOUT_S = 2.0
_STOP_S = 1.0  # for closing models when draining has used up its own time


class Serving:
    """One server process. `on_settled` is called whenever no model is loading any more, and when one was unloaded."""

    def __init__(
        self,
        settings: Settings,
        transport: Transport,
        on_settled: Callable[[], None],
        siblings: Siblings,
        client: int,
    ) -> None:
        """`client` is the number under which the engine process knows this one."""
        self.settings = settings
        self.siblings = siblings
        self.end_server: Callable[[], None] = lambda: None
        self.metrics = Metrics()
        self.preprocess = PreprocessPool(settings.preprocess_threads, settings.max_preprocess)
        self.client_memory = ClientMemory(tuple(filter(None, settings.shared_memory_prefixes.split(","))))
        self.tensor_source = Source(settings.max_tensor_elements, self.client_memory)
        self.engine = EngineClient(transport, self._on_report, first_id(client))
        self.models = Catalog(settings, self.metrics, self.engine.send, on_settled)
        self.draining = False
        self._started = asyncio.Event()
        self._refusal = ""  # why no request may begin, whatever the model
        self.finished = False
        self._drain_began = 0.0
        self._watch: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None

    # ---- life

    def start(self, unloaded: frozenset[str] = frozenset(), handed_over: Sequence[HandedOver] = ()) -> None:
        """Scan the repository and load everything in the background, but what is `unloaded` elsewhere, and of what was
        `handed_over` just that."""
        self.engine.start()
        self.models.begin(unloaded, handed_over)
        self._started.set()
        if self.settings.poll_models:
            self._watch = asyncio.get_running_loop().create_task(self._poll(self.settings.poll_models))

    async def _poll(self, every: float) -> None:
        while True:
            await asyncio.sleep(every)
            await self._refresh()

    def refresh(self) -> None:
        """Follow the repository's folder in the background; one time after the other."""
        before, loop = self._refreshing, asyncio.get_running_loop()

        async def in_turn() -> None:
            if before is not None:
                await asyncio.wait([before])
            await self._refresh()

        self._refreshing = loop.create_task(in_turn())

    async def _refresh(self) -> None:
        await self._started.wait()  # a front end's start may wait for what others say, a signal does not
        if self.draining:
            return
        try:
            await self.models.refresh()
        except OSError as error:
            log.error("the model repository cannot be read: %s", error)

    def begin_drain(self) -> None:
        """Refuse new inference from now on; what was accepted goes on."""
        if not self.draining:
            self.draining = True
            self._refusal = _SHUTTING_DOWN
            self._drain_began = time.monotonic()

    async def close(self) -> None:
        """Let the worker finish, within the drain time-out."""
        self.begin_drain()
        for task in (self._watch, self._refreshing):
            if task is not None:
                task.cancel()
        left = self.settings.drain_timeout - (time.monotonic() - self._drain_began)
        try:
            await self.engine.stop(max(left, _STOP_S))
            self.finished = not self.models.is_loading
        except TimeoutError:
            log.error("accepted requests did not finish within %s s", self.settings.drain_timeout)
        self.engine.close()
        self.preprocess.close()
        self.client_memory.close()

    def _on_report(self, report: Report) -> None:
        match report:
            case BatchDone():
                self.models.ran(report)
            case ModelReady():
                self.models.accept(report)
            case LoadFailed():
                self.models.refuse(report)
            case Unloaded():
                self.models.unloaded(report)
            case WorkerLost():
                self._lose_worker(report)
            case WorkerSilent():
                self._note_silence(report)

    def _lose_worker(self, report: WorkerLost) -> None:
        """The worker starts again and loads what was loaded, or was to be, unless the server is shutting down."""
        self.metrics.restarts.inc()
        if report.restarting:
            log.error("%s; it is started again", report.reason)
        else:
            log.error("%s; it is not started again, the server is shutting down", report.reason)
        self._refuse("")
        self.models.lose(report)

    def _note_silence(self, report: WorkerSilent) -> None:
        """The engine's process stands still: requests would only wait for their deadlines. It is ended when that lasts;
        those that it has already may still be answered."""
        if report.seconds:
            log.error("the engine process has said nothing for %.0f s; requests are refused", report.seconds)
            self._refuse("the engine process does not answer")
        else:
            log.warning("the engine process answers again")
            self._refuse("")

    def _refuse(self, reason: str) -> None:
        self._refusal = _SHUTTING_DOWN if self.draining else reason

    # ---- changes by administrators

    async def change(self, action: Action) -> None:
        """Do it, and have it done by the other front ends. Raises what the catalogue or the shared memory raises."""
        self._check(action)
        async with self.siblings.turn(action):
            self._check(action)  # it may have waited long
            if action.change is Change.UNLOAD:  # its memory is back when all have let it go
                await asyncio.gather(self.apply(action), self.siblings.tell(action))
            else:  # what fails here changes nothing elsewhere
                await self.apply(action)
                await self.siblings.tell(action)

    def _check(self, action: Action) -> None:
        if action.change in (Change.LOAD, Change.UNLOAD):
            self.check_not_draining()
        if action.change is Change.LOAD:
            check_name(str(action.name))
        elif action.change is Change.UNLOAD:
            self.models.check_known(str(action.name))

    async def apply(self, action: Action) -> None:
        """Do it here. Raises what the catalogue or the shared memory raises."""
        match action.change:
            case Change.LOAD:
                await self.models.load(str(action.name))
            case Change.UNLOAD:
                await self.models.unload(str(action.name))
            case Change.REGISTER:
                self.client_memory.register(str(action.name), action.key, action.offset, action.nbytes)
            case Change.UNREGISTER:
                self.client_memory.unregister(action.name)

    # ---- counters

    def snapshot(self) -> Snapshot:
        """What this process has counted."""
        models = self.models.all_models()
        statistics = {str(m.key): m.metrics.statistics.document(m.key.name, m.key.version) for m in models}
        return take(self.metrics.registry, self.metrics.engine, statistics)

    async def totals(self) -> Snapshot | None:
        """What all front ends have counted; None where there is only this one. Raises Unavailable."""
        if isinstance(self.siblings, Alone):
            return None
        own = self.snapshot()
        return merge([own, *await self.siblings.collect(own)])

    # ---- questions

    def not_ready(self) -> str:
        """Why the server is not ready; empty when it is. A model that is added to a server that is ready changes
        nothing about that."""
        if self._refusal:
            return self._refusal
        models = self.models.all_models()
        loading = [model for model in models if model.state is ModelState.LOADING and model.expected]
        if loading:
            return loading[0].reason or f"loading {', '.join(str(model.key) for model in loading[:5])}"
        if not any(model.state is ModelState.READY for model in models):
            return "no model can be served"
        return ""

    def accepting(self, name: str, version: str | None = None) -> ServedModel:
        """The version of a model that infers. Raises NotFound; Unavailable while draining, while the engine does not
        answer, or when the model is not ready."""
        if self._refusal:
            raise Unavailable(self._refusal)
        model = self.models.find(name, version)
        model.check_ready()
        return model

    def check_not_draining(self) -> None:
        """Raises Unavailable while draining."""
        if self.draining:
            raise Unavailable(_SHUTTING_DOWN)

    async def refresh_statistics(self) -> None:
        """Fetch the engine's counters for the metrics; the last ones stay if the worker does not answer in time."""
        try:
            self.metrics.engine.update(await self.engine.statistics(_STATISTICS_TIMEOUT_S))
        except TimeoutError:
            log.warning("the engine did not answer a statistics request within %s s", _STATISTICS_TIMEOUT_S)
