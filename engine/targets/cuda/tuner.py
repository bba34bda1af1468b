"""Times the tiles that the cost models rank first on the device (tunables.py), and keeps the fastest (choice_file.py).
Asked for by ``python -m engine tune`` and by the benchmarks; nothing waits for it when a model is loaded."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING

from engine.plan.plan import Step
from engine.specs import TileTrial
from engine.targets.cuda.kernel import Context, Launch
from engine.targets.cuda.launch_timing import SHORT_ROUNDS, Rounds, timed_launches
from engine.targets.cuda.product_cost import CLOCK_MHZ
from engine.targets.cuda.tunables import CANDIDATES, RATE, Tunable, tunables

if TYPE_CHECKING:
    from engine.targets.cuda.target import CudaTarget

_LOADED_TOGETHER = (
    12  # products and convolutions whose kernels are compiled side by side, before the first of them is timed
)
_FINAL = Rounds(9, 3e-3)
_CHALLENGERS = 3
_HOT = Rounds(2, 15e-3, before=40e-3)
"""Of what brings the chip to its power limit, to which the clock answers after 30 to 60 ms: until then it is what the
tile before has left (docs/performance.md)."""
_HOT_SHARE = 0.2  # of the tensor cores' rate, from which on a product does so
_HOT_CHALLENGERS, _NEAR = 5, 1.1  # those that took at most so much longer than the fastest when the chip was cool
_GAIN = 0.98  # of the cost model's tile: what is faster by less than the noise does not take its place


def trials(
    target: CudaTarget, steps: Iterable[Step], timed: bool, most: int = CANDIDATES, deadline: float = inf
) -> Iterator[TileTrial]:
    """The tiles of the products and convolutions among `steps`, each kind of them once, from what should be the fastest
    on. `timed`: they are run, unless their like has been timed before, and the fastest is kept; those that have not
    come to it at `deadline` (of `time.monotonic`) are not. Raises CompileError, OutOfMemory."""
    found = _tunables(steps, target.context, most)
    untimed = [key for key in found if timed and key not in target.choices]
    loaded = set[str]()
    for key, one in found.items():
        times: Sequence[float | None] = [None] * len(one.candidates)
        if key in untimed and time.monotonic() < deadline:
            if key not in loaded:
                loaded |= _load(target, found, untimed[untimed.index(key) :][:_LOADED_TOGETHER])
            with target.lock, target.device.errors(), target.device.current():
                measured, fastest = _decided(target, one)
            target.keep_choices({key: one.choice(fastest, measured[fastest])})
            times = measured
        chosen = one.chosen(target.context)
        for i, (candidate, us) in enumerate(zip(one.candidates, times, strict=True)):
            yield TileTrial(one.step.name, key, candidate.text, candidate.estimate_us, candidate.bound, us, i == chosen)


def _tunables(steps: Iterable[Step], context: Context, most: int) -> dict[str, Tunable]:
    """What there is to choose among steps, by its key."""
    found = dict[str, Tunable]()
    for step in steps:
        for one in tunables(step, context, most):
            found.setdefault(one.key, one)
    return found


def _rows(one: Tunable, context: Context) -> list[list[Launch]]:
    """The launches of every candidate."""
    return [one.launches(i, context) for i in range(len(one.candidates))]


def _load(target: CudaTarget, found: Mapping[str, Tunable], keys: Sequence[str]) -> set[str]:
    """Compile and load, in parallel, what some steps could run in."""
    rows = [row for key in keys for row in _rows(found[key], target.context)]
    target.device.load(launch.kernel for row in rows for launch in row)
    return set(keys)


def _decided(target: CudaTarget, one: Tunable) -> tuple[list[float], int]:
    """Microseconds of the candidates, and which of them to take: the cost model's own, the first, unless another one
    beats it by more than noise once more, in longer rounds. Short rounds of many mislead where what ran before decides
    the clock."""
    rows = _rows(one, target.context)
    measured = timed_launches(target, one.step, rows, SHORT_ROUNDS)
    others = sorted(range(1, len(rows)), key=measured.__getitem__)
    if _is_hot(one.step, min(measured), target.context):
        near = [i for i in others[:_HOT_CHALLENGERS] if measured[i] <= _NEAR * min(measured)]
        return measured, _fastest(target, one.step, rows, [0, *near])
    for i in others[:_CHALLENGERS]:
        if measured[i] >= _GAIN * measured[0]:
            break
        own, other = timed_launches(target, one.step, [rows[0], rows[i]], _FINAL)
        if other < _GAIN * own:
            return measured, i
    return measured, 0


def _is_hot(step: Step, us: float, context: Context) -> bool:
    """Whether a step that takes so long brings the chip to its power limit."""
    return step.cost.flops >= _HOT_SHARE * RATE * context.multiprocessors * CLOCK_MHZ * us


def _fastest(target: CudaTarget, step: Step, rows: Sequence[list[Launch]], finalists: Sequence[int]) -> int:
    """The one that takes the least on a hot chip, or the first of them if none is faster by more than noise."""
    if len(finalists) == 1:
        return finalists[0]
    times = timed_launches(target, step, [rows[i] for i in finalists], _HOT)
    best = min(range(len(times)), key=times.__getitem__)
    return finalists[best if times[best] < _GAIN * times[0] else 0]
