"""One engine instance: takes commands, runs batches, sends reports.

Threads: `engine` alone runs batches (so the cores are shared fairly between models and nothing waits for a lock inside
the engine); where a model overlaps several runs, as on a GPU, or they divide the processors, there are as many engine
threads, each with one batch.
`loader` loads, warms up, unloads, and gives way to `engine` in all of it; `statistics` reads counters, so that a scrape
never waits for either. `handle` may be called by one receiving thread and returns at once; one that has many requests
calls `accept` for each and then `work_off`, which runs what is light (`batching/light.py`) itself.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from service.batching.batcher import alone, answer, assemble, rows_of, scatter
from service.batching.queue import Batch, Entry
from service.batching.scheduler import Scheduler, Work
from service.workers.engine_api import EngineKernelStat, EngineModel, EngineModule
from service.workers.messages import (
    BatchDone,
    BatchingMode,
    Cancel,
    Command,
    Device,
    FailureCode,
    Infer,
    InferFailed,
    KernelCounters,
    LoadFailed,
    LoadModel,
    ModelKey,
    ModelReady,
    ModelStats,
    Profile,
    Report,
    Stats,
    StatsReport,
    Stop,
    Stopped,
    Unload,
    Unloaded,
)
from service.workers.profiles import profile_report
from service.workers.warmup import describe_device, describe_tensors, probe

log = logging.getLogger(__name__)

_Told = tuple[Work, list[Report]]  # a batch that has run, and what is to be told of it

_LAST_LOAD_S = 0.5  # how long the end waits for a model that is being loaded for nothing


class EngineWorker:
    """Owns the loaded models of one engine instance. `engine` is imported on the loader thread, not at start; `on_lost`
    is called when the device has failed for good."""

    def __init__(
        self,
        engine: Callable[[], EngineModule],
        report: Callable[[Sequence[Report]], None],
        on_lost: Callable[[str], None] = lambda _: None,
        light_s: float = 0.0,
    ) -> None:
        self._engine = engine
        self._reports = report
        self._on_lost = on_lost
        self._busy_since: dict[int, float] = {}
        self._scattering = threading.Lock()
        self._scheduler = Scheduler()
        self._light_s = light_s
        self._models: dict[ModelKey, EngineModel] = {}
        self._devices: dict[ModelKey, Device] = {}
        self._stopping = threading.Event()
        self._loader = ThreadPoolExecutor(1, "loader")
        self._statistics = ThreadPoolExecutor(1, "statistics")
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the engine thread."""
        self._start_threads(1)

    def _start_threads(self, count: int) -> None:
        """Have at least so many engine threads."""
        while len(self._threads) < count:
            number = len(self._threads)
            thread = threading.Thread(target=self._run, name=f"engine {number}" if number else "engine", daemon=True)
            self._threads.append(thread)
            thread.start()

    def handle(self, command: Command) -> None:
        """Take one command; never blocks."""
        match command:
            case Infer():
                self.accept(command)
                self._scheduler.wake()
            case Cancel():
                self._scheduler.cancel(command.id)
            case Stats():
                self._statistics.submit(self._stats, command)
            case Profile():
                self._statistics.submit(self._profile, command)
            case LoadModel():
                self._loader.submit(self._load, command)
            case Unload():
                self._loader.submit(self._unload, command.key)
            case Stop():
                self._stopping.set()
                self._scheduler.stop()
                threading.Thread(target=self._stop, name="stop", daemon=True).start()

    def accept(self, request: Infer) -> None:
        """Queue a request, or refuse it; `work_off` has to follow."""
        refusal = self._scheduler.submit(request)
        if refusal is not None:
            self._report(refusal)

    def work_off(self, after_each: Callable[[], None] = lambda: None) -> None:
        """Run the light batches of what was accepted on this thread, and leave the others to the engine's. `after_each`
        is called when the answers of a batch have been reported."""
        while (work := self._scheduler.take_at_once(self._expired)) is not None:
            if not work.light.allows(work.batch):
                self._scheduler.hand_over(work)
                return
            untold: list[_Told] = []
            self._run_one(work, untold)
            self._tell(untold)
            try:
                after_each()
            except Exception:
                self._scheduler.wake()  # for what is left
                raise

    def _report(self, report: Report) -> None:
        self._reports((report,))

    # ---- loader thread

    def _load(self, command: LoadModel) -> None:
        model: EngineModel | None = None
        if self._stopping.is_set():
            return
        try:
            started = time.monotonic()
            module = self._engine()
            with module.background():
                model = module.load(
                    command.path,
                    device=command.device,
                    precision=command.precision,
                    threads=command.threads,
                    packed=command.packed,
                )
                axes = probe(model, command, module.EngineError)
            seconds = time.monotonic() - started
        except Exception as error:
            reason = self._why(error)
            log.warning("model %s could not be loaded: %s", command.key, reason)
            if model is not None:
                model.close()
            self._report(LoadFailed(command.key, reason, isinstance(error.__cause__, OSError)))
            return
        if self._stopping.is_set():
            model.close()
            return
        device = self._devices[command.key] = describe_device(model.device_info)
        self._models[command.key] = model
        self._start_threads(model.concurrent_runs)
        self._scheduler.add(
            command.key, command.batching, axes, model.concurrent_runs, self._light_s, model.divides_threads
        )
        self._report(
            ModelReady(
                key=command.key,
                inputs=describe_tensors(model.inputs),
                outputs=describe_tensors(model.outputs),
                device=device,
                load_seconds=seconds,
                fallback_ops=model.fallback_ops,
                batching=axes.mode,
                batching_reason=axes.reason,
            )
        )

    def _why(self, error: Exception) -> str:
        """Why a model could not be loaded, in words; what the engine did not raise on purpose is a bug of ours."""
        with contextlib.suppress(Exception):  # the engine itself may be what cannot be imported
            if isinstance(error, self._engine().EngineError):
                return str(error)
        if isinstance(error, MemoryError):
            return f"there is not enough memory for it: {error}" if str(error) else "there is not enough memory for it"
        log.error("a model could not be loaded because of a bug", exc_info=error)
        return f"the engine failed in a way it should not, please report it: {type(error).__name__}: {error}"

    def _unload(self, key: ModelKey) -> None:
        self._scheduler.remove(key)
        self._close(key)
        self._report(Unloaded(key))

    def _close(self, key: ModelKey) -> None:
        """Close a model where counters are read, so that none is closed while its own are."""
        model = self._models.pop(key, None)
        if model is not None:
            self._statistics.submit(model.close).result()
            del self._devices[key]

    # ---- the end

    def _stop(self) -> None:
        for thread in self._threads:
            thread.join()
        idle = self._loader.submit(lambda: None)
        self._loader.shutdown(wait=False)
        with contextlib.suppress(TimeoutError):
            idle.result(_LAST_LOAD_S)
        for key in list(self._models):
            self._close(key)
        self._statistics.shutdown(wait=False)
        self._report(Stopped())

    # ---- statistics thread

    def _stats(self, command: Stats) -> None:
        models = []
        for key, model in list(self._models.items()):
            device = self._devices[key]
            kernels = tuple(_counters(kernel, device) for kernel in model.kernel_stats())
            queued, dropped = self._scheduler.depth(key)
            models.append(ModelStats(key, kernels, tuple(model.memory().items()), queued, dropped))
        self._report(StatsReport(command.id, tuple(models)))

    def _profile(self, command: Profile) -> None:
        model = self._models.get(command.key)
        self._report(profile_report(command, model.plan_profiles() if model is not None else ()))

    # ---- engine threads

    def _run(self) -> None:
        untold: list[_Told] = []
        while self._run_next(untold):
            pass

    def _run_next(self, untold: list[_Told]) -> bool:
        """One batch; nothing of it is kept while there is none to run. False when there is none any more.

        The answers of the batch before are told when the device is about to compute the next one: whoever gets them
        needs the interpreter, which computing leaves alone, and would else keep this thread from beginning.
        """
        work = self._scheduler.take(self._expired, wait=False)
        if work is None:
            self._tell(untold)
            work = self._scheduler.take(self._expired)
        if work is None:
            return False
        self._run_one(work, untold)
        self._scheduler.wake()
        return True

    def _run_one(self, work: Work, untold: list[_Told]) -> None:
        """Run a batch, after which the next one may start, and add what is to be told to `untold`; what is there
        already is told before the run."""
        thread = threading.get_ident()
        self._busy_since[thread] = time.monotonic()
        reports: list[Report] = []
        succeeded = False
        try:
            reports, succeeded = self._execute(work, work.batch, untold)
        finally:
            del self._busy_since[thread]
            self._scheduler.done(work, succeeded)
            untold.append((work, reports))

    def _tell(self, untold: list[_Told]) -> None:
        while untold:
            work, reports = untold.pop()
            if reports:
                self._reports(reports)
            self._scheduler.reported(work)

    @property
    def busy_seconds(self) -> float:
        """How long the oldest batch has been running; 0 when none is."""
        since = list(self._busy_since.values())
        return time.monotonic() - min(since) if since else 0.0

    def _expired(self, entry: Entry) -> None:
        text = "the deadline passed while the request waited in the queue"
        self._report(InferFailed(entry.request.id, FailureCode.DEADLINE, text))

    def _execute(self, work: Work, batch: Batch, untold: list[_Told]) -> tuple[list[Report], bool]:
        """Run a batch; what is to be told of it, and whether it ran. If it fails, each request in it runs alone,
        without padding: neither its neighbours nor the common length shall fail it (the model's positions may end
        before that)."""
        started = time.monotonic()
        try:
            model = self._models[work.key]
            outputs = model.run(assemble(batch), partial(self._tell, untold), work.side_by_side)
            seconds = time.monotonic() - started
            with self._scattering:
                finished = scatter(batch, outputs, work.axes)
                for part in batch.parts:
                    part.entry.compute_seconds += seconds
        except Exception as error:
            self._tell(untold)
            if isinstance(error, self._engine().DeviceLost):
                self._on_lost(str(error))
                return [report for part in batch.parts for report in self._fail(work, part.entry, error)], False
            singles = [alone(part, batch.shapes, work.axes) for part in batch.parts]
            if singles == [batch]:
                return self._fail(work, batch.parts[0].entry, error), False
            return [report for one in singles for report in self._execute(work, one, untold)[0]], False
        work.light.record(batch, seconds)
        rows = batch.rows if work.axes.mode is not BatchingMode.NONE else rows_of(batch.parts[0].entry.arrays)
        padding, first = batch.computed - batch.tokens, batch.parts[0].entry
        done = BatchDone(work.key, rows, batch.tokens, padding, seconds, first.request.id)
        return [*map(answer, self._scheduler.finish(work, finished)), done], True  # whoever waits for answers is first

    def _fail(self, work: Work, entry: Entry, error: Exception) -> list[Report]:
        """What to tell of a request that failed; nothing if nobody waits for it any more."""
        if not self._scheduler.finish(work, [entry]):
            return []
        module = self._engine()
        code = FailureCode.ENGINE
        if isinstance(error, module.ShapeError):
            code = FailureCode.INVALID_INPUT
        elif isinstance(error, module.OutOfMemory | MemoryError):
            code = FailureCode.OUT_OF_MEMORY
        elif isinstance(error, module.DeviceLost):
            code = FailureCode.WORKER_LOST
        elif not isinstance(error, module.EngineError):
            log.error("the engine raised an error of no known kind", exc_info=error)
        text = (
            f"model {entry.request.key}: {error}"
            if str(error)
            else f"model {entry.request.key}: {type(error).__name__}"
        )
        return [InferFailed(entry.request.id, code, text)]


def _counters(kernel: EngineKernelStat, device: Device) -> KernelCounters:
    floors = device.floors(kernel.flops, kernel.bytes, kernel.cached_bytes)
    done = (kernel.launches, kernel.seconds, kernel.flops, kernel.bytes, kernel.cached_bytes)
    return KernelCounters(kernel.kernel, kernel.op, *done, *floors)
