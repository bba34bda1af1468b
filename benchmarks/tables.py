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
from benchmarks.hashes import kernel_hash
from benchmarks.rendering import render
from benchmarks.results import Results, Row
from engine.errors import EngineError

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "kernel-results.md")

_TABLE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def regenerated(text: str, folder: Path) -> str:
    """A document with its tables as the results files of `folder` give them."""
    return _TABLE.sub(lambda found: f"{found[1]}{_table(folder, found[2], found[3])}{found[4]}", text)


def named(text: str) -> set[str]:
    """The results files whose tables a document has."""
    return {found[2] for found in _TABLE.finditer(text)}


def _table(folder: Path, stem: str, suite: str) -> str:
    path = folder / f"{stem}.json"
    rows = suite_rows(Results.load(path), stem, suite) if path.exists() else []
    if not rows:
        return "Not measured yet.\n"
    return render(Results.load(path), rows) + _not_there(stem, suite, {row.case for row in rows})


def _not_there(stem: str, suite: str, there: set[str]) -> str:
    """A line that names the cases of the committed list that have no row."""
    listed = [case.name for case in cases.suites_of(stem).get(suite, ())]
    missing = [name for name in listed if name not in there]
    if not missing:
        return ""
    return f"\n**Missing**, of {len(listed)} cases: {', '.join(missing)}.\n"


def suite_rows(results: Results, stem: str, suite: str) -> list[Row]:
    """The rows of a suite, in the order of the committed list."""
    listed = cases.suites_of(stem).get(suite, ())
    return [results.rows[suite, case.name] for case in listed if (suite, case.name) in results.rows]


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
    """What is wrong with the rows of one device: how many a suite lacks, then each row that is not right."""
    listed = {suite: {case.name: case for case in every} for suite, every in cases.suites_of(stem).items()}
    for suite, by_name in listed.items():
        missing = sum((suite, name) not in results.rows for name in by_name)
        if missing:
            yield f"{stem}: {suite}: {missing} of {len(by_name)} rows are missing"
        for name, case in by_name.items():
            if problem := problem_of(results, case):
                yield f"{stem}: {suite} {name}: {problem}"
    for suite, name in results.rows:
        if name not in listed.get(suite, {}):
            yield f"{stem}: {suite} {name}: not in the committed list"


def problem_of(results: Results, case: cases.Case) -> str:
    """Why the row of a case would have to be measured; empty where it is there, right and of the present sources."""
    row = results.rows.get((case.suite, case.name))
    if row is None:
        return "missing"
    return f"failed: {row.failure}" if row.failure else _staleness(results, case, row)


def _staleness(results: Results, case: cases.Case, row: Row) -> str:
    try:
        present = kernel_hash(results.device, case)
    except EngineError as error:
        return f"stale: the present sources have no kernel for it: {error}"
    except ImportError as error:
        return f"cannot be compared with the present sources: {error} (install the extra `kernels`)"
    return "" if present == row.kernel_hash else f"stale: measured at {row.commit}, the sources have changed since"
