"""``python -m benchmarks tables``: the tables in the documents, made from the results files, and what is wrong with
those.

A table stands between ``<!-- table: <results file> <suite> -->`` and ``<!-- end -->``; what is between them is this
program's. `check` finds rows that the committed lists have and a results file lacks, rows of kernels whose sources have
changed since, and rows that failed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import cases
from benchmarks.cases.accuracy import BOUNDS, AccuracyCase
from benchmarks.hashes import kernel_hash
from benchmarks.results import Results, Row
from engine.errors import EngineError

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")

_TABLE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_PEER_VERSIONS = ("torch", "cudnn", "onnxruntime")


def regenerated(text: str, folder: Path) -> str:
    """A document with its tables as the results files of `folder` give them."""
    return _TABLE.sub(lambda found: f"{found[1]}{_table(folder, found[2], found[3])}{found[4]}", text)


def named(text: str) -> set[str]:
    """The results files whose tables a document has."""
    return {found[2] for found in _TABLE.finditer(text)}


def _table(folder: Path, stem: str, suite: str) -> str:
    path = folder / f"{stem}.json"
    rows = suite_rows(Results.load(path), stem, suite) if path.exists() else []
    return render(Results.load(path), rows) if rows else "Not measured yet.\n"


def suite_rows(results: Results, stem: str, suite: str) -> list[Row]:
    """The rows of a suite, in the order of the committed list."""
    listed = cases.suites_of(stem).get(suite, ())
    return [results.rows[suite, case.name] for case in listed if (suite, case.name) in results.rows]


def render(results: Results, rows: Sequence[Row]) -> str:
    """Rows as a Markdown table with a line that says where they come from. Times in µs."""
    if all(row.suite == AccuracyCase.suite for row in rows):
        return _accuracy(results, rows)
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    parts = list(dict.fromkeys(name for row in rows for name in row.parts))
    host = any(row.run_us is not None for row in rows)
    floor = any(row.floor_us is not None for row in rows)
    heads = ["case", "ours", *peers, *parts, "ratio", *["floor"] * floor, *["`Model.run`"] * host, "error"]
    lines = [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
    for row in rows:
        figures = [row.peers.get(name) for name in peers] + [row.parts.get(name) for name in parts]
        lines.append(
            _row(
                [
                    row.case,
                    "**failed**" if row.failure else _us(row.ours_us),
                    *map(_us, figures),
                    "–" if row.ratio is None else f"{row.ratio:.2f}",
                    *[_us(row.floor_us)] * floor,
                    *[_us(row.run_us)] * host,
                    "–" if row.rel_err is None else f"{row.rel_err:.0e}",
                ]
            )
        )
    return "\n".join([*lines, "", _origin(results, rows), ""])


_COUNTS = ("steps", "kernels")
_MEGABYTES = {"activations_bytes": "activations", "arena_bytes": "arena", "weights_bytes": "weights",
              "buckets_bytes": "8 plans, all"}  # fmt: skip


def _accuracy(results: Results, rows: Sequence[Row]) -> str:
    """Rows of errors, counts and memory as a Markdown table."""
    bounds = {case.name: BOUNDS[case.precision] for case in cases.ACCURACY}
    lines = [_row(["case", "error", "bound", *_COUNTS, *_MEGABYTES.values()])]
    lines.append(_row(["---", *["---:"] * (2 + len(_COUNTS) + len(_MEGABYTES))]))
    for row in rows:
        error = "–" if row.rel_err is None else f"{row.rel_err:.1e}"
        counts = [str(row.facts.get(name, "–")) for name in _COUNTS]
        sizes = [f"{row.facts[name] / 1e6:,.1f}" if name in row.facts else "–" for name in _MEGABYTES]
        failed = f"**failed** {error}" if row.failure else error
        lines.append(_row([row.case, failed, f"{bounds[row.case]:g}", *counts, *sizes]))
    return "\n".join([*lines, "", f"MB (10⁶ bytes). {_source(results, rows)}.", ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _us(value: float | None) -> str:
    """Three digits, none of them after the point from 100 on."""
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _origin(results: Results, rows: Sequence[Row]) -> str:
    return f"µs a run. {_source(results, rows)}."


def _source(results: Results, rows: Sequence[Row]) -> str:
    runs = [results.runs[key] for key in sorted({row.run for row in rows})]
    newest = runs[-1]
    facts = [
        results.device.name,
        *([f"driver {newest.driver}"] if newest.driver else []),
        *(f"{name} {newest.versions[name]}" for name in _PEER_VERSIONS if name in newest.versions),
        f"commit {', '.join(dict.fromkeys(run.commit for run in runs))}",
        ", ".join(dict.fromkeys(run.date for run in runs)),
    ]
    return "; ".join(facts)


def check(folder: Path, documents: Sequence[Path]) -> Iterator[str]:
    """What is wrong, a line each: with the documents' tables, and with the results files they name or that exist."""
    stems = {path.stem for path in folder.glob("*.json")}
    for document in documents:
        text = document.read_text(encoding="utf-8")
        stems |= named(text)
        if regenerated(text, folder) != text:
            yield f"{document.name}: its tables are not those of the results: python -m benchmarks tables"
    for stem in sorted(stems):
        path = folder / f"{stem}.json"
        if not path.exists():
            yield f"{stem}: no results file"
            continue
        yield from check_rows(Results.load(path), stem)


def check_rows(results: Results, stem: str) -> Iterator[str]:
    """What is wrong with the rows of one device."""
    listed = {case.suite: {c.name: c for c in suite} for suite in cases.suites_of(stem).values() for case in suite[:1]}
    for suite, by_name in listed.items():
        for name, case in by_name.items():
            row = results.rows.get((suite, name))
            if row is None:
                yield f"{stem}: {suite} {name}: missing"
            elif row.failure:
                yield f"{stem}: {suite} {name}: failed: {row.failure}"
            elif problem := _staleness(results, case, row):
                yield f"{stem}: {suite} {name}: {problem}"
    for suite, name in results.rows:
        if name not in listed.get(suite, {}):
            yield f"{stem}: {suite} {name}: not in the committed list"


def _staleness(results: Results, case: cases.Case, row: Row) -> str:
    try:
        present = kernel_hash(results.device, case)
    except EngineError as error:
        return f"stale: the present sources have no kernel for it: {error}"
    except ImportError as error:
        return f"cannot be compared with the present sources: {error} (install the extra `kernels`)"
    return "" if present == row.kernel_hash else f"stale: measured at {row.commit}, the sources have changed since"
