"""The results file of a device: rows by (suite, case), and the runs that measured them.

A run of part of the cases replaces its own rows and leaves the others, so a full table is the union of partial runs.
What a row depends on is in the row (commit, date, hash of the kernels' sources) and in its run (driver, versions, the
ceilings measured in it).
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import exp, fsum, log
from pathlib import Path
from typing import Any

from engine.plan.plan import Plan
from engine.plan.residency import cached_bytes

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Device:
    """What was measured on. `architecture` and `multiprocessors` are those of a GPU: kernels are chosen by them."""

    name: str
    architecture: str = ""
    multiprocessors: int = 0

    @property
    def stem(self) -> str:
        """The name of the results file without its suffix."""
        words = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return words if self.architecture else f"cpu-{words}"


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in the run: FLOP/s of a large product, bytes/s (read plus written) of memory, and of its
    cache, which holds `cache_bytes` (0: not known, and nothing is taken to lie in it)."""

    flops: float
    bytes: float
    cache_bytes: int = 0
    cached_bytes: float = 0.0

    def floor_us(self, costs: Iterable[tuple[int, int, int]]) -> float:
        """Microseconds that steps, one after the other, take at least: FLOPs, bytes, and those of them that the cache
        holds."""
        return sum(max(flops / self.flops, self._moving(nbytes, cached)) for flops, nbytes, cached in costs) * 1e6

    def plan_floor_us(self, plan: Plan) -> float:
        """The same for a plan that runs again and again."""
        cached = cached_bytes(plan, self.cache_bytes)
        return self.floor_us(
            (step.cost.flops, step.cost.bytes, held) for step, held in zip(plan.steps, cached, strict=True)
        )

    def _moving(self, nbytes: int, cached: int) -> float:
        return (nbytes - cached) / self.bytes + (cached / self.cached_bytes if cached else 0.0)


@dataclass(frozen=True)
class Run:
    """One call of the program. `id` is the time it began; `ceilings` is None where they were not measured."""

    id: str
    commit: str
    date: str
    driver: str
    versions: Mapping[str, str]
    ceilings: Ceilings | None


@dataclass(frozen=True)
class Row:
    """One case. Times are microseconds a run; `ratio` is the best peer's over ours (above 1: ours is faster).

    `peers` are those of the same mathematics, `parts` what a library takes for a part of it; None where `reasons` says
    why. `floor_us`: what FLOPs and bytes take at the run's ceilings. `predicted_us`: what the cost model that chose the
    tile says. Of models on a GPU, `run_us`: `Model.run` with its copies, and `host_us`: the host's part of a run that
    nothing waits for. A row with a `failure` has no times. Rows of the suite `accuracy` have none either, but `errors`
    by size and `facts`: counts of steps and kernels, and bytes. Rows of the suite `ready` have `seconds` from a start,
    those of `metrics` and `packed` `figures` (benchmarks/gpu/metrics.py, packed.py), which stay beside a failure. Rows
    of the suite `exports` have `errors` by what they are compared with, `facts`, and the `producer` that their file
    names.
    """

    suite: str
    case: str
    ours_us: float | None
    peers: Mapping[str, float | None]
    ratio: float | None
    floor_us: float | None
    rel_err: float | None
    commit: str
    date: str
    kernel_hash: str
    run: str
    parts: Mapping[str, float | None] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    run_us: float | None = None
    failure: str = ""
    facts: Mapping[str, int] = field(default_factory=dict)
    predicted_us: float | None = None
    host_us: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    producer: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.suite, self.case


class Results:
    """The rows and runs of one device."""

    def __init__(self, device: Device, runs: Iterable[Run] = (), rows: Iterable[Row] = ()) -> None:
        self.device = device
        self.runs = {run.id: run for run in runs}
        self.rows = {row.key: row for row in rows}

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file. Raises OSError, ValueError for a file that this program has not written."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            runs = [Run(**{**run, "ceilings": _ceilings(run["ceilings"])}) for run in content["runs"]]
            device = Device(content["device"], content["architecture"], content["multiprocessors"])
            found = cls(device, runs, [Row(**row) for row in content["rows"]])
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a results file of this program: {error}") from error
        strangers = {row.run for row in found.rows.values()} - set(found.runs)
        if strangers:
            raise ValueError(f"{path}: rows of unknown runs {sorted(strangers)}")
        return found

    @classmethod
    def of(cls, device: Device, folder: Path) -> Results:
        """What `folder` has of a device so far."""
        path = folder / f"{device.stem}.json"
        return cls.load(path) if path.exists() else cls(device)

    def add(self, run: Run, row: Row) -> None:
        """Put a row in, in the place of an older one of the same case."""
        assert row.run == run.id
        self.runs[run.id] = run
        self.rows[row.key] = row

    def merge(self, other: Results) -> None:
        """Put the rows of another file in, but for those that are older than what is here. Raises ValueError where it
        is of another device."""
        if other.device != self.device:
            raise ValueError(f"rows of {other.device} cannot join those of {self.device}")
        for key, row in other.rows.items():
            if key not in self.rows or row.date >= self.rows[key].date:
                self.add(other.runs[row.run], row)

    def keep(self, keys: Collection[tuple[str, str]]) -> int:
        """Drop the rows whose suite and case are not among `keys`; returns how many."""
        kept = {key: row for key, row in self.rows.items() if key in keys}
        dropped = len(self.rows) - len(kept)
        self.rows = kept
        return dropped

    def save(self, folder: Path) -> Path:
        """Write ``<folder>/<device>.json``. Runs of which no row is left are dropped."""
        used = {row.run for row in self.rows.values()}
        runs = sorted((run for run in self.runs.values() if run.id in used), key=lambda run: run.id)
        content = {
            "device": self.device.name,
            "architecture": self.device.architecture,
            "multiprocessors": self.device.multiprocessors,
            # Those of the newest run, at a glance; each run has its own.
            "driver": runs[-1].driver if runs else "",
            "versions": runs[-1].versions if runs else {},
            "runs": [asdict(run) for run in runs],
            "rows": [_without_defaults(row) for row in sorted(self.rows.values(), key=lambda row: row.suite)],
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.device.stem}.json"
        # Written beside, then renamed: a run that is ended half way leaves the rows it had.
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".", delete=False, encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
        return path


def geometric_mean(values: Sequence[float]) -> float:
    """That of positive numbers, at least one."""
    return exp(fsum(map(log, values)) / len(values))


def _ceilings(found: Mapping[str, float] | None) -> Ceilings | None:
    if found is None:
        return None
    cache = int(found.get("cache_bytes", 0)), float(found.get("cached_bytes", 0.0))
    return Ceilings(found["flops"], found["bytes"], *cache)


def _without_defaults(row: Row) -> dict[str, Any]:
    """The row's fields, less the optional ones that say nothing."""
    optional = (
        "parts", "reasons", "run_us", "failure", "facts", "predicted_us", "host_us", "errors", "seconds", "figures",
        "producer",
    )  # fmt: skip
    return {key: value for key, value in asdict(row).items() if value or key not in optional}
