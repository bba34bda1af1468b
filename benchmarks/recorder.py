"""Prints rows as they come and keeps them in the results file of the device."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from benchmarks.cases import Case
from benchmarks.measure import Measurement
from benchmarks.results import Device, Results, Row, Run


class Recorder:
    """The rows of one run. Every row is saved at once: a run that is cut short leaves those it had."""

    def __init__(self, device: Device, run: Run, folder: Path) -> None:
        self._run = run
        self._folder = folder
        self._results = Results.of(device, folder)
        self._last = self._begin = time.monotonic()
        self._count = self._failed = 0
        print(f"{device.name}, commit {run.commit}{_ceilings(run)}", flush=True)

    def add(
        self,
        case: Case,
        measurement: Measurement,
        kernel_hash: str,
        *,
        floor_us: float | None = None,
        predicted_us: float | None = None,
        run_us: float | None = None,
        host_us: Mapping[str, float] = MappingProxyType({}),
        facts: Mapping[str, int] = MappingProxyType({}),
        seconds: Mapping[str, float] = MappingProxyType({}),
        figures: Mapping[str, float] = MappingProxyType({}),
        producer: str = "",
    ) -> None:
        """Keep and print one case."""
        error = measurement.rel_err
        row = Row(
            suite=case.suite,
            case=case.name,
            ours_us=measurement.ours_us,
            peers=measurement.peers,
            ratio=None if measurement.ratio is None else round(measurement.ratio, 3),
            floor_us=_rounded(floor_us, 2),
            rel_err=error if error is not None and math.isfinite(error) else None,
            commit=self._run.commit,
            date=self._run.date,
            kernel_hash=kernel_hash,
            run=self._run.id,
            parts=measurement.parts,
            reasons=measurement.reasons,
            run_us=_rounded(run_us, 1),
            failure=measurement.failure,
            facts=dict(facts),
            predicted_us=_rounded(predicted_us, 2),
            host_us={name: round(us, 2) for name, us in host_us.items()},
            errors={size: found for size, found in measurement.errors.items() if math.isfinite(found)},
            seconds={name: round(value, 2) for name, value in seconds.items()},
            figures={name: round(value, 4) for name, value in figures.items()},
            producer=producer,
        )
        self._results.add(self._run, row)
        self._results.save(self._folder)
        self._count += 1
        self._failed += bool(row.failure)
        now = time.monotonic()
        print(f"{line(row)}  {now - self._last:.1f} s", flush=True)
        self._last = now
        for peer, reason in row.reasons.items():
            print(f"{'':10}{peer}: {reason}", flush=True)

    def end(self, expected: int) -> int:
        """Print what came of it; returns the exit status: 1 where a row failed, or where there are fewer than
        `expected`, because the time was up."""
        took = time.monotonic() - self._begin
        path = self._folder / f"{self._results.device.stem}.json"
        print(
            f"{self._count} of {expected} rows, {self._failed} failed, {took:.0f} s; "
            f"{path} has {len(self._results.rows)} rows"
        )
        return 1 if self._failed or self._count < max(1, expected) else 0


def line(row: Row) -> str:
    """A row for the terminal."""
    name = f"{row.suite:9} {row.case:42}"
    figures = "  ".join(f"{what} {value:g}" for what, value in row.figures.items())
    if row.failure:
        return f"{name} FAILED {row.failure}{figures and f'  {figures}'}"
    if row.figures and row.ours_us is None:
        return f"{name} {figures}"
    if row.seconds:
        return f"{name} {'  '.join(f'{what} {value:.2f} s' for what, value in row.seconds.items())}"
    if row.facts:
        return f"{name} err {row.rel_err:.1e}  {'  '.join(f'{fact} {value:,}' for fact, value in row.facts.items())}"
    times = [f"{peer} {_number(us)}" for peer, us in (*row.peers.items(), *row.parts.items())]
    host = [] if row.run_us is None else [f"run {_number(row.run_us)}"]
    host += [f"{what} {_number(us)}" for what, us in row.host_us.items()]
    host += [] if row.predicted_us is None else [f"predicted {_number(row.predicted_us)}"]
    ratio = "  –  " if row.ratio is None else f"×{row.ratio:.2f}"
    share = f" ({row.floor_us / row.ours_us:.2f})" if row.floor_us and row.ours_us else ""
    return (
        f"{name} ours {_number(row.ours_us)} {ratio:6} {'  '.join(times)}  {'  '.join(host)} "
        f"floor {_number(row.floor_us)}{share}  err {row.rel_err:.0e}{figures and f'  {figures}'}"
    )


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _number(us: float | None) -> str:
    return "–" if us is None else f"{us:.1f}" if us >= 100 else f"{us:.2f}"


def _ceilings(run: Run) -> str:
    if run.ceilings is None:
        return ""
    return f": {run.ceilings.flops / 1e12:.3g} TFLOP/s, {run.ceilings.bytes / 1e12:.3g} TB/s"
