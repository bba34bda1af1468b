"""What the engine did, as Prometheus sees it: cumulative counters per kernel, and its speed over the last minute.

`EngineCollector` renders a snapshot that the metrics route puts in before each scrape; it never calls the engine
itself. Speeds are over the kernel's own running time: FLOPs done in the window / seconds the kernel ran in the window.
A kernel that did not run in the window has no sample, so that an idle model does not look slow.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from service.workers.messages import Device, KernelCounters, ModelKey, ModelStats

WINDOW_S = 60.0
_SNAPSHOT_EVERY_S = 5.0
_KERNEL = ("model", "version", "kernel", "op")
_MODEL = ("model", "version")

KernelKey = tuple[ModelKey, str, str]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Facts of a loaded model that do not change."""

    device: Device
    load_seconds: float
    fallback_ops: int


class EngineCollector(Collector):
    """Holds the newest statistics of the engine (last in the history) and enough older ones for the window.

    Until there is an older one, the window reaches back to when the model was loaded.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._models: tuple[ModelStats, ...] = ()  # of two generations of a model the one that is served
        self._all_models: tuple[ModelStats, ...] = ()
        self._loaded: dict[ModelKey, LoadedModel] = {}
        self._history: deque[tuple[float, dict[KernelKey, KernelCounters]]] = deque()

    def loaded(self, key: ModelKey, model: LoadedModel) -> None:
        """A model is ready (again)."""
        self._loaded[key] = model

    def unloaded(self, key: ModelKey) -> None:
        """A model is gone; its series end."""
        self._loaded.pop(key, None)

    def update(self, models: tuple[ModelStats, ...]) -> None:
        """Put in the newest statistics; called before a scrape."""
        now = self._clock()
        self._all_models = models
        models = self._models = tuple(stats for stats in models if stats.key in self._loaded)
        self._drop_history(_by_kernel(models))
        if len(self._history) > 1 and now - self._history[-2][0] < _SNAPSHOT_EVERY_S:
            self._history.pop()
        self._history.append((now, _by_kernel(models)))
        while len(self._history) > 2 and now - self._history[1][0] >= WINDOW_S:
            self._history.popleft()

    def _drop_history(self, newest: dict[KernelKey, KernelCounters]) -> None:
        """Forget kernels that count from zero again, as those of a model do that was loaded anew."""
        for _, kernels in self._history:
            for key in [key for key, old in kernels.items() if key in newest and newest[key].launches < old.launches]:
                del kernels[key]

    def collect(self) -> Iterator[Metric]:
        """The families of one scrape."""
        yield from self._kernel_counters()
        yield from self._kernel_speeds()
        yield from self._models_and_devices()

    def _kernel_counters(self) -> Iterable[Metric]:
        texts = {
            "launches": "Times a kernel was launched.",
            "seconds": "Time a kernel ran, in seconds.",
            "flops": "Floating-point operations of the mathematics that a kernel did.",
            "bytes": "Bytes that a kernel had to touch.",
            "cached_bytes": "Those of them that the device's cache can hold from one use to the next.",
            "flops_floor_seconds": "Time that its FLOPs take at least, at the device's measured ceiling.",
            "bytes_floor_seconds": "Time that its bytes take at least, at the measured ceilings of memory and cache.",
        }
        for field, text in texts.items():
            family = CounterMetricFamily(f"engine_kernel_{field}", text, labels=_KERNEL)
            for (key, kernel, op), counters in _by_kernel(self._models).items():
                family.add_metric((key.name, str(key.version), kernel, op), float(getattr(counters, field)))
            yield family

    def _kernel_speeds(self) -> Iterable[Metric]:
        window = f"over the time it ran in the last {WINDOW_S:g} seconds"
        flops = GaugeMetricFamily("engine_kernel_flops_per_second", f"FLOP rate of a kernel {window}.", labels=_KERNEL)
        moved = GaugeMetricFamily("engine_kernel_bytes_per_second", f"Byte rate of a kernel {window}.", labels=_KERNEL)
        ratio = GaugeMetricFamily(
            "engine_kernel_roofline_ratio",
            f"The nearer of both rates to its ceiling, of memory or of the cache, {window}.",
            labels=_KERNEL,
        )
        before = self._history[0][1] if len(self._history) > 1 else {}
        for (key, kernel, op), now in _by_kernel(self._models).items():
            then = before.get((key, kernel, op), KernelCounters(kernel, op, 0, *[0.0] * 6))
            seconds = now.seconds - then.seconds
            if seconds <= 0:
                continue
            labels = (key.name, str(key.version), kernel, op)
            flop_rate, byte_rate = (now.flops - then.flops) / seconds, (now.bytes - then.bytes) / seconds
            flops.add_metric(labels, flop_rate)
            moved.add_metric(labels, byte_rate)
            computing = now.flops_floor_seconds - then.flops_floor_seconds
            moving = now.bytes_floor_seconds - then.bytes_floor_seconds
            if max(computing, moving) > 0:
                ratio.add_metric(labels, max(computing, moving) / seconds)
        yield from (flops, moved, ratio)

    def _models_and_devices(self) -> Iterable[Metric]:
        depth = GaugeMetricFamily("inference_queue_depth", "Requests that wait for the engine.", labels=_MODEL)
        dropped = CounterMetricFamily(
            "inference_dropped_requests",
            "Requests dropped before compute: client gone or deadline passed.",
            labels=_MODEL,
        )
        memory: dict[tuple[str, str], int] = {}
        for stats in self._models:
            labels = (stats.key.name, str(stats.key.version))
            depth.add_metric(labels, stats.queued)
            dropped.add_metric(labels, stats.dropped)
        for stats in self._all_models:
            loaded = self._loaded.get(stats.key)
            for kind, size in stats.memory:
                place = (loaded.device.device if loaded else "unknown", kind)
                memory[place] = memory.get(place, 0) + size
        used = GaugeMetricFamily(
            "engine_device_memory_bytes", "Memory that the engine holds, by kind.", labels=("device", "kind")
        )
        for place, size in memory.items():
            used.add_metric(place, size)
        seconds = GaugeMetricFamily("engine_model_load_seconds", "Time to load and warm up a model.", labels=_MODEL)
        fallback = GaugeMetricFamily(
            "engine_fallback_ops", "Operations of a model that run without a kernel of the engine.", labels=_MODEL
        )
        info = InfoMetricFamily("engine", "Devices that models run on.", labels=("device",))
        for key, loaded in self._loaded.items():
            seconds.add_metric((key.name, str(key.version)), loaded.load_seconds)
            fallback.add_metric((key.name, str(key.version)), loaded.fallback_ops)
        flops = GaugeMetricFamily(
            "engine_device_peak_flops_per_second", "Measured ceiling of a device's FLOP rate.", labels=("device",)
        )
        moved = GaugeMetricFamily(
            "engine_device_peak_bytes_per_second",
            "Measured ceilings of a device's byte rates, of memory and of the last-level cache.",
            labels=("device", "level"),
        )
        for device in {loaded.device.device: loaded.device for loaded in self._loaded.values()}.values():
            about = {"name": device.name, "arch": device.arch, "threads": str(device.threads)}
            info.add_metric((device.device,), about)
            if device.peak_flops > 0:
                flops.add_metric((device.device,), device.peak_flops)
            for level, peak in (("memory", device.peak_bytes), ("cache", device.peak_cache_bytes)):
                if peak > 0:
                    moved.add_metric((device.device, level), peak)
        yield from (depth, dropped, used, seconds, fallback, info, flops, moved)


def _by_kernel(models: Iterable[ModelStats]) -> dict[KernelKey, KernelCounters]:
    """Counters by label values; kernels of one name and op are added up."""
    merged: dict[KernelKey, KernelCounters] = {}
    for stats in models:
        for new in stats.kernels:
            key = (stats.key, new.kernel, new.op)
            old = merged.get(key)
            merged[key] = new if old is None else old.plus(new)
    return merged
