"""Which models there are and in what state, and how they come and go while others are served. Event loop only.

Made by `Serving`, which hands it the worker's reports about models; routes ask it and, for administrators, change it.
A model that replaces another is loaded and warm before it takes over; the one before it is unloaded when its last
request has been answered, so that no request is lost. What fails to load leaves what was served before as it was.
"""

import asyncio
import logging
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from service.codecs.images import image_size
from service.errors import InvalidRequest, NotFound, Overloaded, Unavailable
from service.kernel_metrics import LoadedModel
from service.metrics import Metrics
from service.model import ModelState, ServedModel
from service.model_config import batching_options
from service.repository import ModelFolder, Repository, check_name
from service.settings import Settings
from service.workers.messages import (
    BatchDone,
    Command,
    LoadFailed,
    LoadModel,
    ModelKey,
    ModelReady,
    Unload,
    Unloaded,
    WorkerLost,
)

log = logging.getLogger(__name__)

_MOST_WAITING = 8  # changes of one model that may wait for each other
_UNLOADED = "unloaded"


class Catalog:
    """The models of one server process. `send` gives a command to the worker; `on_settled` is called whenever no model
    is loading any more, and after each unloading."""

    def __init__(
        self, settings: Settings, metrics: Metrics, send: Callable[[Command], None], on_settled: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._send = send
        self._on_settled = on_settled
        self._repository = Repository(settings.models)
        self._models: dict[str, dict[int, ServedModel]] = {}
        self._broken: dict[str, str] = {}
        self._by_key: dict[ModelKey, ServedModel] = {}  # also those that are not in `_models` yet
        self._loading: dict[ModelKey, asyncio.Future[str]] = {}  # to the reason of a failure, or to nothing
        self._leaving: dict[ModelKey, asyncio.Future[None]] = {}
        self._failed: dict[tuple[str, int], int] = {}  # generations that are not tried again unasked
        self._unloaded: set[str] = set()  # by an administrator, who alone brings them back
        self._changes: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._waiting: dict[str, int] = defaultdict(int)

    # ---- questions

    def all_models(self) -> list[ServedModel]:
        """Every version of every model that could be read, by name and version."""
        return [self._models[name][version] for name in sorted(self._models) for version in sorted(self._models[name])]

    def broken(self) -> dict[str, str]:
        """Names of folders that cannot be read, and why."""
        return dict(self._broken)

    def unknown(self) -> list[str]:
        """Names of folders in the repository that were never asked to be loaded. Reads the disk."""
        return [name for name in self._repository.names() if name not in self._models and name not in self._broken]

    def versions(self, name: str) -> list[ServedModel]:
        """The versions of one model, lowest first. Raises NotFound, or Unavailable for a broken folder."""
        if name in self._broken:
            raise Unavailable(f"model '{name}' is unavailable: {self._broken[name]}")
        if name not in self._models:
            raise NotFound(f"there is no model '{name[:128]}'; GET /v1/models lists them")
        return [self._models[name][version] for version in sorted(self._models[name])]

    def find(self, name: str, version: str | None = None) -> ServedModel:
        """A version of a model: the one asked for, else the highest that is ready, or will be. Raises NotFound,
        Unavailable."""
        if version is None and name not in self._broken:
            there = self._models.get(name, {})
            ready = [number for number, model in there.items() if model.state is ModelState.READY]
            if ready:
                return there[max(ready)]
        versions = self.versions(name)
        if version is None:
            usable = [model for model in versions if model.state is not ModelState.UNAVAILABLE]
            return (usable or versions)[-1]
        for model in versions:
            if str(model.key.version) == version:
                return model
        raise NotFound(f"model '{name}' has no version '{version[:32]}'")

    @property
    def is_loading(self) -> bool:
        """Whether the worker is at a model, or has one to begin with."""
        return bool(self._loading)

    # ---- changes

    def begin(self, unloaded: frozenset[str] = frozenset()) -> None:
        """Load everything there is but the `unloaded`, in the background; the server is not ready before."""
        self._unloaded |= unloaded
        for folder in self._repository.scan():
            if folder.problem:
                log.warning("model %s cannot be loaded: %s", folder.name, folder.problem)
                self._broken[folder.name] = folder.problem
                continue
            if folder.name in unloaded:
                for version, _ in folder.versions:
                    model = self._known(folder, self._key(folder, version), expected=False)
                    model.state, model.reason = ModelState.UNAVAILABLE, _UNLOADED
                    self._models.setdefault(folder.name, {})[version] = model
                continue
            for version, _ in folder.versions:
                self._start(folder, self._key(folder, version), expected=True)
            self._note_broken_versions(folder)
        if not self._models:
            log.warning("no model can be loaded from %s", self._settings.models)

    async def load(self, name: str) -> None:
        """Load a model, or what of it has changed on the disk; returns when it is served. Raises InvalidRequest with
        the reason where it cannot be, and then leaves what was served as it was; NotFound, Overloaded."""
        async with self._changing(check_name(name)):
            folder = await asyncio.to_thread(self._repository.find, name)
            if folder is None:
                raise NotFound(f"there is no model '{name}' in the repository")
            self._unloaded.discard(name)
            reasons = await self._load(folder, again=True)
            if reasons:
                raise InvalidRequest(f"model '{name}' cannot be loaded: {'; '.join(reasons)}")

    async def unload(self, name: str) -> None:
        """Serve a model no more; returns when its requests are answered and its memory is back. Raises NotFound,
        Overloaded."""
        async with self._changing(check_name(name)):
            if name not in self._models and name not in self._broken:
                raise NotFound(f"there is no model '{name}'; GET /v1/models lists them")
            self._unloaded.add(name)
            await self._wait_for_loads(name)
            await self._retire(self._models.get(name, {}).values(), _UNLOADED)

    async def refresh(self) -> None:
        """Follow the disk: load what is new or has changed, unload what is gone. What an administrator unloaded stays
        unloaded, and what failed to load is tried again only when it has changed."""
        folders = {folder.name: folder for folder in await asyncio.to_thread(self._repository.scan)}
        for name in sorted({*folders, *self._models, *self._broken}):
            async with self._changing(name, most_waiting=None):
                if name in self._unloaded:
                    continue
                if name in folders:
                    for reason in await self._load(folders[name], again=False):
                        log.warning("model %s is not reloaded: %s", name, reason)
                    continue
                log.info("model %s is no longer in the repository", name)
                await self._wait_for_loads(name)
                await self._retire(self._models.pop(name, {}).values(), "it is no longer in the repository")
                self._broken.pop(name, None)

    @asynccontextmanager
    async def _changing(self, name: str, most_waiting: int | None = _MOST_WAITING) -> AsyncIterator[None]:
        """One change of a model at a time."""
        if most_waiting is not None and self._waiting[name] >= most_waiting:
            raise Overloaded(f"{most_waiting} changes of model '{name}' are under way already", retry_after=1.0)
        self._waiting[name] += 1
        try:
            async with self._changes[name]:
                yield
        finally:
            self._waiting[name] -= 1
            if not self._waiting[name]:  # names are what clients send
                del self._waiting[name], self._changes[name]

    async def _load(self, folder: ModelFolder, again: bool) -> list[str]:
        """Make what is served of a model what its folder has; why not, where that is impossible. `again` tries what
        has failed before and not changed."""
        if folder.problem:
            if folder.name not in self._models:
                self._broken[folder.name] = folder.problem
            return [folder.problem]
        self._broken.pop(folder.name, None)
        keys = [self._key(folder, version) for version, _ in folder.versions]
        for key in keys:
            known = self._models.get(folder.name, {}).get(key.version)
            if known is not None and known.key == key and known.state is not ModelState.UNAVAILABLE:
                continue
            if not again and self._failed.get((key.name, key.version)) == key.generation:
                continue
            if key in self._leaving:  # what is on its way out is what comes in
                await self._leaving[key]
            self._start(folder, key, expected=False)
        waited = {key: self._loading[key] for key in keys if key in self._loading}
        reasons = [await asyncio.shield(future) for future in waited.values()]
        self._note_broken_versions(folder)
        there = {version for version, _ in (*folder.versions, *folder.broken)}
        models = self._models[folder.name]
        gone = [models.pop(version) for version in list(models) if version not in there]
        await self._retire(gone, "the version is no longer in the repository")
        return [reason for reason in reasons if reason]

    def _key(self, folder: ModelFolder, version: int) -> ModelKey:
        return ModelKey(folder.name, version, self._repository.generation(folder, version))

    def _start(self, folder: ModelFolder, key: ModelKey, expected: bool) -> None:
        """Have a model loaded. It is seen at once where nothing is served under its name and version."""
        model = self._known(folder, key, expected)
        settings = self._settings
        command = LoadModel(
            key=key,
            path=str(dict(folder.versions)[key.version]),
            device=settings.device,
            precision=(folder.config.precision or settings.precision).value,
            threads=settings.threads,
            batching=model.options,
            image_size=image_size(folder.config.images),
            packed=(folder.config.packed or settings.packed).value,
        )
        self._by_key[key] = model
        versions = self._models.setdefault(key.name, {})
        served = versions.get(key.version)
        if served is None or served.state is ModelState.UNAVAILABLE:
            versions[key.version] = model
        self._loading[key] = asyncio.get_running_loop().create_future()
        self._send(command)

    def _known(self, folder: ModelFolder, key: ModelKey, expected: bool) -> ServedModel:
        options = batching_options(folder.config.batching)
        return ServedModel(key, folder, options, self._metrics.model(key), expected)

    def _note_broken_versions(self, folder: ModelFolder) -> None:
        versions = self._models.setdefault(folder.name, {})
        for version, reason in folder.broken:
            served = versions.get(version)
            if served is None or served.state is ModelState.UNAVAILABLE:
                versions[version] = self._known(folder, ModelKey(folder.name, version), expected=False)
                self._refuse(versions[version], reason)

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
        self._settle(model.key, reason)
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
        """A model is loaded and warm: it takes over."""
        model = self._by_key.get(report.key)
        if model is None or report.key in self._leaving:
            return
        try:
            model.accept(report)
        except ValueError as error:
            self._send(Unload(report.key))
            self.refuse(LoadFailed(report.key, str(error)))
            return
        versions = self._models.setdefault(report.key.name, {})
        before = versions.get(report.key.version)
        versions[report.key.version] = model
        if before is not None and before is not model and before.state is not ModelState.UNAVAILABLE:
            self._metrics.engine.unloaded(before.key)
            self._leave(before, "a newer one has taken over")
        loaded = LoadedModel(report.device, report.load_seconds, report.fallback_ops)
        self._metrics.engine.loaded(report.key, loaded)
        self._failed.pop((report.key.name, report.key.version), None)
        log.info(
            "model %s is ready after %.2f s: %s, batching: %s",
            report.key,
            report.load_seconds,
            model.task,
            report.batching_reason,
        )
        self._settle(report.key, "")

    def refuse(self, report: LoadFailed) -> None:
        """A model cannot be loaded; what is served in its place stays."""
        model = self._by_key.pop(report.key, None)
        if model is None:
            return
        model.metrics.settle()
        self._failed[report.key.name, report.key.version] = report.key.generation
        self._refuse(model, report.reason)
        self._settle(report.key, model.reason)

    def _refuse(self, model: ServedModel, reason: str) -> None:
        """A model cannot be served; clients read why, and need not know where the repository lies."""
        model.state = ModelState.UNAVAILABLE
        model.reason = reason.replace(f"{self._repository.root}{os.sep}", "")
        log.warning("model %s is unavailable: %s", model.key, model.reason)

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
            if report.restarting:
                model.state, model.reason = ModelState.LOADING, "the engine process is being restarted"
                model.expected = model.expected or model.ready is not None
                self._loading.setdefault(model.key, asyncio.get_running_loop().create_future())
            else:
                model.state, model.reason = ModelState.UNAVAILABLE, report.reason
                self._settle(model.key, report.reason)

    def _settle(self, key: ModelKey, reason: str) -> None:
        future = self._loading.pop(key, None)
        if future is not None:
            future.set_result(reason)
        if not self._loading:
            self._on_settled()
