"""Which batches run so quickly that the thread that brought them runs them itself: waking the engine's thread and being
woken by it takes longer.

Known from what the same model took for batches of the same shape, so a shape that needs a new plan never qualifies.
Called by the engine worker; numbers may be a run out of date.
"""

from dataclasses import dataclass
from math import inf

from service.batching.queue import Batch
from service.workers.messages import ModelKey

_PROOF = 8  # runs of a shape before it is trusted
_WEIGHT = 0.1  # of the newest run in the mean
_FORGET = 1.05  # how fast the quickest run is forgotten
_SHAPES = 256  # that are remembered of a model

Shape = tuple[int, int, tuple[tuple[int, ...], ...]]


@dataclass(slots=True)
class _Runs:
    """`quickest_s` is of the clock: on a busy machine the mean says more of the others. What waits for a device is slow
    by it, what computes by `cpu_s`, the mean time of the thread's own."""

    count: int = 0
    cpu_s: float = 0.0
    quickest_s: float = inf


class LightRuns:
    """What batches took. `limit_s` is what a light one takes at most; 0: none is light."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._runs: dict[ModelKey, dict[Shape, _Runs]] = {}
        self.models: set[ModelKey] = set()
        """Those that have batches which are light."""

    def record(self, key: ModelKey, batch: Batch, seconds: float, cpu_seconds: float) -> None:
        """A batch took so long, and so much of its thread."""
        if not self._limit_s:
            return
        shapes = self._runs.setdefault(key, {})
        if len(shapes) >= _SHAPES:
            shapes.clear()
        runs = shapes.setdefault(_shape(batch), _Runs())
        weight = max(_WEIGHT, 1 / (runs.count + 1))
        runs.cpu_s += weight * (cpu_seconds - runs.cpu_s)
        runs.quickest_s = min(seconds, runs.quickest_s * _FORGET)
        runs.count += 1
        if self._is_light(runs):
            self.models.add(key)

    def allows(self, key: ModelKey, batch: Batch) -> bool:
        """Whether a batch is light."""
        runs = self._runs.get(key, {}).get(_shape(batch))
        return runs is not None and self._is_light(runs)

    def _is_light(self, runs: _Runs) -> bool:
        return runs.count >= _PROOF and max(runs.cpu_s, runs.quickest_s) <= self._limit_s

    def forget(self, key: ModelKey) -> None:
        """A model is gone."""
        self.models.discard(key)
        self._runs.pop(key, None)


def _shape(batch: Batch) -> Shape:
    skip = 2 if batch.width else 1
    return batch.rows, batch.width, tuple([array.shape[skip:] for array in batch.parts[0].entry.arrays.values()])
