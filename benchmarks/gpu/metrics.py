"""``python -m benchmarks metrics``: what the always-on kernel metrics cost at full load, and how far the times they
tell are from those of ncu and from the time of a whole run.

All on one GPU with nothing else on it, and without PyTorch. Full load is a stream with no gap between runs of a bound
model, and `Model.run` from as many threads as have runs under way at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import cupy
import numpy as np

import engine
from benchmarks.cases.metrics import LEAST_RATIO, MetricsCase
from benchmarks.gpu import ncu, overhead
from benchmarks.gpu.executables import resident, target_of
from benchmarks.measure import reason
from engine.specs import StepStat
from engine.targets.cuda.program import SAMPLE_EVERY
from engine.targets.cuda.resident import ResidentExecutable

_SAMPLES = 20
_ROUNDS = 7


@dataclass(frozen=True)
class Outcome:
    """`figures` by name: µs, ratios and relative deviations; what is beyond its bound is a `failure`; `reasons` say why
    something was not measured."""

    figures: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Measured:
    """A case as this process has measured it. `stamps_us`: of every step; `shapes`: of what it launches."""

    figures: Mapping[str, float]
    stamps_us: Sequence[float]
    shapes: Sequence[Sequence[ncu.Shape]]


def measure_all(
    cases: Sequence[MetricsCase], files: Mapping[str, Path], profiler: str | None, deadline: float
) -> Iterator[tuple[MetricsCase, Outcome]]:
    """Every case with what came out, as long as `deadline` (of `time.monotonic`) is not past. `profiler`: the path of
    ncu; None: without it."""
    by_model: dict[str, list[MetricsCase]] = {}
    for case in cases:
        by_model.setdefault(case.of.model, []).append(case)
    for name, some in by_model.items():
        if time.monotonic() >= deadline:
            return
        yield from _of_model(files[name], some, profiler)


def _of_model(path: Path, cases: Sequence[MetricsCase], profiler: str | None) -> Iterator[tuple[MetricsCase, Outcome]]:
    measured: dict[MetricsCase, _Measured] = {}
    with engine.load(path, device="cuda:0", precision="fp16", strict=True) as model:
        for case in cases:
            try:
                measured[case] = _measure(model, case)
            except Exception as problem:
                yield case, Outcome(failure=reason(problem))
    if profiler is None:
        yield from ((case, judged(one.figures, [], {"ncu": "not asked"})) for case, one in measured.items())
        return
    try:
        program = [sys.executable, "-m", "benchmarks.gpu.profiled", str(path), *(case.name for case in measured)]
        timed = ncu.profile(profiler, program)
        yield from beside_ncu(measured, timed)
    except ncu.NcuError as problem:
        yield from ((case, Outcome(one.figures, f"ncu: {problem}")) for case, one in measured.items())


def beside_ncu(
    measured: Mapping[MetricsCase, _Measured], timed: Sequence[ncu.Timed]
) -> Iterator[tuple[MetricsCase, Outcome]]:
    """The cases, with the kernels that ncu saw of all of them, one case after the other. Raises NcuError."""
    shapes = [step for one in measured.values() for step in one.shapes]
    times = iter(ncu.matched(shapes, timed))
    outcomes: list[tuple[MetricsCase, Outcome]] = []
    for case, one in measured.items():
        of_steps = [next(times) for _ in one.shapes]
        total = sum(sum(step) for step in of_steps)
        figures = {**one.figures, "ncu_us": total, "overlap_us": total - one.figures["graph_us"]}
        outcomes.append((case, judged(figures, list(ncu.bands(one.stamps_us, of_steps)), {})))
    yield from outcomes


def judged(figures: Mapping[str, float], bands: Sequence[ncu.Band], reasons: Mapping[str, str]) -> Outcome:
    """The figures with those of the bands; a failure where some are beyond their bounds."""
    beyond = [
        f"{what}: {figures[f'{what}_ratio']:.4f} of the throughput without stamps, below {LEAST_RATIO}"
        for what in ("launch", "run")
        if figures[f"{what}_ratio"] < LEAST_RATIO
    ]
    beyond += [
        f"{band.name}: {band.worst:+.1%} from ncu, beyond {band.bound:.0%}"
        for band in bands
        if abs(band.worst) > band.bound
    ]
    found = dict(figures)
    for band in bands:
        found |= {f"{band.name} kernels": band.kernels, f"{band.name} median": band.median}
        found |= {f"{band.name} worst": band.worst}
    return Outcome(found, "; ".join(beyond), reasons)


def _measure(model: engine.Model, case: MetricsCase) -> _Measured:
    feeds, target = case.of.feeds(), target_of(model)

    def stamp(on: bool) -> None:
        target.sample_every = SAMPLE_EVERY if on else 0

    with _bound(model, case, feeds) as (_, launch):
        launched = overhead.measure(launch, stamp, SAMPLE_EVERY)
    with _bound(model, case, feeds) as (bound, launch):  # of which every sixteenth run is sampled, from the first on
        stamps_us = _stamps_us(bound, launch)
        shapes = [[(one.grid, one.kernel.threads) for one in row] for _, row in bound.launches]
    threads = model.concurrent_runs
    with ThreadPoolExecutor(threads) as pool:

        def some(runs: int) -> None:
            for _ in range(runs):
                model.run(feeds)

        def run(runs: int) -> None:
            list(pool.map(some, [runs // threads] * threads))

        ran = overhead.measure(run, stamp, SAMPLE_EVERY)
    figures = {
        **_of(launched.ratio, "launch"), **_of(ran.ratio, "run"), "run_us": ran.us, "graph_us": launched.us,
        "serial_us": _serial_us(model, case, feeds), "stamps_us": sum(stamps_us),
    }  # fmt: skip
    return _Measured(figures, stamps_us, shapes)


def _of(ratio: overhead.Ratio, what: str) -> dict[str, float]:
    return {f"{what}_ratio": ratio.mean, f"{what}_low": ratio.low, f"{what}_high": ratio.high}


@contextmanager
def _bound(
    model: engine.Model, case: MetricsCase, feeds: Mapping[str, np.ndarray]
) -> Iterator[tuple[ResidentExecutable, Callable[[int], None]]]:
    """The model bound to a case's inputs, and what launches it so many times with no gap and waits."""
    bound = resident(model, model.plan(case.of.sizes))
    for name, array in feeds.items():
        bound.inputs[name].set(np.ascontiguousarray(array, bound.inputs[name].dtype))
    cupy.cuda.runtime.deviceSynchronize()
    stream = cupy.cuda.Stream(non_blocking=True)

    def launch(runs: int) -> None:
        for _ in range(runs):
            bound.launch(stream)
        stream.synchronize()

    try:
        yield bound, launch
    finally:
        bound.close()


