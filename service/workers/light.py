"""Which batches run so quickly that the thread that brought them runs them itself: waking the engine's thread and being
woken by it takes longer.

Known from what the same model took for batches of the same shape, so a shape that needs a new plan never qualifies.
Called by the engine worker; numbers may be a run out of date.
"""

from dataclasses import dataclass

from service.batching.queue import Batch
from service.workers.messages import ModelKey

_PROOF = 4  # runs of a shape before it is trusted
_STEP = 0.1  # by which the median follows
_SHAPES = 256  # that are remembered of a model

Shape = tuple[int, int, tuple[tuple[int, ...], ...]]


@dataclass(slots=True)
class _Runs:
    """`median_s` goes up a step for a run that took longer and down for one that did not: on a busy machine a mean says
    more of what else it does."""

    median_s: float
    count: int = 1


class LightRuns:
    """What batches took. `limit_s` is what a light one takes at most; 0: none is light."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._runs: dict[ModelKey, dict[Shape, _Runs]] = {}
        self.models: set[ModelKey] = set()
        """Those that have batches which are light."""

    def record(self, key: ModelKey, batch: Batch, seconds: float) -> None:
        """A batch took so long."""
        if not self._limit_s:
            return
        shapes = self._runs.setdefault(key, {})
        shape = _shape(batch)
        runs = shapes.get(shape)
        if runs is None:
            if len(shapes) >= _SHAPES:
                shapes.clear()
            shapes[shape] = _Runs(seconds)
            return
        runs.median_s *= 1 + _STEP if seconds > runs.median_s else 1 - _STEP
        runs.count += 1
        if runs.count == _PROOF and runs.median_s <= self._limit_s:
            self.models.add(key)

    def allows(self, key: ModelKey, batch: Batch) -> bool:
        """Whether a batch is light."""
        shapes = self._runs.get(key)
        runs = shapes.get(_shape(batch)) if shapes is not None else None
        return runs is not None and runs.count >= _PROOF and runs.median_s <= self._limit_s

    def forget(self, key: ModelKey) -> None:
        """A model is gone."""
        self.models.discard(key)
        self._runs.pop(key, None)


def _shape(batch: Batch) -> Shape:
    skip = 2 if batch.width else 1
    return batch.rows, batch.width, tuple([array.shape[skip:] for array in batch.parts[0].entry.arrays.values()])
