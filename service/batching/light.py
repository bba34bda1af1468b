"""Which batches of a model run so quickly that the thread that brought them runs them itself: waking the engine thread
and being woken by it takes longer.

Known from what batches of the same shape took, so a shape that needs a new plan never qualifies. Owned by the
scheduler's lane of the model; called by the engine worker, whose threads may see numbers that are a run out of date.
"""

from dataclasses import dataclass

from service.batching.queue import Batch, PlanShape

_PROOF = 4  # runs of a shape before it is trusted
_STEP = 0.1  # by which the median follows
_SHAPES = 256  # that are remembered


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
        self._runs: dict[PlanShape, _Runs] = {}
        self.any = False
        """Whether some have been light."""

    def record(self, batch: Batch, seconds: float) -> None:
        """A batch took so long."""
        if not self._limit_s:
            return
        runs = self._runs.get(batch.shape)
        if runs is None:
            if len(self._runs) >= _SHAPES:
                self._runs.clear()
            self._runs[batch.shape] = _Runs(seconds)
            return
        runs.median_s *= 1 + _STEP if seconds > runs.median_s else 1 - _STEP
        runs.count += 1
        self.any = self.any or self._is_light(runs)

    def allows(self, batch: Batch) -> bool:
        """Whether a batch is light."""
        runs = self._runs.get(batch.shape)
        return runs is not None and self._is_light(runs)

    def _is_light(self, runs: _Runs) -> bool:
        return runs.count >= _PROOF and runs.median_s <= self._limit_s