def _stamps_us(bound: ResidentExecutable, launch: Callable[[int], None]) -> list[float]:
    """µs of every step as the metrics tell them, of `_SAMPLES` samples at full load. Stamps are read when the next run
    is queued."""

    def stats(samples: int) -> Sequence[StepStat]:
        for _ in range(samples):
            launch(SAMPLE_EVERY)
        return bound.step_stats()

    launch(1)
    before, after = stats(2), stats(_SAMPLES)  # the first ones warm up
    return [
        (now.seconds - then.seconds) / (now.launches - then.launches) * 1e6
        for then, now in zip(before, after, strict=True)
    ]


def _serial_us(model: engine.Model, case: MetricsCase, feeds: Mapping[str, np.ndarray]) -> float:
    """µs of a run in which every kernel waits for the one before it to end, without stamps."""
    target = target_of(model)
    overlap, target.overlap, every, target.sample_every = target.overlap, False, target.sample_every, 0
    seconds: list[float] = []
    try:
        with _bound(model, case, feeds) as (_, launch):
            for _ in range(_ROUNDS + 1):
                begin = time.perf_counter()
                launch(SAMPLE_EVERY)
                seconds.append(time.perf_counter() - begin)
    finally:
        target.overlap, target.sample_every = overlap, every
    return median(seconds[1:]) / SAMPLE_EVERY * 1e6  # the first captures
