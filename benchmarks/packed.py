"""What the rows of the suite `packed` say, and their table: encoders on packed tokens beside padded ones. Needs neither
a GPU nor PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.cases.packed import PackedCase
from benchmarks.measure import Measurement
from benchmarks.results import Row

EAGER, COMPILE = "eager", "compile in a graph"
JAGGED, JAGGED_CALLED, JAGGED_COMPILE = "jagged", "jagged, called", "jagged, compile in a graph"
PADDED_PEERS = (EAGER, COMPILE)
JAGGED_PEERS = (JAGGED, JAGGED_CALLED, JAGGED_COMPILE)

PADDED_LEVEL, JAGGED_LEVEL = 1.2, 1.1
"""What sequences/s over those of the padded peer are to be at least, in units of max over mean length, and over those
on jagged tensors."""


def figures(case: PackedCase, measurement: Measurement) -> dict[str, float]:
    """Of a row: the lengths' `mean` and `max` in tokens; `sequences_s`; `padded_ratio`, sequences/s over the best
    padded peer's, and `over_lengths`, the same over max / mean: above 1, more than the padding that is not computed;
    `jagged_ratio`, over the best on jagged tensors. What was not measured is not there."""
    lengths = case.lengths
    mean, longest = float(lengths.mean()), float(lengths.max())
    found = {"mean": mean, "max": longest}
    if measurement.ours_us is None:
        return found
    found["sequences_s"] = case.batch / measurement.ours_us * 1e6
    padded, jagged = best(measurement.peers, PADDED_PEERS), best(measurement.peers, JAGGED_PEERS)
    if padded is not None:
        found["padded_ratio"] = padded / measurement.ours_us
        found["over_lengths"] = found["padded_ratio"] * mean / longest
    if jagged is not None:
        found["jagged_ratio"] = jagged / measurement.ours_us
    return found


def best(peers: Mapping[str, float | None], names: Sequence[str]) -> float | None:
    """The least µs of the peers of these names; None where none ran."""
    return min((us for name in names if (us := peers.get(name)) is not None), default=None)


_COLUMNS: Mapping[str, tuple[str, str]] = {
    "sequences/s": ("sequences_s", ",.0f"),
    "mean": ("mean", ".1f"),
    "max": ("max", ".0f"),
    "× padded": ("padded_ratio", ".2f"),
    "× padded ÷ (max ÷ mean)": ("over_lengths", ".2f"),
    "× jagged": ("jagged_ratio", ".2f"),
}


def heads(rows: Sequence[Row]) -> list[str]:
    """The columns of the table."""
    return ["case", *_COLUMNS, "ours", "ours padded", *_peers(rows), "`Model.run`", "the same padded", "floor",
            "error", "worst token"]  # fmt: skip


def cells(rows: Sequence[Row]) -> Iterator[list[str]]:
    """The rows of the table. Times in µs."""
    for row in rows:
        said = [_number(row.figures.get(figure), form) for figure, form in _COLUMNS.values()]
        times = [row.ours_us, row.figures.get("ours_padded_us"), *(row.peers.get(name) for name in _peers(rows))]
        times += [row.run_us, row.figures.get("run_padded_us"), row.floor_us]
        worst, padded = (row.figures.get(figure) for figure in ("worst_token", "worst_token_padded"))
        beside = "" if padded is None else f" (padded {padded:.1e})"
        case = f"{row.case} **failed**" if row.failure else row.case
        yield [case, *said, *(_number(us, ",.0f") for us in times), _number(row.rel_err, ".1e"),
               _number(worst, ".1e") + beside]  # fmt: skip


def _peers(rows: Sequence[Row]) -> list[str]:
    return [name for name in (*PADDED_PEERS, *JAGGED_PEERS) if any(name in row.peers for row in rows)]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def summary(rows: Sequence[Row]) -> str:
    """What the columns are, and which rows are under the levels."""
    behind = [
        f"{row.case} ({name} {row.figures[figure]:.2f})"
        for row in rows
        for name, figure, level in (
            ("÷ (max ÷ mean)", "over_lengths", PADDED_LEVEL),
            ("jagged", "jagged_ratio", JAGGED_LEVEL),
        )
        if row.figures.get(figure, level) < level
    ]
    return (
        "Lengths are those of a corpus (benchmarks/cases/lengths.py): pairs of sentences at 128, news stories at 512. "
        "× padded: sequences/s over those of the best PyTorch that computes padding, × jagged: over those of the best "
        f"on jagged nested tensors. Under {PADDED_LEVEL:g} × max ÷ mean or under {JAGGED_LEVEL:g} × jagged: "
        f"{len(behind)}{': ' if behind else ''}{', '.join(behind)}. Times in µs; errors at real tokens, of all of them "
        "and of the worst, beside the worst of our padded graph."
    )
