"""How measurements are printed and stored: a Markdown table for people, JSON for comparisons, and a verdict."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load_tests.servers import ROOT


@dataclass
class Report:
    """One measurement. `checks` are what must hold, with what was found."""

    name: str
    options: Mapping[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def add(self, **row: Any) -> None:
        """A row of the table."""
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr)

    def check(self, what: str, holds: bool, found: Any) -> None:
        """Something that must hold."""
        self.checks[what] = {"holds": bool(holds), "found": found}

    def finish(self, output: Path | None) -> int:
        """Print it, with the verdict in the last line; store it; 0 where everything holds, else 1."""
        seconds = time.monotonic() - self.began
        print(f"## {self.name}\n")
        if self.rows:
            print(_table(self.rows))
        for what, check in self.checks.items():
            print(f"- {'yes' if check['holds'] else 'NO'}: {what} (found: {check['found']})")
        holding = sum(check["holds"] for check in self.checks.values())
        passed = holding == len(self.checks)
        verdict = "PASS" if passed else "FAIL"
        print(f"\n{verdict}: {self.name}; {holding} of {len(self.checks)} checks hold; {seconds:.0f} s")
        if output is not None:
            document = {"name": self.name, "options": dict(self.options), "machine": machine(), "rows": self.rows}
            outcome = {"checks": self.checks, "passed": passed, "seconds": round(seconds, 1)}
            output.write_text(json.dumps({**document, **outcome}, indent=1, default=str) + "\n")
        return 0 if passed else 1


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    lines += [f"| {' | '.join(_cell(row.get(name, '–')) for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {count}" for key, count in value.items())
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0].partition(":")[2].strip() if model else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }
