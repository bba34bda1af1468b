"""``python -m benchmarks metrics``: what the always-on kernel metrics cost at full load, and how far the times they
tell are from those of ncu and from the time of a whole run.

All on one GPU with nothing else on it, and without PyTorch. Full load is a stream with no gap between runs of a bound
model, and `Model.run` from as many threads as have runs under way at once. A GPU at its power limit is slower than one
that runs a kernel at a time under a profiler, so the stamps of one are not held against the times of the other: beside
ncu's times stand stamps of the very launches that ncu timed (profiled.py, deviation.py); beside the time of a run at
full load, those that the metrics tell then.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import cupy
import numpy as np

import engine
from benchmarks.cases.metrics import LEAST_RATIO, MetricsCase
from benchmarks.gpu import deviation, ncu, overhead, windows
from benchmarks.gpu.deviation import Band, Deviation
from benchmarks.gpu.executables import executable, resident, target_of
from benchmarks.gpu.overhead import Effort
from benchmarks.measure import reason
from engine.specs import StepStat
from engine.targets.cuda.program import SAMPLE_EVERY, SAMPLE_SECONDS
from engine.targets.cuda.resident import ResidentExecutable
from engine.targets.cuda.target import CudaTarget

_SAMPLES = 20
_AHEAD = 8
"""Runs that are queued before the first of them is over."""
_LAUNCH = Effort(within=0.004, seconds=10.0, warm_up=1.5)  # warm: at the clock that the power limit leaves
_RUN = Effort(within=0.005, seconds=26.0, warm_up=0.5)
_ASIDE = Effort(within=0.01, seconds=2.0)
_ASIDE_SECONDS = 0.05  # of a side


@dataclass(frozen=True)
class Outcome:
    """`figures` by name: µs, ratios and relative deviations; what is beyond its bound is a `failure`; `reasons` say why
    something was not measured. `kernels`: every kernel beside ncu."""

    figures: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""
    reasons: Mapping[str, str] = field(default_factory=dict)
    kernels: Sequence[Deviation] = ()


Figures = Mapping[str, float]


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
    measured: dict[MetricsCase, Figures] = {}
    with engine.load(path, device="cuda:0", precision="fp16", strict=True) as model:
        for case in cases:
            try:
                measured[case] = _measure(model, case)
            except Exception as problem:
                yield case, Outcome(failure=reason(problem))
    if profiler is None:
        yield from ((case, judged(figures, [], {"ncu": "not asked"})) for case, figures in measured.items())
    elif measured:
        try:
            outcomes = list(beside_ncu(measured, *_profiled(path, list(measured), profiler)))
        except ncu.NcuError as problem:
            outcomes = [(case, _unprofiled(figures, problem)) for case, figures in measured.items()]
        yield from outcomes


def _unprofiled(figures: Figures, problem: ncu.NcuError) -> Outcome:
    found = judged(figures, [], {})
    return Outcome(found.figures, "; ".join(part for part in (found.failure, f"ncu: {problem}") if part))


def _profiled(path: Path, cases: Sequence[MetricsCase], profiler: str) -> tuple[list[windows.Window], list[ncu.Timed]]:
    """What was launched under ncu with its stamps, and what ncu saw. Raises NcuError."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "windows.json"
        program = [sys.executable, "-m", "benchmarks.gpu.profiled", str(path), str(to), *(case.name for case in cases)]
        timed = ncu.profile(profiler, program)
        try:
            return windows.read(to), timed
        except (OSError, ValueError, KeyError) as error:
            raise ncu.NcuError(f"the profiled process left no stamps: {error}") from error


