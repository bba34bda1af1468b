"""How models come and go while others are served. Which there are is in listing.py. Event loop only.

Made by `Serving`, which hands it the worker's reports about models; routes change it for administrators.
A model that replaces another is loaded and warm before it takes over; the one before it is unloaded when its last
request has been answered, so that no request is lost. All versions of a model that change, change at once, and only if
every one of them can: what fails to load leaves the model as it was. At the start nothing is served yet that could be
left as it was, and what loads is served.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Sequence

from service.errors import InvalidRequest, NotFound
from service.handover import HandedOver
from service.kernel_metrics import LoadedModel
from service.listing import Listing
from service.metrics import Metrics
from service.model import ModelState, ServedModel
from service.model_config import batching_options
from service.repository import Contents, ModelFolder, Repository, check_name
from service.settings import Settings
from service.turns import Turns
from service.workers.messages import (
    BatchDone,
    Command,
    LoadFailed,
    ModelKey,
    ModelReady,
    Unload,
    Unloaded,
    WorkerLost,
)

log = logging.getLogger(__name__)

_UNLOADED = "unloaded"


class Catalog(Listing):
    """The models of one server process. `send` gives a command to the worker; `on_settled` is called whenever no model
    is loading any more, and after each unloading."""

    def __init__(
        self, settings: Settings, metrics: Metrics, send: Callable[[Command], None], on_settled: Callable[[], None]
    ) -> None:
        super().__init__(Repository(settings.models))
        self._settings = settings
        self._metrics = metrics
        self._send = send
        self._on_settled = on_settled
        self._by_key: dict[ModelKey, ServedModel] = {}  # also those that are not in `_models` yet
        self._loading: dict[ModelKey, asyncio.Future[None]] = {}
        self._held: set[ModelKey] = set()  # they take over when all that change with them can
        self._leaving: dict[ModelKey, asyncio.Future[None]] = {}
        self._tried: dict[str, Contents] = {}  # what of each model is not tried again unasked
        self._unloaded: set[str] = set()  # by an administrator, who alone brings them back
        self._turns = Turns()

    async def wait_for(self, served: Iterable[ModelKey], seconds: float) -> None:
        """Until no version that is served elsewhere is loading here any more, but not longer than so many seconds."""
        versions = {(key.name, key.version) for key in served}
        waited = [future for key, future in self._loading.items() if (key.name, key.version) in versions]
        if waited:
            await asyncio.wait(waited, timeout=seconds)

    @property
    def is_loading(self) -> bool:
        """Whether the worker is at a model, or has one to begin with."""
        return bool(self._loading)

    # ---- changes

    def begin(self, unloaded: frozenset[str] = frozenset(), handed_over: Sequence[HandedOver] = ()) -> None:
        """Load everything there is but the `unloaded`, in the background; the server is not ready before. Of models
        that were `handed_over` what others serve, whatever the disk has."""
        self._unloaded |= unloaded
        for given in handed_over:
            if given.reason:
                self._withhold(given.folder, given.key, given.reason)
            else:
                self._start(given.folder, given.key, expected=True)
        names = {given.key.name for given in handed_over}
        for folder in self._repository.scan():
            if folder.name in names:
                continue
            contents = self._tried[folder.name] = self._repository.contents(folder)
            if contents.problem:
                log.warning("model %s cannot be loaded: %s", folder.name, contents.problem)
                self._broken[folder.name] = contents.problem
                continue
            if folder.name in unloaded:
                self._explain(folder, {}, _UNLOADED)
                continue
            for key in contents.keys:
                self._start(folder, key, expected=True)
            for version, reason in contents.broken:
                log.warning("model %s/%d cannot be loaded: %s", folder.name, version, reason)
            self._explain(folder, dict(contents.broken))
        if not self._models:
            log.warning("no model can be loaded from %s", self._settings.models)

    async def load(self, name: str) -> None:
        """Load a model, or what of it has changed on the disk; returns when it is served. Raises InvalidRequest with
        the reason where it cannot be, and then leaves all of it as it was; NotFound, Overloaded."""
        async with self._turns.turn(check_name(name)):
            folder = await asyncio.to_thread(self._repository.find, name)
            if folder is None:
                raise NotFound(f"there is no model '{name}' in the repository")
            contents = self._repository.contents(folder)
            problem = contents.problem or _said(await self._load(folder, contents))
            if problem:
                log.warning("model %s stays as it was: %s", name, problem)
                raise InvalidRequest(f"model '{name}' cannot be loaded: {problem}")

    async def unload(self, name: str) -> None:
        """Serve a model no more; returns when its requests are answered and its memory is back. Raises NotFound,
        Overloaded."""
        async with self._turns.turn(check_name(name)):
            self.check_known(name)
            self._unloaded.add(name)
            await self._wait_for_loads(name)
            await self._retire(self._models.get(name, {}).values(), _UNLOADED)

    async def refresh(self) -> None:
        """Follow the disk: load what is new or has changed, unload what is gone. What an administrator unloaded stays
        unloaded, and is not listed when it is gone; what failed to load is tried again only when it has changed, or if
        it could not be read."""
        names = await asyncio.to_thread(self._repository.names)
        for name in sorted({*names, *self._models, *self._broken}):
            async with self._turns.turn(name, bounded=False):
                if name not in self._unloaded:
                    await self._follow(name)
                elif await asyncio.to_thread(self._repository.find, name) is None:
                    await self._forget(name)

    async def _follow(self, name: str) -> None:
        folder = await asyncio.to_thread(self._repository.find, name)
        if folder is not None:
            contents = self._repository.contents(folder)
            if contents != self._tried.get(name):
                self._tried[name] = contents
                await self._try(folder, contents)
            return
        await self._forget(name)

    async def _forget(self, name: str) -> None:
        """The model is gone from the disk."""
        log.info("model %s is no longer in the repository", name)
        await self._wait_for_loads(name)
        await self._retire(self._models.pop(name, {}).values(), "it is no longer in the repository")
        self._broken.pop(name, None)
        self._tried.pop(name, None)

    async def _try(self, folder: ModelFolder, contents: Contents) -> None:
        """Load what is on the disk; where that is impossible, the log and the index say why."""
        if contents.problem:
            log.warning("model %s stays as it was: %s", folder.name, contents.problem)
            if folder.name not in self._models:
                self._broken[folder.name] = contents.problem
            return
        problems = await self._load(folder, contents)
        if problems:
            log.warning("model %s stays as it was: %s", folder.name, _said(problems))
            self._broken.pop(folder.name, None)
            self._explain(folder, problems)

    async def _load(self, folder: ModelFolder, contents: Contents) -> dict[int, str]:
        """Make what is served of a model what its folder has, all of it at once. What is wrong with which version,
        where that is impossible: then nothing has changed."""
        await self._wait_for_loads(folder.name)
        if contents.broken:
            return dict(contents.broken)
        return await self._replace(folder, [key for key in contents.keys if not self._serves(key)])

    async def _replace(self, folder: ModelFolder, keys: list[ModelKey]) -> dict[int, str]:
        """Have these loaded and warmed up, and let them take over together; versions that the folder has no more go.
        Why versions cannot be loaded; then none has taken over, and the memory of those that could is back."""
        for key in keys:
            if key in self._leaving:  # what is on its way out is what comes in
                await asyncio.shield(self._leaving[key])
        before = dict(self._models.get(folder.name, {}))
        self._held.update(keys)
        models = [self._start(folder, key, expected=False) for key in keys]
        problems: dict[int, str] | None = None
        leaving: list[asyncio.Future[None]] = []
        try:
            while waited := [self._loading[key] for key in keys if key in self._loading]:
                await asyncio.shield(waited[0])  # again where the worker was lost meanwhile
            problems = {model.key.version: model.reason for model in models if model.state is ModelState.UNAVAILABLE}
        finally:
            self._held.difference_update(keys)
            self._models[folder.name] = before
            if problems == {}:
                self._commit(folder, models)
            else:
                usable = [model for model in models if model.state is not ModelState.UNAVAILABLE]
                leaving = [self._leave(model, "another version of it cannot be loaded") for model in usable]
                if not before:
                    del self._models[folder.name]
            if keys and not self._loading:
                self._on_settled()
        for future in leaving:
            await asyncio.shield(future)
        return problems

    def _commit(self, folder: ModelFolder, models: list[ServedModel]) -> None:
        """All at once: these take over, and what the folder has no more is not served any more."""
        self._broken.pop(folder.name, None)
        self._unloaded.discard(folder.name)
        for model in models:
            self._take_over(model)
        served, there = self._models[folder.name], {version for version, _ in folder.versions}
        for version in [version for version in served if version not in there]:
            gone = served.pop(version)
            if gone.state is not ModelState.UNAVAILABLE:
                self._leave(gone, "the version is no longer in the repository")

    def _serves(self, key: ModelKey) -> bool:
        served = self._models.get(key.name, {}).get(key.version)
        return served is not None and served.key == key and served.state is ModelState.READY

    def _start(self, folder: ModelFolder, key: ModelKey, expected: bool) -> ServedModel:
        """Have a model loaded. It is seen at once where nothing is served under its name and version."""
        model = self._known(folder, key, expected)
        self._by_key[key] = model
        versions = self._models.setdefault(key.name, {})
        served = versions.get(key.version)
        if served is None or served.state is ModelState.UNAVAILABLE:
            versions[key.version] = model
        self._loading[key] = asyncio.get_running_loop().create_future()
        self._send(model.load_command(self._settings))
        return model

    def _known(self, folder: ModelFolder, key: ModelKey, expected: bool) -> ServedModel:
        options = batching_options(folder.config.batching)
        return ServedModel(key, folder, options, self._metrics.model(key), expected)

    def _explain(self, folder: ModelFolder, problems: dict[int, str], otherwise: str = "") -> None:
        """Say of every version of which nothing is served why; of those that are no problem themselves, that others
        are, or `otherwise`."""
        others = f"not loaded, because version {', '.join(map(str, problems))} cannot be"
        versions = self._models.get(folder.name, {})
        for version in (number for number, _ in (*folder.versions, *folder.broken)):
            served = versions.get(version)
            if served is None or served.state is ModelState.UNAVAILABLE:
                reason = problems.get(version) or otherwise or others
                self._withhold(folder, ModelKey(folder.name, version), reason)

    def _withhold(self, folder: ModelFolder, key: ModelKey, reason: str) -> None:
        """Show a version that is not served, and why."""
        model = self._known(folder, key, expected=False)
        self._refuse(model, reason)
        self._models.setdefault(key.name, {})[key.version] = model

    async def _wait_for_loads(self, name: str) -> None:
        for key, future in list(self._loading.items()):
            if key.name == name:
                await asyncio.shield(future)

    async def _retire(self, models: Iterable[ServedModel], reason: str) -> None:
        """Serve these no more; returns when their memory is back."""
        waited = [self._leave(model, reason) for model in models if model.state is ModelState.READY]
        for future in waited:
            await asyncio.shield(future)

    def _leave(self, model: ServedModel, reason: str) -> asyncio.Future[None]:
        """Accept nothing more for a model, and unload it when its last request is answered."""
        model.state, model.reason = ModelState.UNAVAILABLE, reason
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._leaving[model.key] = future
        self._settle(model.key)
        log.info("model %s is unloaded: %s", model.key, reason)
        model.when_unused(lambda: self._send(Unload(model.key)))
        return future

    # ---- what the worker says

    def ran(self, report: BatchDone) -> None:
        """A batch was computed."""
        model = self._by_key.get(report.key)
        if model is not None:
            model.metrics.ran(report)

    def accept(self, report: ModelReady) -> None:
        """A model is loaded and warm: it takes over, or waits for those that change with it."""
        model = self._by_key.get(report.key)
        if model is None or report.key in self._leaving:
            return
        try:
            model.accept(report)
        except ValueError as error:
            self._send(Unload(report.key))
            self.refuse(LoadFailed(report.key, str(error)))
            return
        log.info(
            "model %s is ready after %.2f s: %s, batching: %s",
            report.key,
            report.load_seconds,
            model.task,
            report.batching_reason,
        )
        if report.key not in self._held:
            self._take_over(model)
        self._settle(report.key)

    def _take_over(self, model: ServedModel) -> None:
        """From now on it is the one that requests get."""
        ready = model.specs
        model.state, model.reason = ModelState.READY, ""
        versions = self._models.setdefault(model.key.name, {})
        before = versions.get(model.key.version)
        versions[model.key.version] = model
        if before is not None and before is not model and before.state is not ModelState.UNAVAILABLE:
            self._metrics.engine.unloaded(before.key)
            self._leave(before, "a newer one has taken over")
        self._metrics.engine.loaded(model.key, LoadedModel(ready.device, ready.load_seconds, ready.fallback_ops))

    def refuse(self, report: LoadFailed) -> None:
        """A model cannot be loaded; what is served in its place stays."""
        model = self._by_key.pop(report.key, None)
        if model is None:
            return
        model.metrics.settle()
        if report.unread:  # a disk that comes back has the same files on it
            self._tried.pop(report.key.name, None)
        self._refuse(model, report.reason)
        log.warning("model %s cannot be loaded: %s", model.key, model.reason)
        self._settle(report.key)

    def _refuse(self, model: ServedModel, reason: str) -> None:
        """A model cannot be served; clients read why, and need not know where the repository lies."""
        model.state = ModelState.UNAVAILABLE
        model.reason = reason.replace(f"{self._repository.root}{os.sep}", "")

    def unloaded(self, report: Unloaded) -> None:
        """A model's memory is back."""
        future = self._leaving.pop(report.key, None)
        if future is None:  # refused when it was loaded already
            return
        model = self._by_key.pop(report.key, None)
        if model is not None:
            model.metrics.settle()
        self._metrics.engine.unloaded(report.key)
        future.set_result(None)
        self._on_settled()

    def lose(self, report: WorkerLost) -> None:
        """The worker is gone, and every model with it until it has started again."""
        for model in self._by_key.values():
            if model.key in self._leaving:
                continue
            was_ready = model.state is ModelState.READY
            if report.restarting:
                model.state, model.reason = ModelState.LOADING, "the engine process is being restarted"
                model.expected = model.expected or was_ready
                self._loading.setdefault(model.key, asyncio.get_running_loop().create_future())
            else:
                model.state, model.reason = ModelState.UNAVAILABLE, report.reason
                self._settle(model.key)

    def _settle(self, key: ModelKey) -> None:
        future = self._loading.pop(key, None)
        if future is None:
            return
        future.set_result(None)
        if not self._loading and not self._held:
            self._on_settled()


def _said(problems: dict[int, str]) -> str:
    return "; ".join(f"version {version}: {reason}" for version, reason in problems.items())
