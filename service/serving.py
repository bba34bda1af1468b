"""The running service: which models there are and in what state, the worker that runs them, readiness, draining.

Made by `app.py`, used by every route. All of it runs on the event loop; the engine is behind `EngineClient`.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace

from service.codecs.images import image_size
from service.errors import NotFound, Unavailable
from service.kernel_metrics import LoadedModel
from service.metrics import Metrics
from service.model import ModelState, ServedModel
from service.model_config import BatchingConfig
from service.preprocess import PreprocessPool
from service.repository import ModelFolder, Repository
from service.settings import Settings
from service.statistics import ModelStatistics
from service.workers.client import EngineClient
from service.workers.messages import (
    BatchDone,
    BatchingOptions,
    LoadFailed,
    LoadModel,
    ModelKey,
    ModelReady,
    Report,
    Unload,
    WorkerLost,
)
from service.workers.transport import Transport

log = logging.getLogger(__name__)

_STATISTICS_TIMEOUT_S = 2.0
_STOP_S = 1.0  # for closing models when draining has used up its own time


class Serving:
    """The models of one server process. `on_loaded` is called whenever no model is loading any more."""

    def __init__(self, settings: Settings, transport: Transport, on_loaded: Callable[[], None]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.preprocess = PreprocessPool(settings.preprocess_threads, settings.max_preprocess)
        self.engine = EngineClient(transport, self._on_report)
        self._on_loaded = on_loaded
        self.draining = False
        self.finished = False
        self._drain_began = 0.0
        self._repository = Repository(settings.models)
        self._models: dict[str, dict[int, ServedModel]] = {}
        self._broken: dict[str, str] = {}

    # ---- life

    def start(self) -> None:
        """Scan the repository and load everything in the background."""
        self.engine.start()
        for folder in self._repository.scan():
            if folder.problem:
                log.warning("model %s cannot be loaded: %s", folder.name, folder.problem)
                self._broken[folder.name] = folder.problem
            else:
                self._models[folder.name] = {version: self._load(folder, version) for version, _ in folder.versions}
                for version, reason in folder.broken:
                    key = ModelKey(folder.name, version)
                    self._models[folder.name][version] = self._known(folder, key)
                    self._refuse(key, reason)
        if not self._models:
            log.warning("no model can be loaded from %s", self.settings.models)

    def _load(self, folder: ModelFolder, version: int) -> ServedModel:
        key = ModelKey(folder.name, version)
        served = self._known(folder, key)
        settings = self.settings
        command = LoadModel(
            key=key,
            path=str(dict(folder.versions)[version]),
            device=settings.device,
            precision=(folder.config.precision or settings.precision).value,
            threads=settings.threads,
            batching=served.options,
            image_size=image_size(folder.config.images),
        )
        self.engine.send(command)
        return served

    def _known(self, folder: ModelFolder, key: ModelKey) -> ServedModel:
        options = _batching_options(folder.config.batching)
        return ServedModel(key, folder, options, self.metrics.model(key), ModelStatistics())

    def begin_drain(self) -> None:
        """Refuse new inference from now on; what was accepted goes on."""
        if not self.draining:
            self.draining = True
            self._drain_began = time.monotonic()

    async def close(self) -> None:
        """Let the worker finish, within the drain time-out."""
        self.begin_drain()
        left = self.settings.drain_timeout - (time.monotonic() - self._drain_began)
        try:
            await self.engine.stop(max(left, _STOP_S))
            self.finished = not any(model.state is ModelState.LOADING for model in self.all_models())
        except TimeoutError:
            log.error("accepted requests did not finish within %s s", self.settings.drain_timeout)
        self.engine.close()
        self.preprocess.close()

    def _on_report(self, report: Report) -> None:
        match report:
            case BatchDone():
                model = self._models[report.key.name][report.key.version]
                model.metrics.ran(report)
                model.statistics.ran(report)
            case ModelReady():
                self._accept(report)
                self._check_loaded()
            case LoadFailed():
                self._refuse(report.key, report.reason)
                self._check_loaded()
            case WorkerLost():
                self._lose_worker(report)

    def _check_loaded(self) -> None:
        if not any(model.state is ModelState.LOADING for model in self.all_models()):
            self._on_loaded()

    def _accept(self, report: ModelReady) -> None:
        model = self._models[report.key.name][report.key.version]
        try:
            model.accept(report)
        except ValueError as error:
            self.engine.send(Unload(report.key))
            self._refuse(report.key, str(error))
            return
        loaded = LoadedModel(report.device, report.load_seconds, report.fallback_ops)
        self.metrics.engine.loaded(report.key, loaded)
        log.info(
            "model %s is ready after %.2f s: %s, batching: %s",
            report.key,
            report.load_seconds,
            model.task,
            report.batching_reason,
        )

    def _lose_worker(self, report: WorkerLost) -> None:
        """The worker starts again and loads what was loaded, or was to be, unless the server is shutting down."""
        self.metrics.restarts.inc()
        if report.restarting:
            log.error("%s; it is started again", report.reason)
            state, reason = ModelState.LOADING, "the engine process is being restarted"
        else:
            log.error("%s; it is not started again, the server is shutting down", report.reason)
            state, reason = ModelState.UNAVAILABLE, report.reason
        for model in self.all_models():
            if model.state is not ModelState.UNAVAILABLE:
                model.state, model.reason = state, reason

    def _refuse(self, key: ModelKey, reason: str) -> None:
        """A model cannot be served; clients read why, and need not know where the repository lies."""
        model = self._models[key.name][key.version]
        reason = reason.replace(f"{self._repository.root}{os.sep}", "")
        model.state, model.reason = ModelState.UNAVAILABLE, reason
        log.warning("model %s is unavailable: %s", key, reason)

    # ---- questions

    def not_ready(self) -> str:
        """Why the server is not ready; empty when it is."""
        if self.draining:
            return "the server is shutting down"
        models = self.all_models()
        loading = [model for model in models if model.state is ModelState.LOADING]
        if loading:
            return loading[0].reason or f"loading {', '.join(str(model.key) for model in loading[:5])}"
        if not any(model.state is ModelState.READY for model in models):
            return "no model can be served"
        return ""

    def all_models(self) -> list[ServedModel]:
        """Every version of every model that could be read, by name and version."""
        return [self._models[name][version] for name in sorted(self._models) for version in sorted(self._models[name])]

    def versions(self, name: str) -> list[ServedModel]:
        """The versions of one model, lowest first. Raises NotFound, or Unavailable for a broken folder."""
        if name in self._broken:
            raise Unavailable(f"model '{name}' is unavailable: {self._broken[name]}")
        if name not in self._models:
            raise NotFound(f"there is no model '{name[:128]}'; GET /v1/models lists them")
        return [self._models[name][version] for version in sorted(self._models[name])]

    def broken(self) -> dict[str, str]:
        """Names of folders that cannot be read, and why."""
        return dict(self._broken)

    def find(self, name: str, version: str | None = None) -> ServedModel:
        """A version of a model: the one asked for, else the highest usable one. Raises NotFound, Unavailable."""
        versions = self.versions(name)
        if version is None:
            usable = [model for model in versions if model.state is not ModelState.UNAVAILABLE]
            return (usable or versions)[-1]
        for model in versions:
            if str(model.key.version) == version:
                return model
        raise NotFound(f"model '{name}' has no version '{version[:32]}'")

    def accepting(self, name: str, version: str | None = None) -> ServedModel:
        """Like `find`, for inference. Raises also Unavailable while draining or when the model is not ready."""
        if self.draining:
            raise Unavailable("the server is shutting down", retry_after=1.0)
        model = self.find(name, version)
        _ = model.specs
        return model

    async def refresh_statistics(self) -> None:
        """Fetch the engine's counters for the metrics; the last ones stay if the worker does not answer in time."""
        try:
            self.metrics.engine.update(await self.engine.statistics(_STATISTICS_TIMEOUT_S))
        except TimeoutError:
            log.warning("the engine did not answer a statistics request within %s s", _STATISTICS_TIMEOUT_S)


def _batching_options(config: BatchingConfig) -> BatchingOptions:
    options = BatchingOptions()
    return replace(
        options,
        max_batch=config.max_batch or options.max_batch,
        max_tokens=config.max_tokens or options.max_tokens,
        max_delay_s=(config.max_delay_ms or 0.0) / 1000,
        buckets=config.buckets or options.buckets,
    )