def beside_ncu(
    measured: Mapping[MetricsCase, Figures], launched: Sequence[windows.Window], timed: Sequence[ncu.Timed]
) -> Iterator[tuple[MetricsCase, Outcome]]:
    """The cases, with what ncu saw of all that was launched. Raises NcuError."""
    found = deviation.paired(launched, timed)
    offset = deviation.offset(deviation.windows_of(found, windows.EMPTY))
    for case, figures in measured.items():
        of_case = deviation.windows_of(found, case.name)
        kernels = list(deviation.deviations(of_case, offset.us))
        stamps_us, ncu_us = deviation.sums_us(of_case)
        figures = {
            **figures, "ncu_stamps_us": stamps_us, "ncu_us": ncu_us, "offset_us": offset.us,
            **{f"offset {shape} us": us for shape, us in offset.of_shapes.items()},
        }  # fmt: skip
        yield case, judged(figures, list(deviation.bands(kernels)), {}, kernels)


def judged(
    figures: Figures, bands: Sequence[Band], reasons: Mapping[str, str], kernels: Sequence[Deviation] = ()
) -> Outcome:
    """The figures with those of the bands; a failure where some are beyond their bounds."""
    beyond = [
        f"{what}: {figures[f'{what}_ratio']:.4f} of the throughput without stamps, below {LEAST_RATIO}"
        for what in ("launch", "run")
        if figures[f"{what}_ratio"] < LEAST_RATIO
    ]
    beyond += [
        f"{band.name}: {band.beyond} of {band.kernels} beyond {band.bound:.0%} from ncu, at worst "
        f"{band.worst.judged:+.1%} ({band.worst.name}: stamp {band.worst.stamp_us:.2f}, ncu {band.worst.ncu_us:.2f} µs)"
        for band in bands
        if band.beyond
    ]
    found = dict(figures)
    for band in bands:
        found |= {f"{band.name} kernels": band.kernels, f"{band.name} beyond": band.beyond}
        found |= {f"{band.name} median": band.median, f"{band.name} worst": band.worst.judged}
        found |= {f"{band.name} median without offset": band.raw_median}
    return Outcome(found, "; ".join(beyond), reasons, kernels)


def write_kernels(path: Path, outcomes: Sequence[tuple[MetricsCase, Outcome]]) -> None:
    """Every kernel that ncu timed as a line of CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "step", "stamp_us", "ncu_us", "deviation", "deviation_without_offset"])
        for case, outcome in outcomes:
            for one in outcome.kernels:
                times = (one.stamp_us, one.ncu_us, one.judged, one.raw)
                writer.writerow([case.name, one.name, *(f"{value:.4f}" for value in times)])


def _measure(model: engine.Model, case: MetricsCase) -> Figures:
    feeds, target = case.of.feeds(), target_of(model)

    def stamp(on: bool) -> None:
        target.sample_every = SAMPLE_EVERY if on else 0

    try:
        with _bound(model, case, feeds) as (bound, launch):
            launched = overhead.measure(overhead.batches(launch, stamp, SAMPLE_EVERY), _LAUNCH)
            stamp(True)
            one_in = _one_in(bound, launch)
        with _bound(model, case, feeds) as (bound, launch):
            target.sample_seconds = 0.0
            stamps_us = _stamps_us(bound, launch)
            target.sample_seconds = SAMPLE_SECONDS
        always = overhead.measure(_every_run(model, case, feeds), _ASIDE)
        stamp(False)
        with _usual_and_serial(model, case, feeds) as side:
            serial = overhead.measure(side, _ASIDE)
        with overhead.steady(lambda: model.run(feeds), model.concurrent_runs, stamp) as side:
            ran = overhead.measure(side, _RUN)
    finally:
        target.sample_every, target.sample_seconds = SAMPLE_EVERY, SAMPLE_SECONDS
    return {
        **_of(launched.ratio, "launch"), "launch_one_in": one_in, **_of(always.ratio, "each"), **_of(ran.ratio, "run"),
        "run_us": ran.us, "graph_us": serial.us, "serial_us": serial.with_us, "overlap_us": serial.with_us - serial.us,
        "stamps_us": sum(stamps_us),
    }  # fmt: skip


def _of(ratio: overhead.Ratio, what: str) -> dict[str, float]:
    return {f"{what}_ratio": ratio.centre, f"{what}_low": ratio.low, f"{what}_high": ratio.high}


@contextmanager
def _bound(
    model: engine.Model, case: MetricsCase, feeds: Mapping[str, np.ndarray]
) -> Iterator[tuple[ResidentExecutable, Callable[[int], None]]]:
    """The model bound to a case's inputs, and what launches it so many times with no gap and waits."""
    bound = resident(model, model.plan(case.of.sizes))
    for name, array in feeds.items():
        bound.inputs[name].set(np.ascontiguousarray(array, bound.inputs[name].dtype))
    cupy.cuda.runtime.deviceSynchronize()
    try:
        yield bound, _a_few_ahead(bound.launch)
    finally:
        bound.close()


def _a_few_ahead(queue: Callable[[cupy.cuda.Stream], object]) -> Callable[[int], None]:
    """Queues so many runs with no gap and waits. Only a few runs ahead of the GPU, as nobody is further ahead who wants
    answers: which runs are sampled depends on how fast they are queued."""
    stream = cupy.cuda.Stream(non_blocking=True)
    ends = [cupy.cuda.Event(block=True, disable_timing=True) for _ in range(_AHEAD)]

    def launch(runs: int) -> None:
        for run in range(runs):
            end = ends[run % _AHEAD]
            end.synchronize()
            queue(stream)
            end.record(stream)
        stream.synchronize()

    return launch


def _every_run(model: engine.Model, case: MetricsCase, feeds: Mapping[str, np.ndarray]) -> overhead.Side:
    """Sides of graphs of which every one writes stamps (True), or none does."""
    plan = model.plan(case.of.sizes)
    graph = executable(model, plan)
    outputs = {name: np.zeros(tensor.shape, tensor.dtype.numpy) for name, tensor in plan.outputs.items()}
    graph.run(feeds, outputs)  # which leaves the inputs where they are
    stamped = False

    def choose(on: bool) -> None:
        nonlocal stamped
        stamped = on

    launch = _a_few_ahead(lambda stream: graph.launch(stream, stamped))
    return overhead.batches(launch, choose, SAMPLE_EVERY, _ASIDE_SECONDS)


def _one_in(bound: ResidentExecutable, launch: Callable[[int], None]) -> float:
    """How many runs there are for one that writes stamps, at full load."""

    def until(samples: int) -> tuple[int, int]:
        while bound.samples < samples:
            launch(SAMPLE_EVERY)
        runs = bound.step_stats()[0].launches  # for which it reads the stamps
        return bound.samples, runs

    begin = until(bound.samples + 2)
    end = until(begin[0] + _SAMPLES // 2)
    return (end[1] - begin[1]) / (end[0] - begin[0])


def _stamps_us(bound: ResidentExecutable, launch: Callable[[int], None]) -> list[float]:
    """µs of every step as the metrics tell them, of `_SAMPLES` samples at full load, one in `SAMPLE_EVERY` runs. Stamps
    are read when the next run is queued."""

    def stats(samples: int) -> Sequence[StepStat]:
        for _ in range(samples):
            launch(SAMPLE_EVERY)
        return bound.step_stats()

    before, after = stats(2), stats(_SAMPLES)
    return [
        (now.seconds - then.seconds) / (now.launches - then.launches) * 1e6
        for then, now in zip(before, after, strict=True)
    ]


@contextmanager
def _usual_and_serial(
    model: engine.Model, case: MetricsCase, feeds: Mapping[str, np.ndarray]
) -> Iterator[overhead.Side]:
    """Sides of runs as usual (False), and of those in which every kernel waits for the one before it to end (True)."""
    with _bound(model, case, feeds) as (_, usual), _bound(model, case, feeds) as (_, serial):
        with _without_overlap(target_of(model)):
            serial(1)  # which captures
        launches = {False: usual, True: serial}
        launch = usual

        def choose(one_by_one: bool) -> None:
            nonlocal launch
            launch = launches[one_by_one]

        yield overhead.batches(lambda runs: launch(runs), choose, SAMPLE_EVERY, _ASIDE_SECONDS)


@contextmanager
def _without_overlap(target: CudaTarget) -> Iterator[None]:
    overlap, target.overlap = target.overlap, False
    try:
        yield
    finally:
        target.overlap = overlap
